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

from .ops import Calls, ExpertsCall, LinearCall, NormCall


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How many experts a mixture has, and how a row's are chosen; as in `ops.ExpertsCall`."""

    experts: int
    chosen: int
    renormalised: bool


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder. Letters are the design's: L, D, N, K, H, F, V.

    Attributes:
        qk_norm: whether q and k are normed: "" not, "head" each head by itself, "all" their heads together.
        activation: of the MLP: "silu" or "gelu_tanh".
        gated: whether the activation is a gate of another product.
        attention_scale: what scores are multiplied by; by default 1 / sqrt(H).
        attention_cap: if not 0, scores s become ``cap · tanh(s / cap)``.
        windows: of each layer, how many positions a token sees; 0 for all. Empty for all of every layer.
        ropes: of each layer, which of the model's RoPE tables it takes. Empty for the first of every layer.
        learned_positions: whether positions are embedded, instead of rotating heads.
        embedding_scale: what embeddings are multiplied by.
        logit_scale: what logits are multiplied by.
        logit_cap: if not 0, logits are capped as scores are.
        mixture: where the MLP is one.
    """

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
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""
    activation: str = "silu"
    gated: bool = True
    attention_scale: float | None = None
    attention_cap: float = 0.0
    windows: tuple[int, ...] = ()
    ropes: tuple[int, ...] = ()
    learned_positions: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    mixture: Mixture | None = None

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Of each layer."""
        return self.windows or (0,) * self.layers

    @property
    def layer_ropes(self) -> tuple[int, ...]:
        """Of each layer."""
        return self.ropes or (0,) * self.layers


def _parameter(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32))


class Linear(nnx.Module):
    """``x Wᵀ + b`` with weight ``[L, out, in]`` and bias ``[L, out]``, if any."""

    def __init__(self, layers: int, inputs: int, outputs: int, *, bias: bool = False) -> None:
        self.weight = _parameter(layers, outputs, inputs)
        self.bias = _parameter(layers, outputs) if bias else None
        self.outputs = outputs


class RMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019), weight ``[L, D]``."""

    def __init__(self, layers: int, width: int, eps: float) -> None:
        self.weight = _parameter(layers, width)
        self.bias = None
        self.width, self.eps = width, eps


class LayerNorm(nnx.Module):
    """Layer normalisation (Ba et al. 2016), weight and bias ``[L, D]``."""

    def __init__(self, layers: int, width: int, eps: float) -> None:
        self.weight = _parameter(layers, width)
        self.bias = _parameter(layers, width)
        self.width, self.eps = width, eps


Norm = RMSNorm | LayerNorm


def normalize(x: Array, norm: Norm, calls: Calls, *, residual: Array | None = None) -> Array:
    """``norm(x)`` of pieces of the norm's width, and `residual` added, if any: x ``[…, D]`` to ``[…, D]``."""
    flat = x.reshape(-1, x.shape[-1])
    call = NormCall(
        weight=norm.weight[...],
        eps=norm.eps,
        width=norm.width,
        bias=None if norm.bias is None else norm.bias[...],
        residual=None if residual is None else residual.reshape(*flat.shape),
    )
    return calls.normalize(flat, call).reshape(*x.shape)


def linears(
    x: Array,
    modules: Sequence[Linear],
    calls: Calls,
    *,
    norm: Norm | None = None,
    residual: Array | None = None,
    gate: str = "",
) -> list[Array]:
    """Several products of one x ``[…, in]`` and what is around them, in one call to the target's operation.

    Args:
        norm: applied to x before.
        residual: ``[…, out]``, added to the only product.
        gate: what the first of two products goes through before it is multiplied with the second; or the only one.

    Returns:
        Each product ``[…, out]``; with a gate a single one.
    """
    if isinstance(norm, LayerNorm):
        x, norm = normalize(x, norm, calls), None
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
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in calls.project(flat, call)]


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023)."""

    def __init__(self, c: DecoderConfig) -> None:
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.q_proj = Linear(c.layers, c.width, queries, bias=c.qkv_bias)
        self.k_proj = Linear(c.layers, c.width, keys, bias=c.qkv_bias)
        self.v_proj = Linear(c.layers, c.width, keys, bias=c.qkv_bias)
        self.o_proj = Linear(c.layers, queries, c.width, bias=c.out_bias)
        # What nnx once has as None cannot become a module.
        widths = {"": None, "head": (c.head_dim, c.head_dim), "all": (queries, keys)}[c.qk_norm]
        self.q_norm = RMSNorm(c.layers, widths[0], c.norm_eps) if widths else None
        self.k_norm = RMSNorm(c.layers, widths[1], c.norm_eps) if widths else None
        self.head_dim = c.head_dim

    def __call__(
        self, x: Array, calls: Calls, *, norm: Norm | None = None, residual: Array | None = None
    ) -> Array:
        """``residual + attention(norm(x))``."""
        q, k, v = linears(x, (self.q_proj, self.k_proj, self.v_proj), calls, norm=norm)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = normalize(q, self.q_norm, calls), normalize(k, self.k_norm, calls)
        heads = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (q, k, v))  # [R, T, N or K, H]
        out = calls.attend(*heads)  # [R, T, N, H]
        return linears(out.reshape(*out.shape[:2], -1), (self.o_proj,), calls, residual=residual)[0]


class GatedMLP(nnx.Module):
    """A gated linear unit (Shazeer 2020): SwiGLU or GeGLU by the activation."""

    def __init__(self, c: DecoderConfig) -> None:
        self.gate_proj = Linear(c.layers, c.width, c.ff_width, bias=c.mlp_bias)
        self.up_proj = Linear(c.layers, c.width, c.ff_width, bias=c.mlp_bias)
        self.down_proj = Linear(c.layers, c.ff_width, c.width, bias=c.mlp_bias)
        self.activation = c.activation

    def __call__(
        self, x: Array, calls: Calls, *, norm: Norm | None = None, residual: Array | None = None
    ) -> Array:
        """``residual + mlp(norm(x))``."""
        gated = linears(x, (self.gate_proj, self.up_proj), calls, norm=norm, gate=self.activation)[0]
        return linears(gated, (self.down_proj,), calls, residual=residual)[0]


class MLP(nnx.Module):
    """Two products with an activation between them."""

    def __init__(self, c: DecoderConfig) -> None:
        self.up_proj = Linear(c.layers, c.width, c.ff_width, bias=c.mlp_bias)
        self.down_proj = Linear(c.layers, c.ff_width, c.width, bias=c.mlp_bias)
        self.activation = c.activation

    def __call__(
        self, x: Array, calls: Calls, *, norm: Norm | None = None, residual: Array | None = None
    ) -> Array:
        """``residual + mlp(norm(x))``."""
        active = linears(x, (self.up_proj,), calls, norm=norm, gate=self.activation)[0]
        return linears(active, (self.down_proj,), calls, residual=residual)[0]


class Experts(nnx.Module):
    """The gated MLPs of a mixture: stacks of L E matrices, layer after layer."""

    def __init__(self, c: DecoderConfig, experts: int) -> None:
        stack = c.layers * experts
        self.gate_proj = Linear(stack, c.width, c.ff_width)
        self.up_proj = Linear(stack, c.width, c.ff_width)
        self.down_proj = Linear(stack, c.ff_width, c.width)


class MixtureMLP(nnx.Module):
    """A mixture of experts (Shazeer et al. 2017), `gate` the router."""

    def __init__(self, c: DecoderConfig) -> None:
        assert c.mixture is not None
        self.mixture, self.activation, self.ff_width = c.mixture, c.activation, c.ff_width
        self.gate = Linear(c.layers, c.width, c.mixture.experts)
        self.experts = Experts(c, c.mixture.experts)

    def __call__(self, x: Array, calls: Calls, *, norm: RMSNorm, residual: Array) -> Array:
        """``residual + mlp(norm(x))``."""
        flat = x.reshape(-1, x.shape[-1])
        scores = linears(flat, (self.gate,), calls, norm=norm)[0]  # [M, E]
        call = ExpertsCall(
            gate=self.experts.gate_proj.weight.get_value(),
            up=self.experts.up_proj.weight.get_value(),
            down=self.experts.down_proj.weight.get_value(),
            experts=self.mixture.experts,
            ff_width=self.ff_width,
            chosen=self.mixture.chosen,
            renormalised=self.mixture.renormalised,
            activation=self.activation,
            norm=norm.weight[...],
            eps=norm.eps,
            residual=residual.reshape(*flat.shape),
        )
        return calls.mix(flat, scores, call).reshape(*x.shape)


class PreNormLayers(nnx.Module):
    """All L layers of Llama's kind: what goes into attention and MLP is normed, what comes out is added."""

    def __init__(self, c: DecoderConfig) -> None:
        self.input_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.mlp = GatedMLP(c) if c.mixture is None else MixtureMLP(c)

    def __call__(self, x: Array, calls: Calls) -> Array:
        """Runs one layer: x ``[R, T, D]`` to ``[R, T, D]``."""
        x = self.self_attn(x, calls, norm=self.input_layernorm, residual=x)
        return self.mlp(x, calls, norm=self.post_attention_layernorm, residual=x)


class PostNormLayers(nnx.Module):
    """All L layers of OLMo 2's kind: only what comes out of attention and MLP is normed."""

    def __init__(self, c: DecoderConfig) -> None:
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.mlp = GatedMLP(c)
        self.post_feedforward_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)

    def __call__(self, x: Array, calls: Calls) -> Array:
        """Runs one layer: x ``[R, T, D]`` to ``[R, T, D]``."""
        x = normalize(self.self_attn(x, calls), self.post_attention_layernorm, calls, residual=x)
        return normalize(self.mlp(x, calls), self.post_feedforward_layernorm, calls, residual=x)


class SandwichLayers(nnx.Module):
    """All L layers of Gemma 2's kind: what goes into attention and MLP is normed, and what comes out too."""

    def __init__(self, c: DecoderConfig) -> None:
        self.input_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.mlp = GatedMLP(c)
        self.post_feedforward_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)

    def __call__(self, x: Array, calls: Calls) -> Array:
        """Runs one layer: x ``[R, T, D]`` to ``[R, T, D]``."""
        attended = self.self_attn(x, calls, norm=self.input_layernorm)
        x = normalize(attended, self.post_attention_layernorm, calls, residual=x)
        fed = self.mlp(x, calls, norm=self.pre_feedforward_layernorm)
        return normalize(fed, self.post_feedforward_layernorm, calls, residual=x)
