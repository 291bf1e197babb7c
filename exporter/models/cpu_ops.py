"""The operations computed by precast's kernels; kernels/src documents the operands of each call."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .ops import (
    AttentionParams,
    Batch,
    ExpertsCall,
    KVCache,
    KVCaches,
    LayerStack,
    LinearCall,
    MixedWeight,
    NormCall,
    Ops,
    PackedWeight,
    Rotary,
    Weight,
)
from .steps import record
from .xla_ops import XLA_OPS


def _operands(weight: Weight) -> list[Array]:
    """Return a weight as operands of a kernel."""
    if isinstance(weight, MixedWeight):
        return [weight.values, weight.table]
    return [weight] if not isinstance(weight, PackedWeight) else [a for a in weight if a is not None]


def _optional(array: Array | None) -> list[Array]:
    return [] if array is None else [array]


def _weights(call: LinearCall) -> list[Array]:
    """Return each weight of a call, followed by its bias, if any."""
    operands = []
    for i, weight in enumerate(call.weights):
        operands += [*_operands(weight), *call.biases[i : i + 1]]
    return operands


def _linear(x: Array, call: LinearCall, layer: Array, used: Array) -> list[Array]:
    results = [jax.ShapeDtypeStruct((x.shape[0], n), x.dtype) for n in call.results]
    target = jax.ffi.ffi_call("precast.linear.v1", results)
    return list(
        target(
            x,
            layer,
            used,
            *_optional(call.norm),
            *_optional(call.residual),
            *_weights(call),
            norm=call.norm is not None,
            eps=np.float32(call.eps),
            residual=call.residual is not None,
            bias=bool(call.biases),
            gate=call.gate,
        )
    )


def _embed(tokens: Array, weight: Weight, vocab: int, width: int) -> Array:
    result = jax.ShapeDtypeStruct((tokens.shape[0], width), jnp.float32)
    target = jax.ffi.ffi_call("precast.embed.v1", result)
    return target(tokens, *_operands(weight), vocab=np.int64(vocab))


def _attention(
    q: Array,
    k: Array,
    v: Array,
    rotary: Rotary,
    cache: KVCache,
    layer: Array,
    batch: Batch,
    params: AttentionParams,
) -> tuple[Array, KVCache]:
    arrays = cache.arrays()
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, *arrays)]
    aliases = {5 + i: 1 + i for i in range(len(arrays))}
    target = jax.ffi.ffi_call("precast.attention.v2", results, input_output_aliases=aliases)
    out, *caches = target(
        q,
        k,
        v,
        *rotary,
        *arrays,
        layer,
        *batch,
        scale=np.float32(params.scale),
        window=np.int64(params.window),
        soft_cap=np.float32(params.soft_cap),
    )
    return out, KVCache.from_arrays(caches)


def _argmax(logits: Array, used: Array) -> Array:
    result = jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32)
    chosen: Array = jax.ffi.ffi_call("precast.argmax.v2", result)(logits, used)
    return chosen


def _each_row(function: Callable[[Array], Array], x: Array, used: Array) -> Array:
    # In a loop over rows, idle rows cost nothing, and XLA computes a row in the same way for any number of rows.
    def apply(index: Array, y: Array) -> Array:
        row = index.astype(jnp.uint32)  # unsigned for the reason given in `decoder.gather_rows`
        done = function(jax.lax.dynamic_slice_in_dim(y, row, 1))
        return jax.lax.dynamic_update_slice_in_dim(y, done, row, 0)

    result: Array = jax.lax.fori_loop(0, used, apply, x)
    return result


def _empty_cache(arrays: Sequence[jax.ShapeDtypeStruct]) -> tuple[Array, ...]:
    # The kernels never read an unfilled position, so the memory is only reserved and not cleared.
    return tuple(jax.ffi.ffi_call("precast.reserve.v1", list(arrays))())


def _step_operands(call: LinearCall | NormCall | ExpertsCall) -> list[Array]:
    """Return the weights of a step for all layers, as operands of ``precast.layers``."""
    match call:
        case LinearCall():
            return [*_optional(call.norm), *_weights(call)]
        case NormCall():
            return [call.weight, *_optional(call.bias)]
        case ExpertsCall():
            matrices = (array for weight in (call.gate, call.up, call.down) for array in _operands(weight))
            return [*_optional(call.norm), *matrices]


def _layers(
    stack: LayerStack, x: Array, rotary: Rotary, caches: KVCaches, batch: Batch, used: Array
) -> tuple[Array, KVCaches]:
    steps = record(stack, x.shape)
    arrays = [array for cache in caches for array in cache.arrays()]
    flat = x.reshape(-1, x.shape[-1])
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (flat, *arrays)]
    aliases = {4 + i: 1 + i for i in range(len(arrays))}
    target = jax.ffi.ffi_call("precast.layers.v2", results, input_output_aliases=aliases)
    y, *after = target(
        flat,
        used,
        *rotary,
        *arrays,
        *batch,
        *(operand for call in steps.calls for operand in _step_operands(call)),
        heads=np.array(stack.heads, np.int64),
        windows=np.array(stack.windows, np.int64),
        ropes=np.array(stack.ropes, np.int64),
        steps=np.array(steps.codes, np.int64),
        outs=np.array(steps.outs, np.int64),
        numbers=np.array(steps.numbers, np.float32),
    )
    each = len(after) // len(caches)
    return y.reshape(x.shape), tuple(
        KVCache.from_arrays(after[i : i + each]) for i in range(0, len(after), each)
    )


CPU_OPS = Ops(
    linear=_linear,
    normalize=XLA_OPS.normalize,
    experts=XLA_OPS.experts,
    embed=_embed,
    attention=_attention,
    layers=_layers,
    argmax=_argmax,
    each_row=_each_row,
    empty_cache=_empty_cache,
    kernels=(
        "precast.argmax.v2",
        "precast.embed.v1",
        "precast.layers.v2",
        "precast.linear.v1",
        "precast.reserve.v1",
    ),
)
