"""The building blocks of decoders.

A module stores the weights of **all** layers, stacked ``[L, …]``, but a call runs a single layer. The target can then
read the weights of that layer in place, without slicing the stack.

Parameters are named after tensors of the checkpoint: the parameter ``model.layers.self_attn.q_proj.weight`` is the
stack of all tensors ``model.layers.{i}.self_attn.q_proj.weight``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from .ops import ExpertsCall, LayerOps, LinearCall, NormCall


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The number of experts of a mixture and its routing. `ops.ExpertsCall` describes the attributes."""

    experts: int
    experts_per_token: int
    renormalised: bool


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The dimensions and options of a decoder.

    Attributes:
        layers, width, heads, kv_heads, head_dim, ff_width, vocab: the dimensions, which all docstrings abbreviate as
            L, D, N, K, H, F, V.
        max_positions: the model's own context length, which limits the context of an export.
        norm_eps: epsilon of all norms.
        tied_embeddings: True if the output head is the token embedding.
        qkv_bias: True if the projections to q, k and v have biases.
        out_bias: True if the output projection of the attention has a bias.
        mlp_bias: True if the projections of the MLP have biases.
        qk_norm: norm of q and k: "" for none, "head" for each head separately, "all" for all heads together.
        activation: activation of the MLP, "silu" or "gelu_tanh".
        gated: True for a gated MLP, such as SwiGLU; False for two linear layers with an activation between them.
        attention_scale: factor of the attention scores; None for 1 / sqrt(H).
        attention_cap: if not 0, scores s become ``cap · tanh(s / cap)``.
        windows: for each layer, the number of positions that a token attends to, 0 for all; empty if every layer
            attends to all positions.
        ropes: for each layer, the index of its RoPE in `ModelSpec.ropes`; empty if every layer uses the first RoPE.
        learned_positions: True if the model adds learned position embeddings instead of applying RoPE.
        embedding_scale: factor of the token embeddings.
        logit_scale: factor of the logits.
        logit_cap: if not 0, logits z become ``cap · tanh(z / cap)``.
        mixture: the mixture of experts in place of the MLP, or None.
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
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """The window of each layer."""
        return self.windows or (0,) * self.layers

    @property
    def layer_ropes(self) -> tuple[int, ...]:
        """For each layer, the index of its RoPE in `ModelSpec.ropes`."""
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
    """Root mean square normalisation (Zhang and Sennrich 2019) with weight ``[L, width]``."""

    def __init__(self, layers: int, width: int, eps: float) -> None:
        self.weight = _parameter(layers, width)
        self.bias = None
        self.width, self.eps = width, eps


class LayerNorm(nnx.Module):
    """Layer normalisation (Ba et al. 2016) with weight and bias ``[L, width]``."""

    def __init__(self, layers: int, width: int, eps: float) -> None:
        self.weight = _parameter(layers, width)
        self.bias = _parameter(layers, width)
        self.width, self.eps = width, eps


Norm = RMSNorm | LayerNorm


def normalize(x: Array, norm: Norm, ops: LayerOps, *, residual: Array | None = None) -> Array:
    """Normalise x ``[…, D]``, then add `residual`, if any.

    If the norm has the width of a head, each head of x is normalised separately.

    Returns:
        ``[…, D]``.
    """
    flat = x.reshape(-1, x.shape[-1])
    call = NormCall(
        weight=norm.weight[...],
        eps=norm.eps,
        width=norm.width,
        bias=None if norm.bias is None else norm.bias[...],
        residual=None if residual is None else residual.reshape(*flat.shape),
    )
    return ops.normalize(flat, call).reshape(*x.shape)


def project(
    x: Array,
    modules: Sequence[Linear],
    ops: LayerOps,
    *,
    norm: Norm | None = None,
    residual: Array | None = None,
    gate: str = "",
) -> list[Array]:
    """Multiply x ``[…, in]`` by one or more weights. Fuse the optional norm, residual and gate with the product.

    Args:
        norm: applied to x first.
        residual: ``[…, out]``, added to the product; only for a single weight.
        gate: name of an activation, or "". With two weights, the activated first product multiplies
            the second; with one, the product itself is activated.

    Returns:
        The products, each ``[…, out]``; if there is a gate, a single product.
    """
    if isinstance(norm, LayerNorm):
        x, norm = normalize(x, norm, ops), None
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
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ops.project(flat, call)]


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023)."""

    def __init__(self, c: DecoderConfig) -> None:
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.q_proj = Linear(c.layers, c.width, queries, bias=c.qkv_bias)
        self.k_proj = Linear(c.layers, c.width, keys, bias=c.qkv_bias)
        self.v_proj = Linear(c.layers, c.width, keys, bias=c.qkv_bias)
        self.o_proj = Linear(c.layers, queries, c.width, bias=c.out_bias)
        # nnx cannot replace an attribute initialised to None with a module, so each attribute is assigned only once.
        widths = {"": None, "head": (c.head_dim, c.head_dim), "all": (queries, keys)}[c.qk_norm]
        self.q_norm = RMSNorm(c.layers, widths[0], c.norm_eps) if widths else None
        self.k_norm = RMSNorm(c.layers, widths[1], c.norm_eps) if widths else None
        self.head_dim = c.head_dim

    def __call__(
        self, x: Array, ops: LayerOps, *, norm: Norm | None = None, residual: Array | None = None
    ) -> Array:
        """Return ``residual + attention(norm(x))``."""
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj), ops, norm=norm)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = normalize(q, self.q_norm, ops), normalize(k, self.k_norm, ops)
        heads = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (q, k, v))  # [R, T, N or K, H]
        out = ops.attend(*heads)  # [R, T, N, H]
        return project(out.reshape(*out.shape[:2], -1), (self.o_proj,), ops, residual=residual)[0]


class GatedMLP(nnx.Module):
    """A gated linear unit (Shazeer 2020): SwiGLU or GeGLU, depending on the activation."""

    def __init__(self, c: DecoderConfig) -> None:
        self.gate_proj = Linear(c.layers, c.width, c.ff_width, bias=c.mlp_bias)
        self.up_proj = Linear(c.layers, c.width, c.ff_width, bias=c.mlp_bias)
        self.down_proj = Linear(c.layers, c.ff_width, c.width, bias=c.mlp_bias)
        self.activation = c.activation

    def __call__(
        self, x: Array, ops: LayerOps, *, norm: Norm | None = None, residual: Array | None = None
    ) -> Array:
        """Return ``residual + mlp(norm(x))``."""
        gated = project(x, (self.gate_proj, self.up_proj), ops, norm=norm, gate=self.activation)[0]
        return project(gated, (self.down_proj,), ops, residual=residual)[0]


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, c: DecoderConfig) -> None:
        self.up_proj = Linear(c.layers, c.width, c.ff_width, bias=c.mlp_bias)
        self.down_proj = Linear(c.layers, c.ff_width, c.width, bias=c.mlp_bias)
        self.activation = c.activation

    def __call__(
        self, x: Array, ops: LayerOps, *, norm: Norm | None = None, residual: Array | None = None
    ) -> Array:
        """Return ``residual + mlp(norm(x))``."""
        active = project(x, (self.up_proj,), ops, norm=norm, gate=self.activation)[0]
        return project(active, (self.down_proj,), ops, residual=residual)[0]


class Experts(nnx.Module):
    """The gated MLPs of a mixture. Each stack has L · E matrices: the E matrices of layer 0, of layer 1, and so on."""

    def __init__(self, c: DecoderConfig, experts: int) -> None:
        stack = c.layers * experts
        self.gate_proj = Linear(stack, c.width, c.ff_width)
        self.up_proj = Linear(stack, c.width, c.ff_width)
        self.down_proj = Linear(stack, c.ff_width, c.width)


class MixtureMLP(nnx.Module):
    """A mixture of experts (Shazeer et al. 2017). `gate` is the router, which scores the experts for each token."""

    def __init__(self, c: DecoderConfig) -> None:
        assert c.mixture is not None
        self.mixture, self.activation, self.ff_width = c.mixture, c.activation, c.ff_width
        self.gate = Linear(c.layers, c.width, c.mixture.experts)
        self.experts = Experts(c, c.mixture.experts)

    def __call__(self, x: Array, ops: LayerOps, *, norm: RMSNorm, residual: Array) -> Array:
        """Return ``residual + mlp(norm(x))``."""
        flat = x.reshape(-1, x.shape[-1])
        scores = project(flat, (self.gate,), ops, norm=norm)[0]  # [M, E]
        call = ExpertsCall(
            gate=self.experts.gate_proj.weight.get_value(),
            up=self.experts.up_proj.weight.get_value(),
            down=self.experts.down_proj.weight.get_value(),
            experts=self.mixture.experts,
            ff_width=self.ff_width,
            experts_per_token=self.mixture.experts_per_token,
            renormalised=self.mixture.renormalised,
            activation=self.activation,
            norm=norm.weight[...],
            eps=norm.eps,
            residual=residual.reshape(*flat.shape),
        )
        return ops.mix(flat, scores, call).reshape(*x.shape)


class PreNormLayers(nnx.Module):
    """All L layers in the style of Llama: norms before attention and MLP."""

    def __init__(self, c: DecoderConfig) -> None:
        self.input_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.mlp = GatedMLP(c) if c.mixture is None else MixtureMLP(c)

    def __call__(self, x: Array, ops: LayerOps) -> Array:
        """Run one layer on x ``[R, T, D]`` and return its result ``[R, T, D]``."""
        x = self.self_attn(x, ops, norm=self.input_layernorm, residual=x)
        return self.mlp(x, ops, norm=self.post_attention_layernorm, residual=x)


class PostNormLayers(nnx.Module):
    """All L layers in the style of OLMo 2: norms after attention and MLP."""

    def __init__(self, c: DecoderConfig) -> None:
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.mlp = GatedMLP(c)
        self.post_feedforward_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)

    def __call__(self, x: Array, ops: LayerOps) -> Array:
        """Run one layer on x ``[R, T, D]`` and return its result ``[R, T, D]``."""
        x = normalize(self.self_attn(x, ops), self.post_attention_layernorm, ops, residual=x)
        return normalize(self.mlp(x, ops), self.post_feedforward_layernorm, ops, residual=x)


class SandwichLayers(nnx.Module):
    """All L layers in the style of Gemma 2: norms before and after attention and MLP."""

    def __init__(self, c: DecoderConfig) -> None:
        self.input_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)
        self.mlp = GatedMLP(c)
        self.post_feedforward_layernorm = RMSNorm(c.layers, c.width, c.norm_eps)

    def __call__(self, x: Array, ops: LayerOps) -> Array:
        """Run one layer on x ``[R, T, D]`` and return its result ``[R, T, D]``."""
        attended = self.self_attn(x, ops, norm=self.input_layernorm)
        x = normalize(attended, self.post_attention_layernorm, ops, residual=x)
        fed = self.mlp(x, ops, norm=self.pre_feedforward_layernorm)
        return normalize(fed, self.post_feedforward_layernorm, ops, residual=x)
