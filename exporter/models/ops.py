"""What differs between targets, as values; everything else is plain jax.numpy.

`xla_ops.XLA_OPS` is the maths in pure XLA, for the portable StableHLO and for any platform. `cpu_ops.CPU_OPS` calls
precast's kernels, which read stacked weights and the filled part of the cache in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax import Array


class Packed(NamedTuple):
    """A stack of weights in small integers, as `exporter.quantize` lays them out: int8, or int4 where there is a
    minimum."""

    values: Array
    scale: Array
    minimum: Array | None = None


# A stack of weights: [L, out, in] in float32 or bfloat16, or packed.
Weight = Array | Packed


class Cache(NamedTuple):
    """Keys and values of every layer and slot, each ``[L, B, K, S, H]``; of int8 ones the scales ``[L, B, K, S]``."""

    keys: Array
    values: Array
    key_scale: Array | None = None
    value_scale: Array | None = None

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> "Cache":
        return cls(*arrays)

    def arrays(self) -> tuple[Array, ...]:
        return tuple(a for a in self if a is not None)


class Rows(NamedTuple):
    """Where the R sequences of a call lie in the cache, each ``[R]`` int32.

    Row r's tokens ``0 .. length - 1`` stand at positions ``start .. start + length - 1`` of slot ``slot``; what is
    behind `length` is padding: never written, its results meaningless.
    """

    slots: Array
    starts: Array
    lengths: Array


class Rotary(NamedTuple):
    """Cosines and sines of the angles at the tokens of a call, each ``[R, T, H / 2]``."""

    cos: Array
    sin: Array


@dataclass(frozen=True, kw_only=True)
class LinearCall:
    """Products of one x with weights of one layer, and what is done around them.

    Attributes:
        weights: stacks of out × in.
        outs: how many outputs each has; packed weights are padded.
        biases: ``[L, out]`` of each, or nothing.
        norm: weight ``[L, D]`` of an RMSNorm of x before, or None; `eps` is its.
        residual: ``[M, out]``, added to the only result, or None.
        gate: "silu" or "gelu_tanh": of two products, that of the first, times the second; else "".
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
        """Outputs of each result."""
        return self.outs[:1] if self.gate else self.outs


# Products of one x with weights of one layer, however the target computes them:
# (x [M, in], call) -> results each [M, out].
Project = Callable[[Array, LinearCall], list[Array]]

# Attention of one layer, however keys and values are rotated and kept:
# (q [R, T, N, H], k, v [R, T, K, H]) -> [R, T, N, H].
Attend = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """All layers of a decoder.

    Attributes:
        layer: ``(x [R, T, D], attend, project) -> x``, the same for every layer.
        layers: L.
        heads: N, K and H.
        scale: what attention scores are multiplied by.
    """

    layer: Callable[[Array, Attend, Project], Array]
    layers: int
    heads: tuple[int, int, int]
    scale: float


@dataclass(frozen=True, kw_only=True)
class Ops:
    """What a target computes in its own way.

    Attributes:
        linear: ``(x [M, in], call, layer, used) -> results each [M, out]``; rows from `used` on are padding, and what
            comes out for them means nothing.
        embed: ``(tokens [M], weight [1, V, D], V, D) -> [M, D]`` float32.
        attention: ``(q [R, T, N, H], k and v [R, T, K, H], rotary, cache, layer, rows, scale) ->
            (out [R, T, N, H], cache)``: rotates q and k, appends k and v to the cache; token t sees positions
            ``0 .. start + t``.
        layers: ``(stack, x [R, T, D], rotary, cache, rows, used) -> (x, cache)``: all layers, one after another; of
            the R·T rows those from `used` on are padding.
        empty_cache: ``arrays -> arrays`` of these shapes and types, nothing in them.
        kernels: the custom-call targets it uses.
    """

    linear: Callable[[Array, LinearCall, Array, Array], list[Array]]
    embed: Callable[[Array, Weight, int, int], Array]
    attention: Callable[[Array, Array, Array, Rotary, Cache, Array, Rows, float], tuple[Array, Cache]]
    layers: Callable[[Stack, Array, Rotary, Cache, Rows, Array], tuple[Array, Cache]]
    empty_cache: Callable[[Sequence[jax.ShapeDtypeStruct]], tuple[Array, ...]]
    kernels: tuple[str, ...] = ()
