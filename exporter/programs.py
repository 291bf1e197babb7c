"""The functions that become programs, with flat arguments and results: inputs, caches, constants, in that order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from precast.loaders.artifact.manifest import CacheArray, Value

from .models import ModelSpec
from .models.blocks import DecoderConfig
from .models.ops import Cache, Ops, Rows
from .models.parameters import AbstractModel, abstract_model

TABLES = ("rope.cos", "rope.sin")
CACHES = ("cache.keys", "cache.values")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How much a set of programs holds: S positions for each of B slots, and the prefill buckets."""

    capacity: int
    slots: int
    buckets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """A function about to be compiled; `Program` in the manifest is what becomes of it.

    Attributes:
        function: takes the arguments flat, returns the results flat.
        donated: places of the arguments that results take over.
    """

    name: str
    kind: str
    tokens: int
    arguments: tuple[Value, ...]
    results: tuple[Value, ...]
    function: Callable[..., tuple[Array, ...]]
    flops: int

    @property
    def donated(self) -> tuple[int, ...]:
        aliased = {r.alias for r in self.results}
        return tuple(i for i, a in enumerate(self.arguments) if a.name in aliased)

    def abstract_arguments(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.arguments]


def _value(name: str, role: str, shape: Sequence[int], dtype: str, alias: str | None = None) -> Value:
    return Value(
        name=name, role=role, shape=tuple(shape), dtype=dtype, layout=tuple(range(len(shape))), alias=alias
    )


def cache_arrays(c: DecoderConfig, geometry: Geometry) -> tuple[CacheArray, ...]:
    """Keys and values ``[L, B, K, S, H]``: a head's positions follow one another, as attention reads them."""
    shape = (c.layers, geometry.slots, c.kv_heads, geometry.capacity, c.head_dim)
    return tuple(
        CacheArray(
            name=name,
            shape=shape,
            axes="LBKSH",
            dtype="float32",
            layout=tuple(range(len(shape))),
            window=0,
            bytes=4 * int(np.prod(shape)),
        )
        for name in CACHES
    )


def build_programs(spec: ModelSpec, geometry: Geometry, ops: Ops) -> tuple[ProgramSpec, ...]:
    """All programs of a target: the empty cache, a prefill for each bucket, and decode."""
    builder = _Builder(spec=spec, geometry=geometry, ops=ops, model=abstract_model(spec))
    return (builder.cache(), *(builder.prefill(t) for t in geometry.buckets), builder.decode())


@dataclass(frozen=True, kw_only=True)
class _Builder:
    spec: ModelSpec
    geometry: Geometry
    ops: Ops
    model: AbstractModel

    def cache(self) -> ProgramSpec:
        arrays = cache_arrays(self.spec.config, self.geometry)
        return ProgramSpec(
            name="cache",
            kind="cache",
            tokens=0,
            arguments=(),
            results=tuple(_value(a.name, "cache", a.shape, a.dtype) for a in arrays),
            function=partial(_empty_cache, ops=self.ops, shape=arrays[0].shape),
            flops=0,
        )

    def prefill(self, tokens: int) -> ProgramSpec:
        inputs = (
            _value("tokens", "tokens", (tokens,), "int32"),
            _value("length", "length", (), "int32"),
            _value("start", "start", (), "int32"),
            _value("slot", "slot", (), "int32"),
        )
        return self._program(f"prefill_{tokens}", "prefill", tokens, inputs, _prefill, rows=1)

    def decode(self) -> ProgramSpec:
        slots = self.geometry.slots
        inputs = (
            _value("tokens", "tokens", (slots,), "int32"),
            _value("positions", "positions", (slots,), "int32"),
        )
        return self._program("decode", "decode", 1, inputs, _decode, rows=slots)

    def _program(
        self, name: str, kind: str, tokens: int, inputs: tuple[Value, ...], step: Callable, *, rows: int
    ) -> ProgramSpec:
        c, capacity = self.spec.config, self.geometry.capacity
        caches = cache_arrays(c, self.geometry)
        return ProgramSpec(
            name=name,
            kind=kind,
            tokens=tokens,
            arguments=(
                *inputs,
                *(_value(a.name, "cache", a.shape, a.dtype) for a in caches),
                *(_value(table, "table", (capacity, c.head_dim // 2), "float32") for table in TABLES),
                *(_value(p.name, "weight", p.shape, "float32") for p in self.model.parameters),
            ),
            results=(
                _value("token", "token", (rows,), "int32"),
                _value("logits", "logits", (rows, c.vocab), "float32"),
                *(_value(a.name, "cache", a.shape, a.dtype, alias=a.name) for a in caches),
            ),
            function=partial(step, bind=self.model.bind, ops=self.ops),
            flops=_flops(c, capacity, tokens=tokens, rows=rows),
        )


def _empty_cache(*, ops: Ops, shape: tuple[int, ...]) -> tuple[Array, ...]:
    return tuple(ops.empty_cache(shape))


def _prefill(
    tokens: Array,
    length: Array,
    start: Array,
    slot: Array,
    keys: Array,
    values: Array,
    cos: Array,
    sin: Array,
    *weights: Array,
    bind: Callable,
    ops: Ops,
) -> tuple[Array, ...]:
    """One chunk of one slot's prompt: ``tokens [T]`` at ``start``, of which ``length`` are true."""
    model = bind(weights)
    rows = Rows(slots=slot[None], starts=start[None], lengths=length[None])
    x, cache = model.step(tokens[None], rows, cos, sin, Cache(keys, values), ops)  # [1, T, D]
    last = jax.lax.dynamic_slice_in_dim(x[0], length - 1, 1)  # [1, D]
    return _results(model.logits(last, ops), cache)


def _decode(
    tokens: Array,
    positions: Array,
    keys: Array,
    values: Array,
    cos: Array,
    sin: Array,
    *weights: Array,
    bind: Callable,
    ops: Ops,
) -> tuple[Array, ...]:
    """One token of every slot: ``tokens [B]`` at ``positions [B]``, −1 where a slot is not in use."""
    model = bind(weights)
    rows = Rows(
        slots=jnp.arange(tokens.shape[0], dtype=jnp.int32),
        starts=jnp.maximum(positions, 0),
        lengths=(positions >= 0).astype(jnp.int32),
    )
    x, cache = model.step(tokens[:, None], rows, cos, sin, Cache(keys, values), ops)  # [B, 1, D]
    return _results(model.logits(x[:, 0], ops), cache)


def _results(logits: Array, cache: Cache) -> tuple[Array, ...]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits, *cache


def _flops(c: DecoderConfig, capacity: int, *, tokens: int, rows: int) -> int:
    """Multiplications and additions of a call: the compiler cannot count those inside kernels."""
    attention_width = c.heads * c.head_dim
    projections = c.width * (2 * attention_width + 2 * c.kv_heads * c.head_dim) + 3 * c.width * c.ff_width
    scores = 2 * attention_width * capacity
    return 2 * rows * (tokens * c.layers * (projections + scores) + c.vocab * c.width)
