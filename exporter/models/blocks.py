"""The pieces decoders are made of. A module holds the weights of **all** its layers, stacked ``[L, …]``, and is
called with the index of one: programs loop over layers and nothing is sliced out of a stack that need not be.

Parameters are named as in checkpoints: ``model.layers.self_attn.q_proj.weight`` here is the stack of every
``model.layers.{i}.self_attn.q_proj.weight`` there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

# Attention of one layer, however keys and values are kept: (q [R, T, N, H], k, v [R, T, K, H]) -> [R, T, N, H].
Attend = Callable[[Array, Array, Array], Array]

# Products of one x with weights of one layer, however the target computes them:
# (x [M, in], weights each [L, out, in], layer) -> results each [M, out].
Project = Callable[[Array, Sequence[Array], Array], list[Array]]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder. Letters are the design's: L, D, N, K, H, F, V."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ff_width: int
    vocab: int
    max_positions: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5


def _parameter(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32))


class Linear(nnx.Module):
    """``x Wᵀ + b`` with weight ``[L, out, in]`` and bias ``[L, out]``, if any."""

    def __init__(self, layers: int, inputs: int, outputs: int, *, bias: bool) -> None:
        self.weight = _parameter(layers, outputs, inputs)
        self.bias = _parameter(layers, outputs) if bias else None


def linears(x: Array, modules: Sequence[Linear], layer: Array, project: Project) -> list[Array]:
    """Several products of one x ``[…, in]``, in one call to the target's operation; each ``[…, out]``."""
    flat = x.reshape(-1, x.shape[-1])  # [M, in]
    results = project(flat, [m.weight[...] for m in modules], layer)
    biased = [y if m.bias is None else y + m.bias[layer] for m, y in zip(modules, results, strict=True)]
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in biased]


class RMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019), weight ``[L, D]``."""

    def __init__(self, layers: int, width: int, eps: float) -> None:
        self.weight = _parameter(layers, width)
        self.eps = eps

    def __call__(self, x: Array, layer: Array) -> Array:
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weight[layer]


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE on halves: x ``[R, T, N, H]``, cos and sin ``[R, T, H / 2]``."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, c: DecoderConfig) -> None:
        self.q_proj = Linear(c.layers, c.width, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.layers, c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.layers, c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.layers, c.heads * c.head_dim, c.width, bias=c.out_bias)
        self.head_dim = c.head_dim

    def __call__(
        self, x: Array, layer: Array, cos: Array, sin: Array, attend: Attend, project: Project
    ) -> Array:
        projected = linears(x, (self.q_proj, self.k_proj, self.v_proj), layer, project)
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in projected)  # [R, T, N or K, H]
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # [R, T, N, H]
        return linears(out.reshape(*out.shape[:2], -1), (self.o_proj,), layer, project)[0]


class GatedMLP(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, c: DecoderConfig) -> None:
        self.gate_proj = Linear(c.layers, c.width, c.ff_width, bias=c.mlp_bias)
        self.up_proj = Linear(c.layers, c.width, c.ff_width, bias=c.mlp_bias)
        self.down_proj = Linear(c.layers, c.ff_width, c.width, bias=c.mlp_bias)

    def __call__(self, x: Array, layer: Array, project: Project) -> Array:
        gate, up = linears(x, (self.gate_proj, self.up_proj), layer, project)
        return linears(jax.nn.silu(gate) * up, (self.down_proj,), layer, project)[0]


class Layers(nnx.Module):
    """All L pre-norm decoder layers."""

    def __init__(self, c: DecoderConfig) -> None:
        self.input_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.mlp = GatedMLP(c)

    def __call__(
        self, x: Array, layer: Array, cos: Array, sin: Array, attend: Attend, project: Project
    ) -> Array:
        """Runs layer `layer`: x ``[R, T, D]`` to ``[R, T, D]``."""
        x = x + self.self_attn(self.input_layernorm(x, layer), layer, cos, sin, attend, project)
        return x + self.mlp(self.post_attention_layernorm(x, layer), layer, project)
