"""A row's result has the same bits for any other rows of the call, chunks of the prompt, and slots of the batch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from packed import NAMES, pack
from test_attention import KINDS, Attention, Sizes, as_bytes, make, one
from test_linear import Linear

# (in, outs): sizes next to a multiple of a vector, a panel, a group, a pass of inputs, or a chunk of groups.
SIZES = ((577, (65, 9)), (2081, (17,)), (39, (130, 33)), (800, (48,)))


def parts_of(rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    """Return selections of rows that together hold every row, in any order, few and many at a time."""
    left = rng.permutation(rows)
    cuts = np.cumsum([1, 2, 3, 4, 5, 6, 7, 8, 9, 13])
    return [*np.split(left, cuts[cuts < rows]), np.arange(rows)[:17], np.arange(rows)[rows - 1 :]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "outs"), SIZES)
def test_products(isa: str, name: str, linear: Linear, size: int, outs: tuple[int, ...]) -> None:
    rng = np.random.default_rng(size)
    x = rng.standard_normal((70, size), dtype=np.float32)
    weights = [pack(name, rng.standard_normal((1, out, size), dtype=np.float32))[0] for out in outs]
    norm = rng.standard_normal((1, size), dtype=np.float32)
    whole = linear(x, 0, weights, outs, norm=norm, eps=1e-5)
    for part in parts_of(rng, len(x)):
        for found, expected in zip(
            linear(x[part], 0, weights, outs, norm=norm, eps=1e-5), whole, strict=True
        ):
            np.testing.assert_array_equal(found, expected[part])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gates_biases_and_residuals(isa: str, name: str, linear: Linear, gate: str) -> None:
    rng = np.random.default_rng(5)
    x, residual = (rng.standard_normal((40, n), dtype=np.float32) for n in (70, 37))
    weights = [pack(name, rng.standard_normal((1, 37, 70), dtype=np.float32))[0] for _ in range(2)]
    biases = [rng.standard_normal((1, 37), dtype=np.float32) for _ in range(2)]

    def run(rows: np.ndarray) -> np.ndarray:
        given: dict[str, Any] = {"biases": biases, "residual": residual[rows], "gate": gate}
        return linear(x[rows], 0, weights, [37, 37], **given)[0]

    whole = run(np.arange(40))
    for part in parts_of(rng, 40):
        np.testing.assert_array_equal(run(part), whole[part])


def cut_at_random(rng: np.random.Generator, tokens: int) -> list[tuple[int, int]]:
    """Return (start, length) of chunks that cover the tokens: single tokens, a few, and many."""
    chunks, start = [], 0
    while start < tokens:
        length = min(int(rng.choice([1, 2, 3, 5, 16, 17, 40, 90])), tokens - start)
        chunks.append((start, length))
        start += length
    return chunks


ATTENTIONS = {
    "all positions": one(0, 300, H=24, P=8, S=310, seed=1),
    "one head": one(0, 290, K=1, G=1, H=10, P=5, S=290, soft_cap=3.0, seed=2),
    "many queries of a head": one(0, 140, K=1, G=9, H=8, P=4, S=150, seed=3),
    "a window": one(0, 300, H=16, P=8, S=300, window=77, seed=4),
    "a window of a few": one(0, 270, H=9, P=4, S=270, window=3, soft_cap=2.0, seed=5),
    "a ring": one(0, 700, H=16, P=8, S=189, window=100, seed=6),
    "a short ring": one(0, 300, H=8, P=4, S=94, window=5, seed=7),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_attention(isa: str, attention: Attention, sizes: Sizes, kind: str) -> None:
    """A prompt cut at random, beside sequences in other slots, gives the same results and cache as single tokens."""
    rng = np.random.default_rng(sizes.seed)
    prompt, total = make(replace(sizes, kind=kind)), sizes.lengths[0]

    def chunk(
        start: int, length: int, caches: list[np.ndarray], others: int
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        cut = {
            name: getattr(prompt, name)[:, start : start + length] for name in ("q", "k", "v", "cos", "sin")
        }
        beside = {name: np.repeat(np.roll(array, 1, 1), others, 0) for name, array in cut.items()}
        arrays = {name: np.concatenate([beside[name][:1], cut[name], beside[name][1:]]) for name in cut}
        mine = min(others, 1)
        slots = [*range(mine), 2, *range(3, 2 + others)][: others + 1]
        lengths = [length if i == mine else int(rng.integers(0, length + 1)) for i in range(others + 1)]
        starts = [start] * (others + 1)
        out, caches = attention(
            *arrays.values(), caches, sizes.layer, slots, starts, lengths,
            scale=prompt.scale, window=sizes.window, soft_cap=sizes.soft_cap,
        )  # fmt: skip
        return out[mine, :length], caches

    def run(chunks: list[tuple[int, int]], others: int) -> tuple[np.ndarray, list[np.ndarray]]:
        caches, parts = [np.nan_to_num(a) for a in prompt.caches], []
        for start, length in chunks:
            out, caches = chunk(start, length, caches, others)
            parts.append(out)
        return np.concatenate(parts), [a[sizes.layer, 2] for a in caches]

    expected, rows = run([(t, 1) for t in range(total)], 0)
    for others in (0, 2):
        answers, found = run(cut_at_random(rng, total), others)
        np.testing.assert_array_equal(answers, expected)
        for ours, theirs in zip(found, rows, strict=True):
            np.testing.assert_array_equal(as_bytes(ours), as_bytes(theirs))
