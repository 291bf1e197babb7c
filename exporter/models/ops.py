"""The two operations that differ between targets, as values: everything else is plain jax.numpy.

`XLA_OPS` is the maths in pure XLA, for the portable StableHLO and for any platform. `CPU_OPS` calls precast's
kernels, which read stacked weights and the filled part of the cache in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Cache(NamedTuple):
    """Keys and values of every layer and slot, each ``[L, B, K, S, H]``."""

    keys: Array
    values: Array


class Rows(NamedTuple):
    """Where the R sequences of a call lie in the cache, each ``[R]`` int32.

    Row r's tokens ``0 .. length - 1`` stand at positions ``start .. start + length - 1`` of slot ``slot``; what is
    behind `length` is padding: never written, its results meaningless.
    """

    slots: Array
    starts: Array
    lengths: Array


@dataclass(frozen=True, kw_only=True)
class Ops:
    """What a target computes in its own way.

    Attributes:
        linear: ``(x [M, in], weights each [L, out, in], layer, used) -> results each [M, out]``; rows from `used` on
            are padding, and what comes out for them means nothing.
        attention: ``(q [R, T, N, H], k and v [R, T, K, H], cache, layer, rows, scale) -> (out [R, T, N, H], cache)``
            with k and v appended to the cache; token t sees positions ``0 .. start + t``.
        empty_cache: ``shape -> keys and values`` of that shape, nothing in them.
        kernels: the custom-call targets it uses.
    """

    linear: Callable[[Array, Sequence[Array], Array, Array], list[Array]]
    attention: Callable[[Array, Array, Array, Cache, Array, Rows, float], tuple[Array, Cache]]
    empty_cache: Callable[[tuple[int, ...]], Cache]
    kernels: tuple[str, ...] = ()


def _xla_linear(x: Array, weights: Sequence[Array], layer: Array, used: Array) -> list[Array]:
    # The only entry of a stack is taken as it lies; XLA copies what is sliced at an index it does not know.
    return [jnp.einsum("MI,OI->MO", x, w[0] if len(w) == 1 else w[layer]) for w in weights]


def softmax_attention(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """Grouped-query attention (Ainslie et al. 2023), softmax in float32.

    Args:
        q: ``[B, T, N, H]``.
        k: ``[B, K, S, H]``.
        v: ``[B, K, S, H]``.
        mask: ``[B, T, S]``, true where a token sees a position.
        scale: what scores are multiplied by.

    Returns:
        ``[B, T, N, H]``.
    """
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[1], n // k.shape[1], h)  # [B, T, K, G, H]
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", grouped, k) * scale
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    out = jnp.einsum("BKGTS,BKSH->BTKGH", jax.nn.softmax(scores, axis=-1), v)
    return out.reshape(b, t, n, h)


def _xla_attention(
    q: Array, k: Array, v: Array, cache: Cache, layer: Array, rows: Rows, scale: float
) -> tuple[Array, Cache]:
    tokens, capacity = q.shape[1], cache.keys.shape[3]
    step = jnp.arange(tokens, dtype=jnp.int32)
    positions = rows.starts[:, None] + step  # [R, T]
    # Padding goes to a position that does not exist, and is dropped there.
    places = jnp.where(step < rows.lengths[:, None], positions, capacity)
    index = (layer, rows.slots[:, None], slice(None), places)
    cache = Cache(cache.keys.at[index].set(k, mode="drop"), cache.values.at[index].set(v, mode="drop"))
    mask = jnp.arange(capacity, dtype=jnp.int32) <= positions[:, :, None]  # [R, T, S]
    keys, values = cache.keys[layer, rows.slots], cache.values[layer, rows.slots]  # [R, K, S, H]
    return softmax_attention(q, keys, values, mask, scale), cache


def _cpu_linear(x: Array, weights: Sequence[Array], layer: Array, used: Array) -> list[Array]:
    results = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype) for w in weights]
    return list(jax.ffi.ffi_call("precast.matmul.v1", results)(x, layer, used, *weights))


def _cpu_attention(
    q: Array, k: Array, v: Array, cache: Cache, layer: Array, rows: Rows, scale: float
) -> tuple[Array, Cache]:
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, cache.keys, cache.values)]
    call = jax.ffi.ffi_call("precast.attention.v1", results, input_output_aliases={3: 1, 4: 2})
    out, keys, values = call(
        q,
        k,
        v,
        cache.keys,
        cache.values,
        layer,
        rows.slots,
        rows.starts,
        rows.lengths,
        scale=np.float32(scale),
    )
    return out, Cache(keys, values)


def _xla_empty_cache(shape: tuple[int, ...]) -> Cache:
    # Masked positions are multiplied by zero here, and zero times what happens to lie in memory may be NaN.
    return Cache(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def _cpu_empty_cache(shape: tuple[int, ...]) -> Cache:
    # The kernels never read an unfilled position: memory is reserved, and not touched until it is filled.
    results = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2
    return Cache(*jax.ffi.ffi_call("precast.reserve.v1", results)())


XLA_OPS = Ops(linear=_xla_linear, attention=_xla_attention, empty_cache=_xla_empty_cache)
CPU_OPS = Ops(
    linear=_cpu_linear,
    attention=_cpu_attention,
    empty_cache=_cpu_empty_cache,
    kernels=("precast.attention.v1", "precast.matmul.v1", "precast.reserve.v1"),
)
