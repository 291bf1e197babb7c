"""The interface of the operations that differ between targets. All other code of a decoder is plain jax.numpy.

`xla_ops.XLA_OPS` is the maths in pure XLA, for the portable StableHLO and for any platform. `cpu_ops.CPU_OPS` calls
precast's kernels, which read stacked weights and the filled part of the KV cache in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
from jax import Array


class PackedWeight(NamedTuple):
    """A stack of quantised weights in the layout of `exporter.quantize`: int8 (values int8), or int4 (values uint8).

    Symmetric int4 weights have no `minimum`.
    """

    values: Array
    scale: Array
    minimum: Array | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "table"),
    meta_fields=("formats", "outs", "inputs"),
)
@dataclass(frozen=True, kw_only=True)
class MixedWeight:
    """A stack of weights in block formats, in the layout of `exporter.mixed`.

    Attributes:
        values: records, uint8 ``[units, 64]``.
        table: for each matrix, the code of its format and its first unit, int32 ``[L, 2]``.
        formats: the format of each matrix, keys of `BLOCK_FORMATS`.
        inputs: number of inputs.
        outs: number of outputs, without padding.
    """

    values: Array
    table: Array
    formats: tuple[str, ...]
    outs: int
    inputs: int


# A stack of weights [L, out, in]: an array of float32 or bfloat16, packed, or mixed.
Weight = Array | PackedWeight | MixedWeight


class KVCache(NamedTuple):
    """Keys and values ``[L, B, K, S, H]`` of L layers in all slots; an int8 cache also has scales ``[L, B, K, S]``.

    The cache is a ring buffer: position p lies at index p mod S. For layers with a window, S is less than the context
    length, and a new position replaces one that no later token attends to.
    """

    keys: Array
    values: Array
    key_scale: Array | None = None
    value_scale: Array | None = None

    @classmethod
    def from_arrays(cls, arrays: Sequence[Array]) -> "KVCache":
        return cls(*arrays)

    def arrays(self) -> tuple[Array, ...]:
        return tuple(a for a in self if a is not None)


# One cache for each group of layers with the same window.
KVCaches = tuple[KVCache, ...]


class Batch(NamedTuple):
    """The R sequences of a call: slot, first position and length of each, all ``[R]`` int32.

    The tokens ``0 .. length - 1`` of a sequence take the positions ``start .. start + length - 1`` of its slot. Later
    tokens are padding: they are not written to the cache, and their results are meaningless. In a call with one token
    for each sequence, idle sequences have length 0 and come last.
    """

    slots: Array
    starts: Array
    lengths: Array


class Rotary(NamedTuple):
    """Cosines and sines of the RoPE angles at the tokens of a call, each ``[R, T, P]``.

    RoPE rotates P pairs of a head and leaves all dimensions except the first 2 P unchanged. A model with Z RoPEs has Z
    tables of cosines and sines. Until a layer selects its own table, the arrays contain all Z tables, ``[Z, R, T, P]``.
    """

    cos: Array
    sin: Array


@dataclass(frozen=True, kw_only=True)
class LinearCall:
    """Products of an input x ``[M, in]`` with weights of a layer, fused with the operations before and after.

    Attributes:
        weights: stacks of matrices ``[L, out, in]``.
        outs: number of outputs of each weight, without the padding of a packed weight.
        biases: ``[L, out]`` for each weight, or empty.
        norm: weight ``[L, D]`` of an RMSNorm that is applied to x first, or None.
        eps: epsilon of `norm`.
        residual: ``[M, out]``, added to the result, or None; only for a call with a single result.
        gate: activation, "silu" or "gelu_tanh"; "" for none. With two weights, the activated first
            product multiplies the second; with one, the product itself is activated.
    """

    weights: tuple[Weight, ...]
    outs: tuple[int, ...]
    biases: tuple[Array, ...] = ()
    norm: Array | None = None
    eps: float = 0.0
    residual: Array | None = None
    gate: str = ""

    @property
    def results(self) -> tuple[int, ...]:
        """The width of each result."""
        return self.outs[:1] if self.gate else self.outs


@dataclass(frozen=True, kw_only=True)
class NormCall:
    """Normalisation of x in pieces of `width` numbers. A piece is a whole row of x, or one head of a row.

    Attributes:
        weight: ``[L, width]``.
        eps: added to the mean square.
        width: numbers in a piece.
        bias: ``[L, width]`` for LayerNorm (Ba et al. 2016), which also subtracts the mean; None for RMSNorm.
        residual: same shape as x, added to the result, or None.
    """

    weight: Array
    eps: float
    width: int
    bias: Array | None = None
    residual: Array | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertsCall:
    """A mixture of gated MLPs: each row goes through the experts with its highest scores.

    The result of a row is the sum of its experts' results, weighted by the softmax of the scores over all E experts
    or, if `renormalised`, over the row's experts only.

    Attributes:
        gate, up: stacks ``[L · E, F, D]``.
        down: stack ``[L · E, D, F]``.
        experts: E.
        ff_width: F.
        experts_per_token: number of experts that each row goes through.
        renormalised: True if the weights of a row's experts add up to one.
        activation: "silu" or "gelu_tanh".
        norm: weight ``[L, D]`` of an RMSNorm that is applied to x first, or None.
        eps: epsilon of `norm`.
        residual: ``[M, D]``, added to the result, or None.
    """

    gate: Weight
    up: Weight
    down: Weight
    experts: int
    ff_width: int
    experts_per_token: int
    renormalised: bool
    activation: str
    norm: Array | None = None
    eps: float = 0.0
    residual: Array | None = None


@dataclass(frozen=True, kw_only=True)
class LayerOps:
    """The operations of a target, bound to one layer.

    Attributes:
        project: ``(x [M, in], call) -> [y [M, out], …]``, with one y for each of `LinearCall.results`.
        normalize: ``(x [M, n · width], call) -> [M, n · width]``.
        attend: ``(q [R, T, N, H], k and v [R, T, K, H]) -> [R, T, N, H]``: rotates q and k by their positions, appends
            k and v to the KV cache, if there is one, and computes attention.
        mix: ``(x [M, D], scores [M, E], call) -> [M, D]``: computes an `ExpertsCall`.
    """

    project: Callable[[Array, LinearCall], list[Array]]
    normalize: Callable[[Array, NormCall], Array]
    attend: Callable[[Array, Array, Array], Array]
    mix: Callable[[Array, Array, ExpertsCall], Array]


@dataclass(frozen=True, kw_only=True)
class AttentionParams:
    """Parameters of attention in a layer.

    Attributes:
        scale: factor of the scores.
        soft_cap: if not 0, scores become ``soft_cap · tanh(score / soft_cap)``.
        window: number of positions that a token attends to, including its own; 0 for all.
    """

    scale: float
    soft_cap: float = 0.0
    window: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerStack:
    """All layers of a decoder.

    Attributes:
        layer: ``(x [R, T, D], ops) -> [R, T, D]``, the same function for every layer.
        heads: N, K and H.
        scale: factor of the attention scores.
        windows: window of each layer, as in `AttentionParams`.
        ropes: for each layer, the index of its table among the Z RoPE tables.
        soft_cap: as in `AttentionParams`.
    """

    layer: Callable[[Array, LayerOps], Array]
    heads: tuple[int, int, int]
    scale: float
    windows: tuple[int, ...]
    ropes: tuple[int, ...]
    soft_cap: float = 0.0

    @property
    def layers(self) -> int:
        """L, the number of layers."""
        return len(self.windows)

    @property
    def cache_windows(self) -> tuple[int, ...]:
        """The window of each KV cache; layers with the same window share a cache."""
        return tuple(sorted(set(self.windows)))

    @property
    def cache_places(self) -> tuple[tuple[int, int], ...]:
        """For each layer, the index of its KV cache, and the index of the layer within that cache."""
        seen = dict.fromkeys(self.cache_windows, 0)
        places = []
        for window in self.windows:
            places.append((self.cache_windows.index(window), seen[window]))
            seen[window] += 1
        return tuple(places)

    def attention_params(self, cache: int) -> AttentionParams:
        """Return the attention parameters of all layers that use the KV cache with the index `cache`."""
        return AttentionParams(scale=self.scale, soft_cap=self.soft_cap, window=self.cache_windows[cache])


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The operations of a target.

    The argument `used` is the index of the first row of padding; the results of padding are meaningless.

    Attributes:
        linear: ``(x [M, in], call, layer, used) -> [y [M, out], …]``, with one y for each of `LinearCall.results`.
        normalize: ``(x [M, n · width], call, layer) -> [M, n · width]``.
        experts: ``(x [M, D], scores [M, E], call, layer, used) -> [M, D]``: computes an `ExpertsCall`.
        embed: ``(tokens [M], weight [1, V, D], V, D) -> [M, D]`` float32.
        attention: ``(q [R, T, N, H], k and v [R, T, K, H], rotary, cache, layer, batch, params) ->
            (out [R, T, N, H], cache)``: rotates q and k, appends k and v to the cache, and computes attention. Token t
            attends to the positions ``0 .. start + t``, or only to the last `params.window` of them if there is a
            window. `layer` is an index into the layers of `cache`.
        layers: ``(stack, x [R, T, D], rotary, caches, batch, used) -> (x, caches)``: runs all layers, with one
            cache for each of the stack's `cache_windows`.
        argmax: ``(logits [R, V], used) -> [R]`` int32: returns the index of each row's largest logit, or the
            first such index if several are equal.
        each_row: ``(function, x [R, n], used) -> [R, n]``: applies a function to each row of x.
        empty_cache: ``(shapes and types) -> arrays``: makes the arrays of an empty KV cache.
        kernels: names of the custom-call targets that the operations call.
    """

    linear: Callable[[Array, LinearCall, Array, Array], list[Array]]
    normalize: Callable[[Array, NormCall, Array], Array]
    experts: Callable[[Array, Array, ExpertsCall, Array, Array], Array]
    embed: Callable[[Array, Weight, int, int], Array]
    attention: Callable[
        [Array, Array, Array, Rotary, KVCache, Array, Batch, AttentionParams], tuple[Array, KVCache]
    ]
    layers: Callable[[LayerStack, Array, Rotary, KVCaches, Batch, Array], tuple[Array, KVCaches]]
    argmax: Callable[[Array, Array], Array]
    each_row: Callable[[Callable[[Array], Array], Array, Array], Array]
    empty_cache: Callable[[Sequence[jax.ShapeDtypeStruct]], tuple[Array, ...]]
    kernels: tuple[str, ...] = ()
