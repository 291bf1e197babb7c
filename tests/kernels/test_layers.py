"""The kernels as models use them: in a loop over layers, caches donated, against the same maths in pure XLA."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest


class Weights(NamedTuple):
    """Stacked weights of an attention-only model."""

    q: np.ndarray  # [L, N * H, D]
    k: np.ndarray  # [L, K * H, D]
    v: np.ndarray  # [L, K * H, D]
    o: np.ndarray  # [L, D, N * H]


@pytest.fixture(scope="module")
def step(jax: ModuleType) -> Callable[..., Any]:
    """``(ops, (N, K, H), x [R, T, D], weights, cache, rows) -> (x, cache)``; uses up the cache."""

    @partial(jax.jit, static_argnames=("ops", "heads"), donate_argnames=("cache",))
    def run(ops: Any, heads: tuple[int, int, int], x: Any, weights: Weights, cache: Any, rows: Any) -> Any:
        (n, k, h), (r, t, d) = heads, x.shape

        def layer(index: Any, carry: Any) -> Any:
            x, cache = carry
            q, keys, values = ops.linear(
                x.reshape(r * t, d), [weights.q, weights.k, weights.v], index, np.int32(r * t)
            )
            fresh = [a.reshape(r, t, k, h) for a in (keys, values)]
            out, cache = ops.attention(q.reshape(r, t, n, h), *fresh, cache, index, rows, h**-0.5)
            (y,) = ops.linear(out.reshape(r * t, n * h), [weights.o], index, np.int32(r * t))
            return jax.numpy.tanh(x + y.reshape(r, t, d)), cache

        return jax.lax.fori_loop(0, weights.q.shape[0], layer, (x, cache))

    return run


CASES = [
    # (L, B, S), (N, K, H), D, calls one after another: T and the (slot, start, length) of its sequences
    ((2, 1, 13), (2, 1, 4), 6, [(5, [(0, 0, 5)]), (1, [(0, 5, 1)]), (1, [(0, 6, 1)])]),
    ((3, 3, 70), (6, 2, 8), 17, [(9, [(2, 0, 9), (0, 0, 4)]), (1, [(1, 0, 0), (2, 9, 1), (0, 4, 1)])]),
    ((1, 2, 300), (3, 3, 7), 9, [(260, [(1, 0, 259)]), (1, [(0, 0, 1), (1, 259, 1)]), (40, [(1, 260, 40)])]),
]


@pytest.mark.parametrize(("cache_shape", "heads", "width", "calls"), CASES, ids=["one", "ragged", "spans"])
def test_a_loop_over_layers_agrees_with_xla(
    isa: str,
    jax: ModuleType,
    step: Callable[..., Any],
    cache_shape: tuple[int, int, int],
    heads: tuple[int, int, int],
    width: int,
    calls: list[tuple[int, list[tuple[int, int, int]]]],
) -> None:
    # It imports jax, which the fixture has found.
    from precast.exporter.models.ops import CPU_OPS, XLA_OPS, Rows

    rng, (layers, slots, capacity), (n, k, h) = np.random.default_rng(width), cache_shape, heads

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))

    outs = ((n * h, width), (k * h, width), (k * h, width), (width, n * h))
    weights = Weights(*(normal(layers, *shape) for shape in outs))
    all_ops = (CPU_OPS, XLA_OPS)
    caches = [ops.empty_cache((layers, slots, k, capacity, h)) for ops in all_ops]
    for tokens, sequences in calls:
        x = rng.standard_normal((len(sequences), tokens, width), dtype=np.float32)
        rows = Rows(*(np.int32(column) for column in zip(*sequences, strict=True)))
        results = [
            step(ops, heads, x, weights, *a) for ops, *a in zip(all_ops, caches, [rows] * 2, strict=True)
        ]
        caches = [cache for _, cache in results]
        for r, (slot, start, length) in enumerate(sequences):
            ours, theirs = (np.asarray(out)[r, :length] for out, _ in results)
            assert np.all(np.isfinite(theirs))
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
            filled = np.s_[:, slot, :, : start + length]
            for ours, theirs in zip(*caches, strict=True):
                np.testing.assert_allclose(ours[filled], theirs[filled], rtol=1e-4, atol=1e-5)


def test_donated_caches_are_written_in_place(isa: str, jax: ModuleType, step: Callable[..., Any]) -> None:
    from precast.exporter.models.ops import CPU_OPS, Rows

    weights = Weights(*(np.ones(shape, np.float32) for shape in ((2, 8, 5), (2, 4, 5), (2, 4, 5), (2, 5, 8))))
    cache = CPU_OPS.empty_cache((2, 1, 1, 9, 4))
    before = [array.unsafe_buffer_pointer() for array in cache]
    rows = Rows(*(np.int32([number]) for number in (0, 0, 3)))
    _, after = step(CPU_OPS, (2, 1, 4), np.ones((1, 3, 5), np.float32), weights, cache, rows)
    assert [array.unsafe_buffer_pointer() for array in after] == before
    assert all(array.is_deleted() for array in cache)
