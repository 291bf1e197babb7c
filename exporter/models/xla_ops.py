"""The maths of every operation in pure XLA.

`xla_ops` builds the operations for a compute type. The operands of matrix products are rounded to the compute type;
sums, norms, softmax and logits are float32 throughout.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..block_formats import BLOCK_FORMATS, GROUP, PANEL, UNIT
from ..scales import INT4_ZERO
from .ops import (
    AttentionParams,
    Batch,
    ExpertsCall,
    KVCache,
    KVCaches,
    LayerOps,
    LayerStack,
    LinearCall,
    MixedWeight,
    NormCall,
    Ops,
    PackedWeight,
    Rotary,
    Weight,
)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Apply root mean square normalisation (Zhang and Sennrich 2019) to the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * weight


GATES: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def _layer_slice(stack: Array, layer: Array) -> Array:
    # XLA copies a slice whose index is not a constant. In a stack of one, the constant index 0 avoids the copy.
    return stack[0] if len(stack) == 1 else stack[layer]


def _panels(weight: PackedWeight | MixedWeight, layer: Array, panels: Array | None = None) -> Array:
    """Return a layer's weights as float32 ``[P, 16, I]``: P panels of 16 outputs and I inputs, including the padding.

    Args:
        weight: the weights of all layers.
        layer: index of the layer.
        panels: indices of the panels to return; None for all.
    """
    if isinstance(weight, MixedWeight):
        return _mixed_panels(weight, layer, panels)
    return _packed_panels(weight, layer, panels)


def _packed_panels(weight: PackedWeight, layer: Array, panels: Array | None) -> Array:

    def take(stack: Array) -> Array:
        return _layer_slice(stack, layer) if panels is None else _layer_slice(stack, layer)[panels]

    values = take(weight.values)  # [P, I / 2, 16, 2] or [P, I / 8, 16, 4]
    if is_int4 := values.dtype == jnp.uint8:
        nibbles = jnp.stack([values & 15, values >> 4], axis=2)  # [P, I / 8, 2, 16, 4]
        values = nibbles.reshape(values.shape[0], -1, *values.shape[2:])  # [P, I / 4, 16, 4]
    matrix = jnp.swapaxes(values, 1, 2).reshape(values.shape[0], values.shape[2], -1)  # [P, 16, I]
    groups = matrix.astype(jnp.float32).reshape(*matrix.shape[:2], -1, GROUP)  # [P, 16, I / 32, 32]
    scale = jnp.swapaxes(take(weight.scale), 1, 2).astype(jnp.float32)[..., None]
    if is_int4 and weight.minimum is None:
        groups = groups - INT4_ZERO
    groups = groups * scale
    if weight.minimum is not None:
        groups = groups + jnp.swapaxes(take(weight.minimum), 1, 2).astype(jnp.float32)[..., None]
    return groups.reshape(matrix.shape)


def _mixed_panels(weight: MixedWeight, layer: Array, panels: Array | None) -> Array:
    choices = tuple(dict.fromkeys(weight.formats))
    branches = [partial(_dequantise_records, weight, name, panels) for name in choices]
    if len(weight.formats) == 1:
        return branches[0](jnp.int32(0))
    unit = weight.table[layer, 1]
    if len(choices) == 1:
        return branches[0](unit)
    chosen = jnp.array([choices.index(name) for name in weight.formats])[layer]
    matrix: Array = jax.lax.switch(chosen, branches, unit)
    return matrix


def _dequantise_records(weight: MixedWeight, name: str, panels: Array | None, unit: Array) -> Array:
    """Dequantise the matrix, in the block format `name`, that begins at this unit of a mixed weight."""
    stored = BLOCK_FORMATS[name]
    units = stored.matrix_bytes(weight.outs, weight.inputs) // UNIT
    # In a stack of one, the whole array is the matrix, which XLA need not copy.
    own = (
        weight.values
        if len(weight.formats) == 1
        else jax.lax.dynamic_slice_in_dim(weight.values, unit, units)
    )
    records = own.reshape(-1, stored.record_bytes(weight.inputs))
    matrix: Array = stored.dequantise(records if panels is None else records[panels], weight.inputs)
    return matrix


def _layer_matrix(weight: Weight, layer: Array, outs: int, inputs: int, compute: str) -> Array:
    """Return a layer's weights ``[out, in]`` in the compute type."""
    if isinstance(weight, Array):
        return _layer_slice(weight, layer).astype(compute)
    panels = _panels(weight, layer).astype(compute)
    return panels.reshape(-1, panels.shape[-1])[:outs, :inputs]


def _product(axes: str, a: Array, b: Array, compute: str) -> Array:
    """Return a float32 einsum of operands rounded to `compute`."""
    return jnp.einsum(axes, a.astype(compute), b.astype(compute), preferred_element_type=jnp.float32)


def _multiply(x: Array, matrix: Array, compute: str) -> Array:
    """Multiply x ``[M, in]`` by the transpose of a matrix ``[out, in]``; return ``[M, out]``."""
    if compute == "float32" or x.shape[0] > 1:
        return _product("MI,OI->MO", x, matrix, compute)
    # With a single row, a GPU spends its time reading the matrix. XLA fuses this sum with the read from the stack of
    # layers. For a dot product, XLA would first copy the layer's matrix and so move three times as many bytes.
    return jnp.sum(matrix.astype(jnp.float32) * x.astype(compute).astype(jnp.float32), axis=-1)[None]


def _linear(compute: str, x: Array, call: LinearCall, layer: Array, used: Array) -> list[Array]:
    if call.norm is not None:
        x = rms_norm(x, call.norm[layer], call.eps)
    weights = zip(call.weights, call.outs, strict=True)
    matrices = [_layer_matrix(w, layer, n, x.shape[1], compute) for w, n in weights]
    results = [_multiply(x, matrix, compute) for matrix in matrices]
    if call.biases:
        results = [y + bias[layer] for y, bias in zip(results, call.biases, strict=True)]
    if call.gate:
        gated = GATES[call.gate](results[0])
        results = [gated * results[1] if len(results) == 2 else gated]
    if call.residual is not None:
        results = [results[0] + call.residual]
    return results


def _normalize(x: Array, call: NormCall, layer: Array) -> Array:
    pieces = x.reshape(*x.shape[:-1], -1, call.width)
    if call.bias is None:
        y = rms_norm(pieces, call.weight[layer], call.eps)
    else:
        centred = pieces - jnp.mean(pieces, axis=-1, keepdims=True)
        y = rms_norm(centred, call.weight[layer], call.eps) + call.bias[layer]
    y = y.reshape(x.shape)
    return y if call.residual is None else y + call.residual


def routing_weights(scores: Array, experts_per_token: int, *, renormalised: bool) -> Array:
    """Return the weight ``[M, E]`` of each expert in each row for scores ``[M, E]``; 0 for experts that a row skips."""
    probabilities = jax.nn.softmax(scores, axis=-1)
    best, experts = jax.lax.top_k(probabilities, experts_per_token)  # [M, experts of a row]
    if renormalised:
        best = best / jnp.sum(best, axis=-1, keepdims=True)
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.zeros_like(scores).at[rows, experts].set(best)


def _experts(compute: str, x: Array, scores: Array, call: ExpertsCall, layer: Array, used: Array) -> Array:
    if call.norm is not None:
        x = rms_norm(x, call.norm[layer], call.eps)
    parts = routing_weights(scores, call.experts_per_token, renormalised=call.renormalised)
    width = x.shape[1]

    # Every row goes through every expert, because XLA's shapes are static and cannot depend on the routing.
    def add(expert: Array, total: Array) -> Array:
        at = layer * call.experts + expert
        gate, up = (
            _layer_matrix(w, at, call.ff_width, width, compute) for w in (call.gate, call.up)
        )  # [F, D]
        opened = GATES[call.activation](_product("MD,FD->MF", x, gate, compute))
        gated = opened * _product("MD,FD->MF", x, up, compute)
        down = _layer_matrix(call.down, at, width, call.ff_width, compute)  # [D, F]
        return total + parts[:, expert, None] * _product("MF,DF->MD", gated, down, compute)

    total: Array = jax.lax.fori_loop(0, call.experts, add, jnp.zeros_like(x))
    return total if call.residual is None else total + call.residual


def _embed(tokens: Array, weight: Weight, vocab: int, width: int) -> Array:
    if isinstance(weight, Array):
        return weight[0][tokens].astype(jnp.float32)
    panels = _panels(weight, jnp.int32(0), tokens // PANEL)  # [M, 16, in]
    return jnp.take_along_axis(panels, (tokens % PANEL)[:, None, None], axis=1)[:, 0, :width]


def rotate(x: Array, rotary: Rotary) -> Array:
    """Apply RoPE to x ``[R, T, N, H]``: rotate the P pairs (i, i + P) of each head; copy all other dimensions."""
    pairs = rotary.cos.shape[-1]
    first, second, rest = jnp.split(x, [pairs, 2 * pairs], axis=-1)
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def softmax_attention(
    q: Array, k: Array, v: Array, mask: Array, params: AttentionParams, compute: str = "float32"
) -> Array:
    """Compute grouped-query attention (Ainslie et al. 2023), with softmax in float32.

    Args:
        q: ``[B, T, N, H]``.
        k: ``[B, K, S, H]``.
        v: ``[B, K, S, H]``.
        mask: ``[B, T, S]``, true if the token attends to the position.
        params: scale and cap of the scores; `mask` already applies the window.
        compute: type to which the operands of the matrix products are rounded.

    Returns:
        ``[B, T, N, H]`` float32.
    """
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[1], n // k.shape[1], h)  # [B, T, K, G, H]
    scores = _product("BTKGH,BKSH->BKGTS", grouped, k, compute) * params.scale
    if params.soft_cap:
        scores = params.soft_cap * jnp.tanh(scores / params.soft_cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    out = _product("BKGTS,BKSH->BTKGH", jax.nn.softmax(scores, axis=-1), v, compute)
    return out.reshape(b, t, n, h)


def attention_mask(positions: Array, key_positions: Array, window: int | Array) -> Array:
    """Return the mask ``[R, T, S]`` of causal attention.

    Args:
        positions: positions of the tokens, ``[R, T]``.
        key_positions: positions of the keys, ``[R, S]``; negative where the KV cache is empty.
        window: number of positions that a token attends to; 0 for all.
    """
    token, key = positions[:, :, None], key_positions[:, None, :]
    return (key >= 0) & (key <= token) & ((window == 0) | (key > token - window))


def _quantise(x: Array) -> tuple[Array, Array]:
    """Quantise rows ``[…, H]`` to int8 with scales ``[…]``."""
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
    divisor = jnp.where(scale == 0.0, 1.0, scale)[..., None]
    return jnp.round(x / divisor).astype(jnp.int8), scale


def round_to_cache(x: Array, dtype: str) -> Array:
    """Round keys or values ``[…, H]`` to the precision of a KV cache of type `dtype`; return float32."""
    if dtype == "int8":
        values, scale = _quantise(x)
        return values.astype(jnp.float32) * scale[..., None]
    return x.astype(dtype).astype(jnp.float32)


def _to_cache_dtype(cache: KVCache, k: Array, v: Array) -> KVCache:
    """Return keys and values converted to the cache's type."""
    if cache.key_scale is None:
        return KVCache(k.astype(cache.keys.dtype), v.astype(cache.values.dtype))
    (keys, key_scale), (values, value_scale) = _quantise(k), _quantise(v)
    return KVCache(keys, values, key_scale, value_scale)


def _read_cache(cache: KVCache, layer: Array, slots: Array, compute: str) -> tuple[Array, Array]:
    """Return a layer's keys and values in some slots, in the compute type, each ``[R, K, S, H]``."""

    def load(values: Array, scale: Array | None) -> Array:
        if scale is None:
            return values[layer, slots].astype(compute)
        floats = values[layer, slots].astype(jnp.float32)
        return (floats * scale[layer, slots][..., None]).astype(compute)

    return load(cache.keys, cache.key_scale), load(cache.values, cache.value_scale)


def _attention(
    compute: str,
    q: Array,
    k: Array,
    v: Array,
    rotary: Rotary,
    cache: KVCache,
    layer: Array,
    batch: Batch,
    params: AttentionParams,
) -> tuple[Array, KVCache]:
    cache = _append(cache, layer, batch, rotate(k, rotary), v)
    return _attend_cached(cache, layer, batch, rotate(q, rotary), params, compute), cache


def _append(
    cache: KVCache, layer: Array, batch: Batch, k: Array, v: Array, is_written: bool | Array = True
) -> KVCache:
    """Write keys and values ``[R, T, K, H]`` to the cache; leave the cache unchanged if `is_written` is false."""
    tokens, size = k.shape[1], cache.keys.shape[3]
    step = jnp.arange(tokens, dtype=jnp.int32)
    positions = batch.starts[:, None] + step  # [R, T]
    # Padding gets an index beyond the end of the cache, and the scatter drops such writes.
    places = jnp.where((step < batch.lengths[:, None]) & is_written, positions % size, size)
    index = (layer, batch.slots[:, None], slice(None), places)
    pairs = zip(cache.arrays(), _to_cache_dtype(cache, k, v).arrays(), strict=True)
    return KVCache.from_arrays([old.at[index].set(added, mode="drop") for old, added in pairs])


def _attend_cached(
    cache: KVCache, layer: Array, batch: Batch, q: Array, params: AttentionParams, compute: str
) -> Array:
    """Compute the attention of rotated queries ``[R, T, N, H]`` over the contents of a cache."""
    positions = batch.starts[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)  # [R, T]
    size = cache.keys.shape[3]
    # The newest position at each index of the ring buffer; negative if the cache is empty there.
    last = (batch.starts + batch.lengths - 1)[:, None]  # [R, 1]
    key_positions = last - (last - jnp.arange(size, dtype=jnp.int32)) % size  # [R, S]
    keys, values = _read_cache(cache, layer, batch.slots, compute)
    return softmax_attention(
        q, keys, values, attention_mask(positions, key_positions, params.window), params, compute
    )


def _argmax(logits: Array, used: Array) -> Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _each_row(function: Callable[[Array], Array], x: Array, used: Array) -> Array:
    return function(x)


def _empty_cache(arrays: Sequence[jax.ShapeDtypeStruct]) -> tuple[Array, ...]:
    # Attention multiplies masked positions by zero. Uninitialised memory may contain NaN, and NaN times zero is NaN.
    return tuple(jnp.zeros(a.shape, a.dtype) for a in arrays)


def layer_ops(
    ops: Ops, layer: Array, used: Array, attend: Callable[[Array, Array, Array], Array]
) -> LayerOps:
    """Bind a target's operations to one layer."""
    return LayerOps(
        project=lambda x, call: ops.linear(x, call, layer, used),
        normalize=lambda x, call: ops.normalize(x, call, layer),
        attend=attend,
        mix=lambda x, scores, call: ops.experts(x, scores, call, layer, used),
    )


def layer_rotary(ropes: Sequence[int], layer: Array, rotary: Rotary) -> Rotary:
    """Select a layer's cosines and sines ``[R, T, P]`` from those of all RoPEs ``[Z, R, T, P]``."""
    if len(rotary.cos) == 1:
        return Rotary(rotary.cos[0], rotary.sin[0])
    which = jnp.asarray(ropes, jnp.int32)[layer]
    return Rotary(rotary.cos[which], rotary.sin[which])


# The tuple (q, k, v, rotary, batch).
_AttentionInputs = tuple[Array, Array, Array, Rotary, Batch]
# A function that computes the attention of one layer: (stack, layer, caches, inputs) -> (out, caches).
_Attend = Callable[[LayerStack, Array, KVCaches, _AttentionInputs], tuple[Array, KVCaches]]


def layer_loop(
    ops: Callable[[], Ops], attend_several: _Attend | None = None
) -> Callable[[LayerStack, Array, Rotary, KVCaches, Batch, Array], tuple[Array, KVCaches]]:
    """Return a function for `Ops.layers` that runs the layers in an XLA loop.

    Args:
        ops: returns the target's operations, which the layers call.
        attend_several: the attention to use in a model with several KV caches; None for the target's own attention,
            which copies the caches.
    """

    def layers(
        stack: LayerStack, x: Array, rotary: Rotary, caches: KVCaches, batch: Batch, used: Array
    ) -> tuple[Array, KVCaches]:
        target = ops()
        own = partial(_attend, target)
        attend_layer = own if attend_several is None or len(caches) == 1 else attend_several

        def body(index: Array, carry: tuple[Array, KVCaches]) -> tuple[Array, KVCaches]:
            x, caches = carry
            # The kernels expect int32, but with JAX_ENABLE_X64 the loop counts in int64.
            layer = index.astype(jnp.int32)

            def attend(q: Array, k: Array, v: Array) -> Array:
                nonlocal caches
                out, caches = attend_layer(stack, layer, caches, (q, k, v, rotary, batch))
                return out

            return stack.layer(x, layer_ops(target, layer, used, attend)), caches

        result: tuple[Array, KVCaches] = jax.lax.fori_loop(0, stack.layers, body, (x, caches))
        return result

    return layers


def _cache_place(stack: LayerStack, layer: Array) -> tuple[Array, Array]:
    """Return the index of a layer's KV cache and the layer's index in that cache."""
    caches, places = zip(*stack.cache_places, strict=True)
    return jnp.asarray(caches, jnp.int32)[layer], jnp.asarray(places, jnp.int32)[layer]


def _attend(
    target: Ops, stack: LayerStack, layer: Array, caches: KVCaches, inputs: _AttentionInputs
) -> tuple[Array, KVCaches]:
    q, k, v, rotary, batch = inputs
    layer_table = layer_rotary(stack.ropes, layer, rotary)
    cache_index, place = (None, layer) if len(caches) == 1 else _cache_place(stack, layer)

    def run(number: int, caches: KVCaches) -> tuple[Array, KVCaches]:
        out, cache = target.attention(
            q, k, v, layer_table, caches[number], place, batch, stack.attention_params(number)
        )
        return out, (*caches[:number], cache, *caches[number + 1 :])

    if cache_index is None:
        return run(0, caches)
    result: tuple[Array, KVCaches] = jax.lax.switch(
        cache_index, [partial(run, number) for number in range(len(caches))], caches
    )
    return result


def _attend_in_place(
    compute: str, stack: LayerStack, layer: Array, caches: KVCaches, inputs: _AttentionInputs
) -> tuple[Array, KVCaches]:
    """Compute the attention of a layer in a model with several KV caches, without copying the caches.

    XLA would copy every cache that a switch returns, so the switch only reads caches. Before the switch, the keys and
    values are written to all caches. For the caches of other layers, the indices are out of range, so XLA drops the
    writes.
    """
    q, k, v, rotary, batch = inputs
    layer_table = layer_rotary(stack.ropes, layer, rotary)
    q, k = rotate(q, layer_table), rotate(k, layer_table)
    cache_index, place = _cache_place(stack, layer)
    caches = tuple(
        _append(cache, jnp.minimum(place, len(cache.keys) - 1), batch, k, v, cache_index == number)
        for number, cache in enumerate(caches)
    )

    def read(number: int, caches: KVCaches) -> Array:
        return _attend_cached(caches[number], place, batch, q, stack.attention_params(number), compute)

    out: Array = jax.lax.switch(cache_index, [partial(read, number) for number in range(len(caches))], caches)
    return out, caches


def xla_ops(compute: str) -> Ops:
    """Return XLA's operations for a compute type, "float32" or "bfloat16"."""
    ops = Ops(
        linear=partial(_linear, compute),
        normalize=_normalize,
        experts=partial(_experts, compute),
        embed=_embed,
        attention=partial(_attention, compute),
        layers=layer_loop(lambda: ops, partial(_attend_in_place, compute)),
        argmax=_argmax,
        each_row=_each_row,
        empty_cache=_empty_cache,
    )
    return ops


XLA_OPS = xla_ops("float32")
