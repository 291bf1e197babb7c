"""A decoder-only transformer with rotary positions: the uncached reference and the cached step, of one body."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .blocks import DecoderConfig, Layers, Linear, RMSNorm, linears
from .ops import Cache, LinearCall, Ops, Packed, Rotary, Rows, Stack, Weight
from .xla_ops import XLA_OPS, as_cached, rotate, softmax_attention


class Embedding(nnx.Module):
    """Token embeddings, weight ``[V, D]``; packed as a stack of one."""

    def __init__(self, c: DecoderConfig) -> None:
        self.weight = nnx.Param(jnp.zeros((c.vocab, c.width), jnp.float32))
        self.shape = (c.vocab, c.width)

    def stack(self) -> Weight:
        """The weights as ``[1, V, D]``, which is what an output head takes."""
        weight: Weight = self.weight.get_value()
        return weight if isinstance(weight, Packed) else weight[None]

    def __call__(self, tokens: Array, ops: Ops) -> Array:
        """Tokens ``[…]`` to ``[…, D]``."""
        return ops.embed(tokens.reshape(-1), self.stack(), *self.shape).reshape(*tokens.shape, -1)


class Body(nnx.Module):
    """What checkpoints call ``model``."""

    def __init__(self, c: DecoderConfig) -> None:
        self.embed_tokens = Embedding(c)
        self.layers = Layers(c)
        self.norm = RMSNorm(1, c.width, c.norm_eps)


class Decoder(nnx.Module):
    """Parameters named as in checkpoints; the layers' stacked."""

    def __init__(self, c: DecoderConfig) -> None:
        self.config = c
        self.model = Body(c)
        self.lm_head = None if c.tied_embeddings else Linear(1, c.width, c.vocab, bias=False)

    def logits(self, x: Array, ops: Ops) -> Array:
        """Final norm and output head: x ``[R, D]`` to ``[R, V]``."""
        norm, embedding, all_rows = self.model.norm, self.model.embed_tokens, jnp.int32(x.shape[0])

        def project(x: Array, call: LinearCall) -> list[Array]:
            return ops.linear(x, call, jnp.int32(0), all_rows)

        if self.lm_head is not None:
            return linears(x, (self.lm_head,), project, norm=norm)[0]
        call = LinearCall(
            weights=(embedding.stack(),), outs=embedding.shape[:1], norm=norm.weight[...], eps=norm.eps
        )
        return project(x, call)[0]

    def forward(self, tokens: Array, cos: Array, sin: Array, cached: str = "float32") -> Array:
        """The reference: no cache, no kernels, every position at once.

        Args:
            tokens: ``[B, T]`` int32.
            cos: ``[S, H / 2]`` with S ≥ T.
            sin: as `cos`.
            cached: type that keys and values are rounded to, as a cache of that type would.

        Returns:
            Logits ``[B, T, V]`` float32.
        """
        b, t = tokens.shape
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
        rotary = Rotary(*(jnp.broadcast_to(table[:t], (b, t, table.shape[1])) for table in (cos, sin)))

        def attend(q: Array, k: Array, v: Array) -> Array:
            kept = (as_cached(a, cached) for a in (rotate(k, rotary), v))
            k, v = (jnp.swapaxes(a, 1, 2) for a in kept)  # [B, K, T, H]
            return softmax_attention(rotate(q, rotary), k, v, mask, self.config.attention_scale)

        all_rows = jnp.int32(b * t)

        def layer(index: Array, x: Array) -> Array:
            return self.model.layers(x, attend, lambda x, call: XLA_OPS.linear(x, call, index, all_rows))

        x = self.model.embed_tokens(tokens, XLA_OPS)  # [B, T, D]
        x = jax.lax.fori_loop(0, self.config.layers, layer, x)
        return self.logits(x.reshape(b * t, -1), XLA_OPS).reshape(b, t, -1)

    def step(
        self, tokens: Array, rows: Rows, cos: Array, sin: Array, cache: Cache, ops: Ops
    ) -> tuple[Array, Cache]:
        """Runs R sequences through all layers, appending to the cache.

        Args:
            tokens: ``[R, T]`` int32; what is behind a row's length is padding.
            rows: slot, start and length of each sequence.
            cos: ``[S, H / 2]`` for the S positions of the cache.
            sin: as `cos`.
            cache: every layer's keys and values.
            ops: how the target computes.

        Returns:
            Hidden states ``[R, T, D]`` before the final norm, and the cache.
        """
        positions = rows.starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)  # [R, T]
        rotary = Rotary(*(table.at[positions].get(mode="clip") for table in (cos, sin)))  # [R, T, H / 2]

        # Of one sequence, what is behind its length need not be computed; of several, their padding lies between.
        used = rows.lengths[0] if tokens.shape[0] == 1 else jnp.int32(tokens.size)
        c = self.config
        stack = Stack(
            layer=self.model.layers,
            layers=c.layers,
            heads=(c.heads, c.kv_heads, c.head_dim),
            scale=c.attention_scale,
        )
        return ops.layers(stack, self.model.embed_tokens(tokens, ops), rotary, cache, rows, used)
