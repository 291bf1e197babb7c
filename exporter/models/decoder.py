"""A decoder-only transformer, with two forward passes: the uncached reference, and a step with KV caches."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .blocks import DecoderConfig, LayerNorm, Linear, Norm, RMSNorm, normalize, project
from .ops import (
    AttentionParams,
    Batch,
    KVCaches,
    LayerOps,
    LayerStack,
    LinearCall,
    MixedWeight,
    Ops,
    PackedWeight,
    Rotary,
    Weight,
)
from .xla_ops import (
    XLA_OPS,
    attention_mask,
    layer_ops,
    layer_rotary,
    rotate,
    round_to_cache,
    softmax_attention,
)


class Embedding(nnx.Module):
    """Token embeddings with weight ``[V, D]``, or ``[1, V, D]`` if the weight is packed or mixed."""

    def __init__(self, c: DecoderConfig) -> None:
        self.weight = nnx.Param(jnp.zeros((c.vocab, c.width), jnp.float32))
        self.shape = (c.vocab, c.width)

    def stack(self) -> Weight:
        """Return the weight as a stack of one matrix, ``[1, V, D]``, the form of an output head's weight."""
        weight: Weight = self.weight.get_value()
        return weight if isinstance(weight, PackedWeight | MixedWeight) else weight[None]

    def __call__(self, tokens: Array, ops: Ops) -> Array:
        """Map tokens ``[…]`` to ``[…, D]``."""
        return ops.embed(tokens.reshape(-1), self.stack(), *self.shape).reshape(*tokens.shape, -1)


class PositionEmbedding(nnx.Module):
    """Learned position embeddings with weight ``[max_positions, D]``."""

    def __init__(self, c: DecoderConfig) -> None:
        self.weight = nnx.Param(jnp.zeros((c.max_positions, c.width), jnp.float32))

    def __call__(self, positions: Array) -> Array:
        """Map positions ``[…]`` to ``[…, D]``."""
        return gather_rows(self.weight[...], positions)


# A function that takes a config and builds the module of all layers. A call of that module with x [R, T, D] and
# `LayerOps` runs one layer.
LayersClass = Callable[[DecoderConfig], nnx.Module]


class Body(nnx.Module):
    """The decoder without its output head, called ``model`` in checkpoints."""

    def __init__(
        self, c: DecoderConfig, layers: LayersClass, norm: Callable[[int, int, float], Norm]
    ) -> None:
        self.embed_tokens = Embedding(c)
        self.embed_positions = PositionEmbedding(c) if c.learned_positions else None
        self.layers = layers(c)
        self.norm = norm(1, c.width, c.norm_eps)


class Decoder(nnx.Module):
    """A decoder whose parameters are stacked over layers and named as in checkpoints.

    Args:
        c: the config.
        layers: builds the module of all layers.
        norm: class of the norm before the output head.
    """

    def __init__(
        self, c: DecoderConfig, *, layers: LayersClass, norm: Callable[[int, int, float], Norm] = RMSNorm
    ) -> None:
        self.config = c
        self.model = Body(c, layers, norm)
        self.lm_head = None if c.tied_embeddings else Linear(1, c.width, c.vocab)

    def logits(self, x: Array, ops: Ops, used: Array | None = None) -> Array:
        """Apply the final norm and the output head.

        Args:
            x: ``[R, D]``.
            ops: the target's operations.
            used: index of the first row of padding; None for no padding. The logits of padding are meaningless.

        Returns:
            ``[R, V]``.
        """
        used = jnp.int32(x.shape[0]) if used is None else used
        norm: Norm | None = self.model.norm
        head_ops = layer_ops(ops, jnp.int32(0), used, _no_attention)
        if isinstance(norm, LayerNorm):  # `project` can fuse an RMSNorm with the product, but not a LayerNorm
            x, norm = ops.each_row(partial(normalize, norm=norm, ops=head_ops), x, used), None
        if self.lm_head is not None:
            logits = project(x, (self.lm_head,), head_ops, norm=norm)[0]
        else:
            logits = self._tied_logits(x, norm, head_ops)
        if self.config.logit_scale == 1.0 and not self.config.logit_cap:
            return logits
        return ops.each_row(self._scaled_logits, logits, used)

    def _tied_logits(self, x: Array, norm: Norm | None, head_ops: LayerOps) -> Array:
        embedding = self.model.embed_tokens
        call = LinearCall(
            weights=(embedding.stack(),),
            outs=embedding.shape[:1],
            norm=None if norm is None else norm.weight[...],
            eps=0.0 if norm is None else norm.eps,
        )
        return head_ops.project(x, call)[0]

    def _scaled_logits(self, logits: Array) -> Array:
        c = self.config
        scaled = logits * c.logit_scale
        return c.logit_cap * jnp.tanh(scaled / c.logit_cap) if c.logit_cap else scaled

    def embed(self, tokens: Array, positions: Array, ops: Ops) -> Array:
        """Return the first layer's input ``[R, T, D]`` for tokens ``[R, T]`` at positions ``[R, T]``."""
        x = self.model.embed_tokens(tokens, ops)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        return x if self.model.embed_positions is None else x + self.model.embed_positions(positions)

    def stack(self) -> LayerStack:
        """Return the layers in the form that `Ops.layers` expects."""
        c = self.config
        return LayerStack(
            layer=self.model.layers,
            heads=(c.heads, c.kv_heads, c.head_dim),
            scale=c.score_scale,
            soft_cap=c.attention_cap,
            windows=c.layer_windows,
            ropes=c.layer_ropes,
        )

    def forward(self, tokens: Array, cos: Array, sin: Array, cache_dtype: str = "float32") -> Array:
        """Compute the reference logits of all positions at once, without a KV cache and without kernels.

        Args:
            tokens: ``[B, T]`` int32.
            cos: ``[Z, S, P]`` for the model's Z RoPEs, with S ≥ T.
            sin: as `cos`.
            cache_dtype: type to which keys and values are rounded, to match a KV cache of that type.

        Returns:
            Logits ``[B, T, V]`` float32.
        """
        b, t = tokens.shape
        x = self.hidden(tokens, cos, sin, cache_dtype)
        return self.logits(x.reshape(b * t, -1), XLA_OPS).reshape(b, t, -1)

    def hidden(self, tokens: Array, cos: Array, sin: Array, cache_dtype: str = "float32") -> Array:
        """Return the input ``[B, T, D]`` of the final norm; the arguments are those of `forward`."""
        b, t = tokens.shape
        stack = self.stack()
        positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
        shape = (len(cos), b, t, cos.shape[2])
        rotary = Rotary(*(jnp.broadcast_to(table[:, None, :t], shape) for table in (cos, sin)))
        windows = jnp.asarray(stack.windows, jnp.int32)

        def layer(index: Array, x: Array) -> Array:
            return self.forward_layer(
                x, layer_rotary(stack.ropes, index, rotary), windows[index], index, cache_dtype
            )

        x: Array = jax.lax.fori_loop(0, stack.layers, layer, self.embed(tokens, positions, XLA_OPS))
        return x

    def forward_layer(
        self,
        x: Array,
        rotary: Rotary,
        window: Array,
        layer: Array,
        cache_dtype: str = "float32",
        ops: Ops = XLA_OPS,
    ) -> Array:
        """Compute one layer of the reference.

        Args:
            x: ``[B, T, D]``, the layer's input at the positions 0 to T − 1.
            rotary: the layer's cosines and sines, each ``[B, T, P]``.
            window: the layer's window; 0 for none.
            layer: index of the layer's weights.
            cache_dtype: as in `forward`.
            ops: the operations to use in place of pure XLA.

        Returns:
            ``[B, T, D]``.
        """
        b, t, _ = x.shape
        stack = self.stack()
        positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
        params = AttentionParams(scale=stack.scale, soft_cap=stack.soft_cap)

        def attend(q: Array, k: Array, v: Array) -> Array:
            rounded = (round_to_cache(a, cache_dtype) for a in (rotate(k, rotary), v))
            k, v = (jnp.swapaxes(a, 1, 2) for a in rounded)  # [B, K, T, H]
            return softmax_attention(
                rotate(q, rotary), k, v, attention_mask(positions, positions, window), params
            )

        return stack.layer(x, layer_ops(ops, layer, jnp.int32(b * t), attend))

    def step(
        self, tokens: Array, batch: Batch, cos: Array, sin: Array, caches: KVCaches, ops: Ops
    ) -> tuple[Array, KVCaches]:
        """Run T tokens of each of R sequences through all layers, and extend the KV caches; R or T is 1.

        Args:
            tokens: ``[R, T]`` int32; tokens beyond the length of their sequence are padding.
            batch: slot, start and length of each sequence.
            cos: ``[Z, S, P]`` for the model's Z RoPEs and the S positions of the context.
            sin: as `cos`.
            caches: a KV cache for each group of layers with the same window.
            ops: the target's operations.

        Returns:
            Hidden states ``[R, T, D]`` before the final norm, and the caches.
        """
        positions = batch.starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)  # [R, T]
        each = jax.vmap(gather_rows, (0, None))
        rotary = Rotary(*(each(table, positions) for table in (cos, sin)))  # [Z, R, T, P]

        # Padding comes last: after the tokens of a single sequence, or as idle sequences after the active ones.
        used = jnp.sum(batch.lengths, dtype=jnp.int32)
        return ops.layers(self.stack(), self.embed(tokens, positions, ops), rotary, caches, batch, used)


def gather_rows(table: Array, places: Array) -> Array:
    """Return the rows of a table ``[S, P]`` at non-negative indices ``[R, T]``.

    The indices are converted to unsigned numbers, because XLA clamps signed indices with an instruction that CPUs below
    x86-64-v3 lack, and no flag prevents that.
    """
    row = partial(jax.lax.dynamic_index_in_dim, table, keepdims=False)
    rows: Array = jax.vmap(jax.vmap(row))(places.astype(jnp.uint32))
    return rows


def _no_attention(q: Array, k: Array, v: Array) -> Array:
    raise TypeError("attention is available only inside the layers")
