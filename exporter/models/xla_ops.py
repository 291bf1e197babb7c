"""The maths of every operation in pure XLA.

`xla_ops` makes the operations for a type: the factors of every product are rounded to it, and what is added up is
float32 throughout, as are norms, softmax and logits.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..quantize import GROUP, PANEL
from .ops import (
    Attending,
    Calls,
    ExpertsCall,
    KVCache,
    KVCaches,
    LinearCall,
    NormCall,
    Ops,
    Packed,
    Rotary,
    Rows,
    Stack,
    Weight,
)


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


def _matrix(weight: Weight, layer: Array, outs: int, inputs: int, compute: str) -> Array:
    """A layer's weights ``[out, in]``, as a product takes them."""
    if not isinstance(weight, Packed):
        return _at(weight, layer).astype(compute)
    panels = _unpacked_rows(weight, layer).astype(compute)
    return panels.reshape(-1, panels.shape[-1])[:outs, :inputs]


def _product(axes: str, a: Array, b: Array, compute: str) -> Array:
    """An einsum in float32 of factors rounded to `compute`."""
    return jnp.einsum(axes, a.astype(compute), b.astype(compute), preferred_element_type=jnp.float32)


def _times(x: Array, matrix: Array, compute: str) -> Array:
    """x ``[M, in]`` times a matrix ``[out, in]``, as ``[M, out]``."""
    if compute == "float32" or x.shape[0] > 1:
        return _product("MI,OI->MO", x, matrix, compute)
    # Of a single row GPUs are bound by the bytes of the matrix. XLA reads what it adds up right out of the stack of
    # layers; for a dot it copies the layer's matrix out first, which makes three times the bytes.
    return jnp.sum(matrix.astype(jnp.float32) * x.astype(compute).astype(jnp.float32), axis=-1)[None]


def _linear(compute: str, x: Array, call: LinearCall, layer: Array, used: Array) -> list[Array]:
    if call.norm is not None:
        x = rms_norm(x, call.norm[layer], call.eps)
    weights = zip(call.weights, call.outs, strict=True)
    matrices = [_matrix(w, layer, n, x.shape[1], compute) for w, n in weights]
    results = [_times(x, matrix, compute) for matrix in matrices]
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


def shares(scores: Array, chosen: int, *, renormalised: bool) -> Array:
    """What each row takes of each expert's result: scores ``[M, E]`` to ``[M, E]``, zero for those not chosen."""
    probabilities = jax.nn.softmax(scores, axis=-1)
    best, experts = jax.lax.top_k(probabilities, chosen)  # [M, chosen]
    if renormalised:
        best = best / jnp.sum(best, axis=-1, keepdims=True)
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.zeros_like(scores).at[rows, experts].set(best)


def _experts(compute: str, x: Array, scores: Array, call: ExpertsCall, layer: Array, used: Array) -> Array:
    if call.norm is not None:
        x = rms_norm(x, call.norm[layer], call.eps)
    parts = shares(scores, call.chosen, renormalised=call.renormalised)
    width = x.shape[1]

    # Every row goes through every expert: without kernels, shapes cannot depend on who is chosen.
    def add(expert: Array, total: Array) -> Array:
        at = layer * call.experts + expert
        gate, up = (_matrix(w, at, call.ff_width, width, compute) for w in (call.gate, call.up))  # [F, D]
        opened = GATES[call.activation](_product("MD,FD->MF", x, gate, compute))
        gated = opened * _product("MD,FD->MF", x, up, compute)
        down = _matrix(call.down, at, width, call.ff_width, compute)  # [D, F]
        return total + parts[:, expert, None] * _product("MF,DF->MD", gated, down, compute)

    total = jax.lax.fori_loop(0, call.experts, add, jnp.zeros_like(x))
    return total if call.residual is None else total + call.residual


def _embed(tokens: Array, weight: Weight, vocab: int, width: int) -> Array:
    if not isinstance(weight, Packed):
        return weight[0][tokens].astype(jnp.float32)
    panels = _unpacked_rows(weight, jnp.int32(0), tokens // PANEL)  # [M, 16, in]
    return jnp.take_along_axis(panels, (tokens % PANEL)[:, None, None], axis=1)[:, 0, :width]


def rotate(x: Array, rotary: Rotary) -> Array:
    """RoPE on halves: x ``[R, T, N, H]``, of which the first 2 P numbers are turned."""
    pairs = rotary.cos.shape[-1]
    first, second, rest = jnp.split(x, [pairs, 2 * pairs], axis=-1)
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def softmax_attention(
    q: Array, k: Array, v: Array, mask: Array, how: Attending, compute: str = "float32"
) -> Array:
    """Grouped-query attention (Ainslie et al. 2023), softmax in float32.

    Args:
        q: ``[B, T, N, H]``.
        k: ``[B, K, S, H]``.
        v: ``[B, K, S, H]``.
        mask: ``[B, T, S]``, true where a token sees a position.
        how: what becomes of scores; its window is the mask's business.
        compute: what factors are rounded to.

    Returns:
        ``[B, T, N, H]`` float32.
    """
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[1], n // k.shape[1], h)  # [B, T, K, G, H]
    scores = _product("BTKGH,BKSH->BKGTS", grouped, k, compute) * how.scale
    if how.soft_cap:
        scores = how.soft_cap * jnp.tanh(scores / how.soft_cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    out = _product("BKGTS,BKSH->BTKGH", jax.nn.softmax(scores, axis=-1), v, compute)
    return out.reshape(b, t, n, h)


def sees(positions: Array, held: Array, window: int | Array) -> Array:
    """Which token sees what: positions ``[R, T]`` and those of the keys ``[R, S]``, to ``[R, T, S]``."""
    token, key = positions[:, :, None], held[:, None, :]
    return (key >= 0) & (key <= token) & ((window == 0) | (key > token - window))


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


def _stored(cache: KVCache, k: Array, v: Array) -> KVCache:
    """Keys and values as the cache keeps them."""
    if cache.key_scale is None:
        return KVCache(k.astype(cache.keys.dtype), v.astype(cache.values.dtype))
    (keys, key_scale), (values, value_scale) = _quantized(k), _quantized(v)
    return KVCache(keys, values, key_scale, value_scale)


def _loaded(cache: KVCache, layer: Array, slots: Array, compute: str) -> tuple[Array, Array]:
    """Keys and values of some slots as a product takes them, each ``[R, K, S, H]``."""

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
    rows: Rows,
    how: Attending,
) -> tuple[Array, KVCache]:
    cache = _append(cache, layer, rows, rotate(k, rotary), v)
    return _attend_to(cache, layer, rows, rotate(q, rotary), how, compute), cache


def _append(
    cache: KVCache, layer: Array, rows: Rows, k: Array, v: Array, written: bool | Array = True
) -> KVCache:
    """The cache with keys and values ``[R, T, K, H]`` at their places, or as it was where `written` is false."""
    tokens, size = k.shape[1], cache.keys.shape[3]
    step = jnp.arange(tokens, dtype=jnp.int32)
    positions = rows.starts[:, None] + step  # [R, T]
    # Padding goes to a place that does not exist, and is dropped there.
    places = jnp.where((step < rows.lengths[:, None]) & written, positions % size, size)
    index = (layer, rows.slots[:, None], slice(None), places)
    pairs = zip(cache.arrays(), _stored(cache, k, v).arrays(), strict=True)
    return KVCache.of([old.at[index].set(added, mode="drop") for old, added in pairs])


def _attend_to(cache: KVCache, layer: Array, rows: Rows, q: Array, how: Attending, compute: str) -> Array:
    """Attention of turned queries ``[R, T, N, H]`` to what a cache holds."""
    positions = rows.starts[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)  # [R, T]
    size = cache.keys.shape[3]
    # The newest position that can stand at each place; below 0 there is none yet.
    last = (rows.starts + rows.lengths - 1)[:, None]  # [R, 1]
    held = last - (last - jnp.arange(size, dtype=jnp.int32)) % size  # [R, S]
    keys, values = _loaded(cache, layer, rows.slots, compute)
    return softmax_attention(q, keys, values, sees(positions, held, how.window), how, compute)


def _argmax(logits: Array) -> Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _empty_cache(arrays: Sequence[jax.ShapeDtypeStruct]) -> tuple[Array, ...]:
    # Masked positions are multiplied by zero here, and zero times what happens to lie in memory may be NaN.
    return tuple(jnp.zeros(a.shape, a.dtype) for a in arrays)


def layer_calls(ops: Ops, layer: Array, used: Array, attend: Callable[[Array, Array, Array], Array]) -> Calls:
    """A target's operations for one layer."""
    return Calls(
        project=lambda x, call: ops.linear(x, call, layer, used),
        normalize=lambda x, call: ops.normalize(x, call, layer),
        attend=attend,
        mix=lambda x, scores, call: ops.experts(x, scores, call, layer, used),
    )


def at_layer(ropes: Sequence[int], layer: Array, rotary: Rotary) -> Rotary:
    """The table ``[R, T, P]`` of a layer, of ``[Z, R, T, P]``."""
    if len(rotary.cos) == 1:
        return Rotary(rotary.cos[0], rotary.sin[0])
    which = jnp.asarray(ropes, jnp.int32)[layer]
    return Rotary(rotary.cos[which], rotary.sin[which])


# Attention of one layer with the cache that is its:
# (stack, layer, caches, (q, k, v, rotary, rows)) -> (out, caches).
_Given = tuple[Array, Array, Array, Rotary, Rows]
_Attend = Callable[[Stack, Array, KVCaches, _Given], tuple[Array, KVCaches]]


def looped(
    ops: Callable[[], Ops], attend_one: _Attend | None = None
) -> Callable[[Stack, Array, Rotary, KVCaches, Rows, Array], tuple[Array, KVCaches]]:
    """Layers as a loop of XLA's around a target's other operations, which `ops` returns.

    Args:
        attend_one: attention of a layer where layers have several caches; None for the target's own, of which XLA
            copies the caches.
    """

    def layers(
        stack: Stack, x: Array, rotary: Rotary, caches: KVCaches, rows: Rows, used: Array
    ) -> tuple[Array, KVCaches]:
        target = ops()
        one = partial(_attend, target) if attend_one is None or len(caches) == 1 else attend_one

        def body(index: Array, carry: tuple[Array, KVCaches]) -> tuple[Array, KVCaches]:
            x, caches = carry
            # As the kernels take it: where JAX_ENABLE_X64 is set, loops count in int64.
            layer = index.astype(jnp.int32)

            def attend(q: Array, k: Array, v: Array) -> Array:
                nonlocal caches
                out, caches = one(stack, layer, caches, (q, k, v, rotary, rows))
                return out

            return stack.layer(x, layer_calls(target, layer, used, attend)), caches

        return jax.lax.fori_loop(0, stack.layers, body, (x, caches))

    return layers


def _group_and_place(stack: Stack, layer: Array) -> tuple[Array, Array]:
    """Which cache is a layer's, and which layer of that cache it is."""
    groups, places = zip(*stack.places, strict=True)
    return jnp.asarray(groups, jnp.int32)[layer], jnp.asarray(places, jnp.int32)[layer]


def _attend(
    target: Ops, stack: Stack, layer: Array, caches: KVCaches, given: _Given
) -> tuple[Array, KVCaches]:
    q, k, v, rotary, rows = given
    turned = at_layer(stack.ropes, layer, rotary)
    group, place = (None, layer) if len(caches) == 1 else _group_and_place(stack, layer)

    def run(number: int, caches: KVCaches) -> tuple[Array, KVCaches]:
        out, cache = target.attention(q, k, v, turned, caches[number], place, rows, stack.attending(number))
        return out, (*caches[:number], cache, *caches[number + 1 :])

    if group is None:
        return run(0, caches)
    result: tuple[Array, KVCaches] = jax.lax.switch(
        group, [partial(run, number) for number in range(len(caches))], caches
    )
    return result


def _attend_in_place(
    compute: str, stack: Stack, layer: Array, caches: KVCaches, given: _Given
) -> tuple[Array, KVCaches]:
    """Writes to every cache, to those of other layers nowhere: what a switch gave back, XLA would copy whole."""
    q, k, v, rotary, rows = given
    turned = at_layer(stack.ropes, layer, rotary)
    q, k = rotate(q, turned), rotate(k, turned)
    group, place = _group_and_place(stack, layer)
    caches = tuple(
        _append(cache, jnp.minimum(place, len(cache.keys) - 1), rows, k, v, group == number)
        for number, cache in enumerate(caches)
    )

    def read(number: int, caches: KVCaches) -> Array:
        return _attend_to(caches[number], place, rows, q, stack.attending(number), compute)

    out: Array = jax.lax.switch(group, [partial(read, number) for number in range(len(caches))], caches)
    return out, caches


def xla_ops(compute: str) -> Ops:
    """The operations with factors of products rounded to `compute`: "float32" or "bfloat16"."""
    ops = Ops(
        linear=partial(_linear, compute),
        normalize=_normalize,
        experts=partial(_experts, compute),
        embed=_embed,
        attention=partial(_attention, compute),
        layers=looped(lambda: ops, partial(_attend_in_place, compute)),
        argmax=_argmax,
        empty_cache=_empty_cache,
    )
    return ops


XLA_OPS = xla_ops("float32")
