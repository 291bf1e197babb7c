"""What differs between targets, as values; everything else is plain jax.numpy.

`xla_ops.XLA_OPS` is the maths in pure XLA, for the portable StableHLO and for any platform. `cpu_ops.CPU_OPS` calls
precast's kernels, which read stacked weights and the filled part of the cache in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax import Array


class Packed(NamedTuple):
    """A stack of weights in small integers, as `exporter.quantize` lays them out: int8, or int4 where there is a
    minimum."""

    values: Array
    scale: Array
    minimum: Array | None = None


# A stack of weights: [L, out, in] in float32 or bfloat16, or packed.
Weight = Array | Packed


class KVCache(NamedTuple):
    """Keys and values of some layers and every slot, each ``[L, B, K, S, H]``; of int8 the scales ``[L, B, K, S]``.

    Position p stands at place p mod S: of layers with a window, S is less than the context, and a new position takes
    the place of one that no token sees any more.
    """

    keys: Array
    values: Array
    key_scale: Array | None = None
    value_scale: Array | None = None

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> "KVCache":
        return cls(*arrays)

    def arrays(self) -> tuple[Array, ...]:
        return tuple(a for a in self if a is not None)


# One for every group of layers that see equally far.
KVCaches = tuple[KVCache, ...]


class Rows(NamedTuple):
    """Where the R sequences of a call lie in the cache, each ``[R]`` int32.

    Row r's tokens ``0 .. length - 1`` stand at positions ``start .. start + length - 1`` of slot ``slot``; what is
    behind `length` is padding: never written, its results meaningless.
    """

    slots: Array
    starts: Array
    lengths: Array


class Rotary(NamedTuple):
    """Cosines and sines of the angles at the tokens of a call, each ``[R, T, P]``: P pairs of a head are turned.

    What is behind them, if 2 P < H, is left. Layers take theirs out of Z such tables, ``[Z, R, T, P]``.
    """

    cos: Array
    sin: Array


@dataclass(frozen=True, kw_only=True)
class LinearCall:
    """Products of one x with weights of one layer, and what is done around them.

    Attributes:
        weights: stacks of out × in.
        outs: how many outputs each has; packed weights are padded.
        biases: ``[L, out]`` of each, or nothing.
        norm: weight ``[L, D]`` of an RMSNorm of x before, or None; `eps` is its.
        residual: ``[M, out]``, added to the only result, or None.
        gate: "silu" or "gelu_tanh": of two products, that of the first, times the second; of one, that of it; else "".
    """

    weights: tuple[Weight, ...]
    outs: tuple[int, ...]
    biases: tuple[Array, ...] = ()
    norm: Array | None = None
    eps: float = 0.0
    residual: Array | None = None
    gate: str = ""

    @property
    def results(self) -> tuple[int, ...]:
        """Outputs of each result."""
        return self.outs[:1] if self.gate else self.outs


@dataclass(frozen=True, kw_only=True)
class NormCall:
    """Normalisation of x in pieces of `width` numbers, each by itself: a row, or every head of a row.

    Attributes:
        weight: ``[L, width]``.
        eps: added to the mean of the squares.
        width: numbers of a piece.
        bias: ``[L, width]``: then the mean is subtracted first (LayerNorm, Ba et al. 2016); None for RMSNorm.
        residual: as large as x, added to the result, or None.
    """

    weight: Array
    eps: float
    width: int
    bias: Array | None = None
    residual: Array | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertsCall:
    """A mixture of gated MLPs, of which every row goes through the `chosen` that its scores are highest for.

    A row's result is the sum of its experts' results, each times its share: the softmax of the scores, of all E or,
    where `renormalised`, of the chosen alone.

    Attributes:
        gate, up: stacks ``[L E, F, D]``.
        down: stack ``[L E, D, F]``.
        experts: E.
        ff_width: F.
        chosen: experts of a row.
        renormalised: whether the shares of the chosen add up to one.
        activation: "silu" or "gelu_tanh".
        norm: weight ``[L, D]`` of an RMSNorm of x before, or None; `eps` is its.
        residual: ``[M, D]``, added to the result, or None.
    """

    gate: Weight
    up: Weight
    down: Weight
    experts: int
    ff_width: int
    chosen: int
    renormalised: bool
    activation: str
    norm: Array | None = None
    eps: float = 0.0
    residual: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What a layer may ask of its target, which knows the layer's number.

    Attributes:
        project: ``(x [M, in], call) -> results each [M, out]``.
        normalize: ``(x [M, n width], call) -> [M, n width]``.
        attend: ``(q [R, T, N, H], k and v [R, T, K, H]) -> [R, T, N, H]``: turns q and k by their positions, keeps k
            and v, and attends to what the layer's tokens see.
        mix: ``(x [M, D], scores [M, E], call) -> [M, D]``.
    """

    project: Callable[[Array, LinearCall], list[Array]]
    normalize: Callable[[Array, NormCall], Array]
    attend: Callable[[Array, Array, Array], Array]
    mix: Callable[[Array, Array, ExpertsCall], Array]


@dataclass(frozen=True, kw_only=True)
class Attending:
    """What attention does with scores.

    Attributes:
        scale: what they are multiplied by.
        soft_cap: if not 0, they become ``soft_cap · tanh(score / soft_cap)``.
        window: if not 0, how many positions a token sees, its own among them.
    """

    scale: float
    soft_cap: float = 0.0
    window: int = 0


@dataclass(frozen=True, kw_only=True)
class Stack:
    """All layers of a decoder.

    Attributes:
        layer: ``(x [R, T, D], calls) -> x``, the same for every layer.
        heads: N, K and H.
        scale: what attention scores are multiplied by.
        soft_cap: as in `Attending`.
        windows: of each layer, as in `Attending`.
        ropes: of each layer, which of the call's Z tables turns its heads.
    """

    layer: Callable[[Array, Calls], Array]
    heads: tuple[int, int, int]
    scale: float
    windows: tuple[int, ...]
    ropes: tuple[int, ...]
    soft_cap: float = 0.0

    @property
    def layers(self) -> int:
        """L."""
        return len(self.windows)

    @property
    def groups(self) -> tuple[int, ...]:
        """The windows that there are, in the order of the caches: layers of one window share a cache."""
        return tuple(sorted(set(self.windows)))

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For each layer, which of the caches is its, and which layer of that cache it is."""
        seen = dict.fromkeys(self.groups, 0)
        places = []
        for window in self.windows:
            places.append((self.groups.index(window), seen[window]))
            seen[window] += 1
        return tuple(places)

    def attending(self, group: int) -> Attending:
        """How layers of a cache attend."""
        return Attending(scale=self.scale, soft_cap=self.soft_cap, window=self.groups[group])


@dataclass(frozen=True, kw_only=True)
class Ops:
    """What a target computes in its own way.

    Attributes:
        linear: ``(x [M, in], call, layer, used) -> results each [M, out]``; rows from `used` on are padding, and what
            comes out for them means nothing.
        normalize: ``(x [M, n width], call, layer) -> [M, n width]``.
        experts: ``(x [M, D], scores [M, E], call, layer, used) -> [M, D]``.
        embed: ``(tokens [M], weight [1, V, D], V, D) -> [M, D]`` float32.
        attention: ``(q [R, T, N, H], k and v [R, T, K, H], rotary, cache, layer of it, rows, attending) ->
            (out [R, T, N, H], cache)``: rotates q and k, appends k and v to the cache; token t sees positions
            ``0 .. start + t``, or the last of them.
        layers: ``(stack, x [R, T, D], rotary, caches, rows, used) -> (x, caches)``: all layers, one after another; a
            cache for each of the stack's groups; of the R·T rows those from `used` on are padding.
        argmax: ``logits [R, V] -> [R]`` int32, of each row the first of the largest.
        empty_cache: ``arrays -> arrays`` of these shapes and types, nothing in them.
        kernels: the custom-call targets it uses.
    """

    linear: Callable[[Array, LinearCall, Array, Array], list[Array]]
    normalize: Callable[[Array, NormCall, Array], Array]
    experts: Callable[[Array, Array, ExpertsCall, Array, Array], Array]
    embed: Callable[[Array, Weight, int, int], Array]
    attention: Callable[[Array, Array, Array, Rotary, KVCache, Array, Rows, Attending], tuple[Array, KVCache]]
    layers: Callable[[Stack, Array, Rotary, KVCaches, Rows, Array], tuple[Array, KVCaches]]
    argmax: Callable[[Array], Array]
    empty_cache: Callable[[Sequence[jax.ShapeDtypeStruct]], tuple[Array, ...]]
    kernels: tuple[str, ...] = ()
