"""The pieces decoders are made of. A module holds the weights of **all** its layers, stacked ``[L, …]``, and is
called for one, which is whose weights the target then takes: nothing is sliced out of a stack that need not be.

Parameters are named as in checkpoints: ``model.layers.self_attn.q_proj.weight`` here is the stack of every
``model.layers.{i}.self_attn.q_proj.weight`` there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from .ops import Attend, LinearCall, Project


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
        self.outputs = outputs


class RMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019), weight ``[L, D]``."""

    def __init__(self, layers: int, width: int, eps: float) -> None:
        self.weight = _parameter(layers, width)
        self.eps = eps


def linears(
    x: Array,
    modules: Sequence[Linear],
    project: Project,
    *,
    norm: RMSNorm | None = None,
    residual: Array | None = None,
    gate: str = "",
) -> list[Array]:
    """Several products of one x ``[…, in]`` and what is around them, in one call to the target's operation.

    Args:
        norm: applied to x before.
        residual: ``[…, out]``, added to the only product.
        gate: of two products, what the first goes through before it is multiplied with the second.

    Returns:
        Each product ``[…, out]``; with a gate a single one.
    """
    flat = x.reshape(-1, x.shape[-1])  # [M, in]
    call = LinearCall(
        weights=tuple(m.weight.get_value() for m in modules),
        outs=tuple(m.outputs for m in modules),
        biases=tuple(m.bias[...] for m in modules if m.bias is not None),
        norm=None if norm is None else norm.weight[...],
        eps=0.0 if norm is None else norm.eps,
        residual=None if residual is None else residual.reshape(flat.shape[0], -1),
        gate=gate,
    )
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in project(flat, call)]


class Attention(nnx.Module):
    """Grouped-query self-attention."""

    def __init__(self, c: DecoderConfig) -> None:
        self.q_proj = Linear(c.layers, c.width, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.layers, c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.layers, c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.layers, c.heads * c.head_dim, c.width, bias=c.out_bias)
        self.head_dim = c.head_dim

    def __call__(self, x: Array, norm: RMSNorm, attend: Attend, project: Project) -> Array:
        """``x + attention(norm(x))``."""
        projected = linears(x, (self.q_proj, self.k_proj, self.v_proj), project, norm=norm)
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in projected)  # [R, T, N or K, H]
        out = attend(q, k, v)  # [R, T, N, H]
        return linears(out.reshape(*out.shape[:2], -1), (self.o_proj,), project, residual=x)[0]


class GatedMLP(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, c: DecoderConfig) -> None:
        self.gate_proj = Linear(c.layers, c.width, c.ff_width, bias=c.mlp_bias)
        self.up_proj = Linear(c.layers, c.width, c.ff_width, bias=c.mlp_bias)
        self.down_proj = Linear(c.layers, c.ff_width, c.width, bias=c.mlp_bias)

    def __call__(self, x: Array, norm: RMSNorm, project: Project) -> Array:
        """``x + mlp(norm(x))``."""
        gated = linears(x, (self.gate_proj, self.up_proj), project, norm=norm, gate="silu")[0]
        return linears(gated, (self.down_proj,), project, residual=x)[0]


class Layers(nnx.Module):
    """All L pre-norm decoder layers."""

    def __init__(self, c: DecoderConfig) -> None:
        self.input_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.mlp = GatedMLP(c)

    def __call__(self, x: Array, attend: Attend, project: Project) -> Array:
        """Runs one layer: x ``[R, T, D]`` to ``[R, T, D]``."""
        x = self.self_attn(x, self.input_layernorm, attend, project)
        return self.mlp(x, self.post_attention_layernorm, project)
