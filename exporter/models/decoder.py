"""A decoder-only transformer with rotary positions: the uncached reference and the cached step, of one body."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .blocks import DecoderConfig, Layers, Linear, Project, RMSNorm, linears
from .ops import XLA_OPS, Cache, Ops, Rows, softmax_attention


class Embedding(nnx.Module):
    """Token embeddings, weight ``[V, D]``."""

    def __init__(self, c: DecoderConfig) -> None:
        self.weight = nnx.Param(jnp.zeros((c.vocab, c.width), jnp.float32))


class Body(nnx.Module):
    """What checkpoints call ``model``."""

    def __init__(self, c: DecoderConfig) -> None:
        self.embed_tokens = Embedding(c)
        self.layers = Layers(c)
        self.norm = RMSNorm(1, c.width, c.norm_eps)


def _projection(ops: Ops, used: Array | int) -> Project:
    """The target's product, told how many rows are true."""
    count = jnp.asarray(used, jnp.int32)
    return lambda x, weights, layer: ops.linear(x, weights, layer, count)


def _layer_number(index: Array) -> Array:
    """A loop's index as the kernels take it: where JAX_ENABLE_X64 is set, loops count in int64."""
    return index.astype(jnp.int32)


class Decoder(nnx.Module):
    """Parameters named as in checkpoints; the layers' stacked."""

    def __init__(self, c: DecoderConfig) -> None:
        self.config = c
        self.model = Body(c)
        self.lm_head = None if c.tied_embeddings else Linear(1, c.width, c.vocab, bias=False)

    def logits(self, x: Array, ops: Ops) -> Array:
        """Final norm and output head: x ``[R, D]`` to ``[R, V]``."""
        project = _projection(ops, x.shape[0])
        first = jnp.int32(0)
        x = self.model.norm(x, first)
        if self.lm_head is not None:
            return linears(x, (self.lm_head,), first, project)[0]
        return project(x, [self.model.embed_tokens.weight[...][None]], first)[0]

    def forward(self, tokens: Array, cos: Array, sin: Array) -> Array:
        """The reference: no cache, no kernels, every position at once.

        Args:
            tokens: ``[B, T]`` int32.
            cos: ``[S, H / 2]`` with S ≥ T.
            sin: as `cos`.

        Returns:
            Logits ``[B, T, V]`` float32.
        """
        b, t = tokens.shape
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
        cos, sin = (jnp.broadcast_to(table[:t], (b, t, table.shape[1])) for table in (cos, sin))

        project = _projection(XLA_OPS, b * t)

        def attend(q: Array, k: Array, v: Array) -> Array:
            k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))  # [B, K, T, H]
            return softmax_attention(q, k, v, mask, self.config.attention_scale)

        def layer(index: Array, x: Array) -> Array:
            return self.model.layers(x, _layer_number(index), cos, sin, attend, project)

        x = self.model.embed_tokens.weight[tokens]  # [B, T, D]
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
        cos, sin = (table.at[positions].get(mode="clip") for table in (cos, sin))  # [R, T, H / 2]

        # Of one sequence, what is behind its length need not be computed; of several, their padding lies between.
        project = _projection(ops, rows.lengths[0] if tokens.shape[0] == 1 else tokens.size)

        def layer(index: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
            x, cache = carry
            number = _layer_number(index)

            def attend(q: Array, k: Array, v: Array) -> Array:
                nonlocal cache
                out, cache = ops.attention(q, k, v, cache, number, rows, self.config.attention_scale)
                return out

            x = self.model.layers(x, number, cos, sin, attend, project)
            return x, cache

        x = self.model.embed_tokens.weight[tokens]  # [R, T, D]
        return jax.lax.fori_loop(0, self.config.layers, layer, (x, cache))
