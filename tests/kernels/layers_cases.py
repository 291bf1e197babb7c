"""Decoders for the tests of precast.layers, and the calls made to each."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

# Slot, start and length of a sequence of a call.
Place = tuple[int, int, int]
CACHES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decoder and a series of calls.

    Attributes:
        windows: window of each layer.
        slots: slots of the caches.
        sizes: positions of the cache of each window, in ascending order of the windows.
        heads: (N, K, H).
        calls: tokens T and the places of the sequences, for each call.
        ropes: rotary table of each layer.
        norms: RMSNorms "before" the products and the attention or "around" them, or LayerNorms before them ("layer").
        experts: experts of a layer, experts of a row, and whether the shares are renormalised.
        attends: False for layers without attention.
    """

    windows: tuple[int, ...]
    slots: int
    sizes: tuple[int, ...]
    heads: tuple[int, int, int]
    width: int
    ff: int
    calls: tuple[tuple[int, tuple[Place, ...]], ...]
    ropes: tuple[int, ...] = ()
    pairs: int | None = None
    norms: str = "before"
    heads_normed: str = ""
    soft_cap: float = 0.0
    gate: str = "silu"
    biased: bool = False
    mlp: str = "gated"
    experts: tuple[int, int, bool] = (1, 1, False)
    attends: bool = True

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def groups(self) -> list[int]:
        return sorted(set(self.windows))

    @property
    def layers_of(self) -> list[list[int]]:
        """The layers of each group."""
        return [[i for i, w in enumerate(self.windows) if w == window] for window in self.groups]

    @property
    def only_kernels(self) -> bool:
        """True if every step has a kernel of its own."""
        return self.norms == "before" and not self.heads_normed and self.mlp != "experts"


def steps(slot: int, first: int, last: int) -> tuple[tuple[int, tuple[Place, ...]], ...]:
    """Return calls of one token each, at the positions ``[first, last)``."""
    return tuple((1, ((slot, position, 1),)) for position in range(first, last))


CASES = {
    # One sequence; the products skip the padding beyond its length.
    "one": Case(
        windows=(0, 0),
        slots=1,
        sizes=(33,),
        heads=(6, 2, 12),
        width=40,
        ff=50,
        calls=((9, ((0, 0, 7),)), (1, ((0, 7, 1),)), (9, ((0, 8, 9),)), (9, ((0, 17, 0),))),
    ),
    "biases": Case(
        windows=(0,) * 5,
        slots=2,
        sizes=(20,),
        heads=(4, 4, 6),
        width=33,
        ff=17,
        calls=((6, ((1, 0, 6),)), (1, ((1, 6, 1), (0, 0, 1)))),
        gate="gelu_tanh",
        biased=True,
    ),
    # Several sequences of different lengths, out of the order of their slots, one empty.
    "ragged": Case(
        windows=(0,),
        slots=4,
        sizes=(70,),
        heads=(6, 1, 8),
        width=64,
        ff=96,
        calls=(
            (9, ((2, 0, 9), (0, 0, 4), (3, 0, 1))),
            (1, ((1, 0, 0), (2, 9, 1), (0, 4, 1))),
            (1, ((0, 5, 1), (3, 1, 1), (2, 10, 1))),
        ),
        biased=True,
    ),
    # Blocks of tokens, and a step that splits its positions into spans.
    "long": Case(
        windows=(0, 0),
        slots=2,
        sizes=(300,),
        heads=(3, 3, 10),
        width=32,
        ff=64,
        calls=((260, ((1, 0, 259),)), (1, ((0, 0, 1), (1, 259, 1))), (260, ((0, 1, 40),))),
    ),
    # Three caches, two of them the shortest possible rings; chunks and steps cross the ends of windows and rings.
    "rings": Case(
        windows=(5, 0, 9, 5),
        ropes=(0, 1, 1, 0),
        slots=1,
        sizes=(40, 10, 14),
        heads=(4, 2, 8),
        width=24,
        ff=32,
        calls=(
            (6, ((0, 0, 6),)),
            (6, ((0, 6, 6),)),
            (6, ((0, 12, 6),)),
            (6, ((0, 18, 2),)),
            *steps(0, 20, 31),
        ),
        soft_cap=2.0,
    ),
    "ragged rings": Case(
        windows=(0, 4, 4),
        slots=3,
        sizes=(30, 9),
        heads=(2, 2, 6),
        width=20,
        ff=24,
        pairs=2,
        calls=(
            (6, ((2, 0, 6), (0, 0, 4))),
            (6, ((0, 4, 6), (2, 6, 2))),
            (1, ((2, 8, 1), (1, 0, 1), (0, 10, 1))),
            (6, ((1, 1, 0), (0, 11, 6))),
            (6, ((2, 9, 6), (1, 1, 5))),
            (1, ((0, 17, 1), (1, 6, 1), (2, 15, 1))),
            (1, ((1, 7, 1), (2, 16, 1), (0, 18, 1))),
        ),
    ),
    # Blocks of tokens, tiles and spans across the ring's end.
    "long ring": Case(
        windows=(100,),
        slots=1,
        sizes=(169,),
        heads=(6, 2, 10),
        width=30,
        ff=16,
        calls=(
            *((70, ((0, start, 70),)) for start in (0, 70, 140)),
            (70, ((0, 210, 65),)),
            (70, ((0, 275, 62),)),
            *steps(0, 337, 340),
            (70, ((0, 340, 3),)),
        ),
    ),
    # Enough query heads of a key head that a step counts as many rows; a window that the cache never fills.
    "wide group": Case(
        windows=(150, 400),
        slots=1,
        sizes=(150, 200),
        heads=(12, 1, 8),
        width=30,
        ff=16,
        calls=((1, ((0, 0, 1),)), (140, ((0, 1, 0),)), *((1, ((0, p, 1),)) for p in range(1, 8))),
        pairs=0,
    ),
    "qk norms": Case(
        windows=(0, 6),
        ropes=(1, 0),
        slots=2,
        sizes=(20, 12),
        heads=(4, 2, 12),
        width=40,
        ff=30,
        calls=((5, ((1, 0, 5), (0, 0, 3))), (5, ((1, 5, 5), (0, 3, 4))), (1, ((0, 7, 1), (1, 10, 1)))),
        heads_normed="head",
        norms="around",
        gate="gelu_tanh",
        soft_cap=5.0,
    ),
    "whole norms": Case(
        windows=(0, 0),
        slots=1,
        sizes=(330,),
        heads=(3, 1, 24),
        width=48,
        ff=36,
        calls=((320, ((0, 0, 311),)), (1, ((0, 311, 1),))),
        heads_normed="all",
    ),
    "layer norms": Case(
        windows=(0, 0),
        slots=2,
        sizes=(24,),
        heads=(3, 3, 10),
        width=30,
        ff=45,
        calls=((7, ((1, 0, 7), (0, 0, 5))), (1, ((0, 5, 1), (1, 7, 1)))),
        pairs=0,
        norms="layer",
        mlp="plain",
        gate="gelu_tanh",
        biased=True,
    ),
    "plain": Case(
        windows=(0, 3),
        slots=1,
        sizes=(24, 10),
        heads=(3, 3, 10),
        width=30,
        ff=45,
        calls=((7, ((0, 0, 7),)), (7, ((0, 7, 5),)), (1, ((0, 12, 1),))),
        pairs=0,
        mlp="plain",
        biased=True,
    ),
    "experts": Case(
        windows=(0, 5),
        slots=2,
        sizes=(24, 11),
        heads=(4, 2, 8),
        width=36,
        ff=20,
        calls=((7, ((1, 0, 7), (0, 0, 5))), (7, ((1, 7, 6), (0, 5, 6))), (1, ((0, 11, 1), (1, 13, 1)))),
        mlp="experts",
        experts=(7, 3, True),
    ),
    "one expert of a row": Case(
        windows=(0, 0),
        slots=1,
        sizes=(80,),
        heads=(2, 1, 8),
        width=33,
        ff=40,
        calls=((70, ((0, 0, 66),)), (1, ((0, 66, 1),))),
        mlp="experts",
        experts=(5, 1, False),
        norms="layer",
    ),
    "all experts": Case(
        windows=(0, 0),
        slots=1,
        sizes=(40,),
        heads=(2, 1, 8),
        width=40,
        ff=33,
        calls=((30, ((0, 0, 27),)), (1, ((0, 27, 1),))),
        mlp="experts",
        experts=(4, 4, True),
        gate="gelu_tanh",
        soft_cap=3.0,
    ),
    # Scores without the error of an earlier layer.
    "experts alone": Case(
        windows=(0,),
        slots=1,
        sizes=(9,),
        heads=(1, 1, 2),
        width=70,
        ff=50,
        calls=((200, ((0, 0, 190),)), (1, ((0, 0, 1),)), (4, ((0, 0, 4),)), (9, ((0, 0, 0),))),
        mlp="experts",
        experts=(9, 4, False),
        attends=False,
    ),
}
