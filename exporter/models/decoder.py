"""A decoder-only transformer: the uncached reference and the cached step, of one body."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .blocks import DecoderConfig, Linear, Norm, RMSNorm, linears, normalize
from .ops import Attending, Calls, KVCaches, LinearCall, Ops, Packed, Rotary, Rows, Stack, Weight
from .xla_ops import XLA_OPS, as_cached, at_layer, layer_calls, rotate, sees, softmax_attention


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


class Positions(nnx.Module):
    """Learned embeddings of positions, weight ``[max_positions, D]``."""

    def __init__(self, c: DecoderConfig) -> None:
        self.weight = nnx.Param(jnp.zeros((c.max_positions, c.width), jnp.float32))

    def __call__(self, positions: Array) -> Array:
        """Positions ``[…]`` to ``[…, D]``."""
        return rows_at(self.weight[...], positions)


# A module of all layers: built from a config, called with (x [R, T, D], calls).
LayersClass = Callable[[DecoderConfig], nnx.Module]


class Body(nnx.Module):
    """What checkpoints call ``model``."""

    def __init__(
        self, c: DecoderConfig, layers: LayersClass, norm: Callable[[int, int, float], Norm]
    ) -> None:
        self.embed_tokens = Embedding(c)
        self.embed_positions = Positions(c) if c.learned_positions else None
        self.layers = layers(c)
        self.norm = norm(1, c.width, c.norm_eps)


class Decoder(nnx.Module):
    """Parameters named as in checkpoints; the layers' stacked.

    Args:
        c: the shape.
        layers: module of all layers.
        norm: class of the norm before the output head.
    """

    def __init__(
        self, c: DecoderConfig, *, layers: LayersClass, norm: Callable[[int, int, float], Norm] = RMSNorm
    ) -> None:
        self.config = c
        self.model = Body(c, layers, norm)
        self.lm_head = None if c.tied_embeddings else Linear(1, c.width, c.vocab)

    def logits(self, x: Array, ops: Ops) -> Array:
        """Final norm and output head: x ``[R, D]`` to ``[R, V]``."""
        norm, all_rows = self.model.norm, jnp.int32(x.shape[0])
        calls = layer_calls(ops, jnp.int32(0), all_rows, _no_attention)
        if self.lm_head is not None:
            logits = linears(x, (self.lm_head,), calls, norm=norm)[0]
        else:
            logits = self._tied_logits(x, norm, calls)
        c = self.config
        if c.logit_scale != 1.0:
            logits = logits * c.logit_scale
        return c.logit_cap * jnp.tanh(logits / c.logit_cap) if c.logit_cap else logits

    def _tied_logits(self, x: Array, norm: Norm, calls: Calls) -> Array:
        embedding = self.model.embed_tokens
        fused = isinstance(norm, RMSNorm)
        call = LinearCall(
            weights=(embedding.stack(),),
            outs=embedding.shape[:1],
            norm=norm.weight[...] if fused else None,
            eps=norm.eps if fused else 0.0,
        )
        return calls.project(x if fused else normalize(x, norm, calls), call)[0]

    def embed(self, tokens: Array, positions: Array, ops: Ops) -> Array:
        """What the first layer is given: tokens and their positions ``[R, T]`` to ``[R, T, D]``."""
        x = self.model.embed_tokens(tokens, ops)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        return x if self.model.embed_positions is None else x + self.model.embed_positions(positions)

    def stack(self) -> Stack:
        """The layers, as a target runs them."""
        c = self.config
        return Stack(
            layer=self.model.layers,
            heads=(c.heads, c.kv_heads, c.head_dim),
            scale=c.score_scale,
            soft_cap=c.attention_cap,
            windows=c.layer_windows,
            ropes=c.layer_ropes,
        )

    def forward(self, tokens: Array, cos: Array, sin: Array, cached: str = "float32") -> Array:
        """The reference: no cache, no kernels, every position at once.

        Args:
            tokens: ``[B, T]`` int32.
            cos: ``[Z, S, P]`` with S ≥ T.
            sin: as `cos`.
            cached: type that keys and values are rounded to, as a cache of that type would.

        Returns:
            Logits ``[B, T, V]`` float32.
        """
        b, t = tokens.shape
        x = self.hidden(tokens, cos, sin, cached)
        return self.logits(x.reshape(b * t, -1), XLA_OPS).reshape(b, t, -1)

    def hidden(self, tokens: Array, cos: Array, sin: Array, cached: str = "float32") -> Array:
        """What `forward` has before the final norm, ``[B, T, D]``."""
        b, t = tokens.shape
        stack = self.stack()
        positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
        shape = (len(cos), b, t, cos.shape[2])
        rotary = Rotary(*(jnp.broadcast_to(table[:, None, :t], shape) for table in (cos, sin)))
        windows = jnp.asarray(stack.windows, jnp.int32)

        def layer(index: Array, x: Array) -> Array:
            return self.forward_layer(x, at_layer(stack.ropes, index, rotary), windows[index], index, cached)

        return jax.lax.fori_loop(0, stack.layers, layer, self.embed(tokens, positions, XLA_OPS))

    def forward_layer(
        self, x: Array, rotary: Rotary, window: Array, layer: Array, cached: str = "float32"
    ) -> Array:
        """One layer of the reference.

        Args:
            x: ``[B, T, D]``, all positions from the first on.
            rotary: of this layer, ``[B, T, P]``.
            window: of this layer; 0 for none.
            layer: whose weights are taken.
            cached: as of `forward`.

        Returns:
            ``[B, T, D]``.
        """
        b, t, _ = x.shape
        stack = self.stack()
        positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
        how = Attending(scale=stack.scale, soft_cap=stack.soft_cap)

        def attend(q: Array, k: Array, v: Array) -> Array:
            kept = (as_cached(a, cached) for a in (rotate(k, rotary), v))
            k, v = (jnp.swapaxes(a, 1, 2) for a in kept)  # [B, K, T, H]
            return softmax_attention(rotate(q, rotary), k, v, sees(positions, positions, window), how)

        return stack.layer(x, layer_calls(XLA_OPS, layer, jnp.int32(b * t), attend))

    def step(
        self, tokens: Array, rows: Rows, cos: Array, sin: Array, caches: KVCaches, ops: Ops
    ) -> tuple[Array, KVCaches]:
        """Runs R sequences through all layers, appending to the caches.

        Args:
            tokens: ``[R, T]`` int32; what is behind a row's length is padding.
            rows: slot, start and length of each sequence.
            cos: ``[Z, S, P]`` for the S positions that there are.
            sin: as `cos`.
            caches: keys and values, of each group of layers that see equally far.
            ops: how the target computes.

        Returns:
            Hidden states ``[R, T, D]`` before the final norm, and the caches.
        """
        positions = rows.starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)  # [R, T]
        each = jax.vmap(rows_at, (0, None))
        rotary = Rotary(*(each(table, positions) for table in (cos, sin)))  # [Z, R, T, P]

        # Of one sequence, what is behind its length need not be computed; of several, their padding lies between.
        used = rows.lengths[0] if tokens.shape[0] == 1 else jnp.int32(tokens.size)
        return ops.layers(self.stack(), self.embed(tokens, positions, ops), rotary, caches, rows, used)


def rows_at(table: Array, places: Array) -> Array:
    """Return rows of a table ``[S, P]`` at non-negative indices ``[R, T]``.

    The indices are unsigned: XLA clamps signed ones with an instruction that CPUs before x86-64-v3 lack, and that
    no flag turns off.
    """
    row = partial(jax.lax.dynamic_index_in_dim, table, keepdims=False)
    return jax.vmap(jax.vmap(row))(places.astype(jnp.uint32))


def _no_attention(q: Array, k: Array, v: Array) -> Array:
    raise TypeError("there is no attention outside the layers")
