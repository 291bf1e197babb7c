"""The maths of every operation in pure XLA."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from ..quantize import GROUP, PANEL
from .ops import Cache, LinearCall, Ops, Packed, Rotary, Rows, Stack, Weight


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root mean square normalisation (Zhang and Sennrich 2019) of the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * weight


GATES: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def _at(stack: Array, layer: Array) -> Array:
    # The only entry of a stack is taken as it lies; XLA copies what is sliced at an index it does not know.
    return stack[0] if len(stack) == 1 else stack[layer]


def _unpacked_rows(weight: Packed, layer: Array, panels: Array | None = None) -> Array:
    """Weights of a layer as float32 ``[panels, 16, in]``, padding included; of some panels, or of all."""

    def take(stack: Array) -> Array:
        return _at(stack, layer) if panels is None else _at(stack, layer)[panels]

    values = take(weight.values)  # [P, I / 2, 16, 2] or [P, I / 8, 16, 4]
    if weight.minimum is not None:
        nibbles = jnp.stack([values & 15, values >> 4], axis=2)  # [P, I / 8, 2, 16, 4]
        values = nibbles.reshape(values.shape[0], -1, *values.shape[2:])  # [P, I / 4, 16, 4]
    matrix = jnp.swapaxes(values, 1, 2).reshape(values.shape[0], values.shape[2], -1)  # [P, 16, I]
    groups = matrix.astype(jnp.float32).reshape(*matrix.shape[:2], -1, GROUP)  # [P, 16, I / 32, 32]
    scale = jnp.swapaxes(take(weight.scale), 1, 2).astype(jnp.float32)[..., None]
    groups = groups * scale
    if weight.minimum is not None:
        groups = groups + jnp.swapaxes(take(weight.minimum), 1, 2).astype(jnp.float32)[..., None]
    return groups.reshape(matrix.shape)


def _matrix(weight: Weight, layer: Array, outs: int, inputs: int) -> Array:
    """A layer's weights as float32 ``[out, in]``."""
    if not isinstance(weight, Packed):
        return _at(weight, layer).astype(jnp.float32)
    panels = _unpacked_rows(weight, layer)
    return panels.reshape(-1, panels.shape[-1])[:outs, :inputs]


def _linear(x: Array, call: LinearCall, layer: Array, used: Array) -> list[Array]:
    if call.norm is not None:
        x = rms_norm(x, call.norm[layer], call.eps)
    matrices = [_matrix(w, layer, n, x.shape[1]) for w, n in zip(call.weights, call.outs, strict=True)]
    results = [jnp.einsum("MI,OI->MO", x, matrix) for matrix in matrices]
    if call.biases:
        results = [y + bias[layer] for y, bias in zip(results, call.biases, strict=True)]
    if call.gate:
        results = [GATES[call.gate](results[0]) * results[1]]
    if call.residual is not None:
        results = [results[0] + call.residual]
    return results


def _embed(tokens: Array, weight: Weight, vocab: int, width: int) -> Array:
    if not isinstance(weight, Packed):
        return weight[0][tokens].astype(jnp.float32)
    panels = _unpacked_rows(weight, jnp.int32(0), tokens // PANEL)  # [M, 16, in]
    return jnp.take_along_axis(panels, (tokens % PANEL)[:, None, None], axis=1)[:, 0, :width]


def rotate(x: Array, rotary: Rotary) -> Array:
    """RoPE on halves: x ``[R, T, N, H]``."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


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


def _quantized(x: Array) -> tuple[Array, Array]:
    """Rows ``[…, H]`` as int8, and their scales ``[…]``."""
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
    divisor = jnp.where(scale == 0.0, 1.0, scale)[..., None]
    return jnp.round(x / divisor).astype(jnp.int8), scale


def as_cached(x: Array, kind: str) -> Array:
    """Keys or values ``[…, H]`` as a cache of this type gives them back, in float32."""
    if kind == "int8":
        values, scale = _quantized(x)
        return values.astype(jnp.float32) * scale[..., None]
    return x.astype(kind).astype(jnp.float32)


def _stored(cache: Cache, k: Array, v: Array) -> Cache:
    """Keys and values as the cache keeps them."""
    if cache.key_scale is None:
        return Cache(k.astype(cache.keys.dtype), v.astype(cache.values.dtype))
    (keys, key_scale), (values, value_scale) = _quantized(k), _quantized(v)
    return Cache(keys, values, key_scale, value_scale)


def _loaded(cache: Cache, layer: Array, slots: Array) -> tuple[Array, Array]:
    """Keys and values of some slots in float32, each ``[R, K, S, H]``."""

    def load(values: Array, scale: Array | None) -> Array:
        floats = values[layer, slots].astype(jnp.float32)
        return floats if scale is None else floats * scale[layer, slots][..., None]

    return load(cache.keys, cache.key_scale), load(cache.values, cache.value_scale)


def _attention(
    q: Array, k: Array, v: Array, rotary: Rotary, cache: Cache, layer: Array, rows: Rows, scale: float
) -> tuple[Array, Cache]:
    q, k = rotate(q, rotary), rotate(k, rotary)
    tokens, capacity = q.shape[1], cache.keys.shape[3]
    step = jnp.arange(tokens, dtype=jnp.int32)
    positions = rows.starts[:, None] + step  # [R, T]
    # Padding goes to a position that does not exist, and is dropped there.
    places = jnp.where(step < rows.lengths[:, None], positions, capacity)
    index = (layer, rows.slots[:, None], slice(None), places)
    new = _stored(cache, k, v)
    pairs = zip(cache.arrays(), new.arrays(), strict=True)
    cache = Cache.of([old.at[index].set(added, mode="drop") for old, added in pairs])
    mask = jnp.arange(capacity, dtype=jnp.int32) <= positions[:, :, None]  # [R, T, S]
    keys, values = _loaded(cache, layer, rows.slots)
    return softmax_attention(q, keys, values, mask, scale), cache


def _empty_cache(arrays: Sequence[jax.ShapeDtypeStruct]) -> tuple[Array, ...]:
    # Masked positions are multiplied by zero here, and zero times what happens to lie in memory may be NaN.
    return tuple(jnp.zeros(a.shape, a.dtype) for a in arrays)


def looped(
    linear: Callable[[Array, LinearCall, Array, Array], list[Array]],
    attention: Callable[[Array, Array, Array, Rotary, Cache, Array, Rows, float], tuple[Array, Cache]],
) -> Callable[[Stack, Array, Rotary, Cache, Rows, Array], tuple[Array, Cache]]:
    """Layers as a loop of XLA's around a target's products and attention."""

    def layers(
        stack: Stack, x: Array, rotary: Rotary, cache: Cache, rows: Rows, used: Array
    ) -> tuple[Array, Cache]:
        def body(index: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
            x, cache = carry
            # As the kernels take it: where JAX_ENABLE_X64 is set, loops count in int64.
            layer = index.astype(jnp.int32)

            def attend(q: Array, k: Array, v: Array) -> Array:
                nonlocal cache
                out, cache = attention(q, k, v, rotary, cache, layer, rows, stack.scale)
                return out

            x = stack.layer(x, attend, lambda x, call: linear(x, call, layer, used))
            return x, cache

        return jax.lax.fori_loop(0, stack.layers, body, (x, cache))

    return layers


XLA_OPS = Ops(
    linear=_linear,
    embed=_embed,
    attention=_attention,
    layers=looped(_linear, _attention),
    empty_cache=_empty_cache,
)
