"""The functions that become programs, with flat arguments and results: inputs, caches, constants, in that order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from precast.loaders.artifact.manifest import DTYPE_BYTES, CacheArray, Value

from .models.blocks import DecoderConfig
from .models.decoder import Decoder, gather_rows
from .models.ops import Batch, KVCache, KVCaches, Ops, PackedWeight
from .models.parameters import AbstractModel, Parameter, abstract_model
from .models.registry import ModelSpec
from .quantize import FORMATS, StoredArray
from .weights import formats_of

TABLES = ("rope.cos", "rope.sin")
CACHE_TYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How much a set of programs holds: S positions for each of B slots, and the prefill buckets.

    Attributes:
        cache: type of the cached keys and values, one of `CACHE_TYPES`.
    """

    context: int
    slots: int
    buckets: tuple[int, ...]
    cache: str = "float32"


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model whose parameters are stored in given formats.

    Attributes:
        abstract: the model without weights.
        formats: by parameter name, a key of `FORMATS`.
    """

    spec: ModelSpec
    abstract: AbstractModel
    formats: Mapping[str, str]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.abstract.parameters

    def arrays(self) -> tuple[tuple[str, StoredArray], ...]:
        """Every array of every parameter with its name in the artifact, in the order that `bind` takes them."""
        return tuple((p.name + a.suffix, a) for p in self.parameters for a in stored_arrays(p, self.formats))

    def bind(self, arrays: Sequence[Array]) -> Decoder:
        """The module over arrays."""
        left = iter(arrays)
        counts = [len(stored_arrays(p, self.formats)) for p in self.parameters]
        groups = [tuple(islice(left, count)) for count in counts]
        return self.abstract.bind([g[0] if len(g) == 1 else PackedWeight(*g) for g in groups])


def stored_model(spec: ModelSpec, weights: str) -> StoredModel:
    """A model whose weights are stored as `weights`, a key of `FORMATS`, says.

    Raises:
        PrecastError: for a format that is not known.
    """
    abstract = abstract_model(spec)
    return StoredModel(spec=spec, abstract=abstract, formats=formats_of(abstract.parameters, weights))


def stored_arrays(parameter: Parameter, formats: Mapping[str, str]) -> tuple[StoredArray, ...]:
    """What a parameter is stored as."""
    return FORMATS[formats[parameter.name]].arrays(parameter.shape)


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
        return [jax.ShapeDtypeStruct(a.physical, a.dtype) for a in self.arguments]


def arranged(spec: ProgramSpec, layouts: Mapping[str, tuple[int, ...]]) -> ProgramSpec:
    """The same program with its caches and weights laid out otherwise.

    What it takes has the axes in the order of the layout, and is turned back first; what it returns is turned last.
    For a compiler that would have chosen this layout itself, turning is another name for the same memory. So a program
    needs no more of a runtime than arrays that lie row after row.

    Args:
        spec: the program, its layouts all of axes in order.
        layouts: by name of an argument or a result, axes from the slowest to the fastest. Others stay as they are.
    """

    def laid_out(values: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(replace(v, layout=layouts.get(v.name, v.layout)) for v in values)

    arguments, results = laid_out(spec.arguments), laid_out(spec.results)

    def function(*arrays: Array) -> tuple[Array, ...]:
        given = zip(arrays, arguments, strict=True)
        returned = spec.function(*(_turned(a, tuple(np.argsort(v.layout).tolist())) for a, v in given))
        return tuple(_turned(a, v.layout) for a, v in zip(returned, results, strict=True))

    return replace(spec, arguments=arguments, results=results, function=function)


def _turned(array: Array, axes: tuple[int, ...]) -> Array:
    return array if axes == tuple(range(array.ndim)) else jnp.transpose(array, axes)


def _value(name: str, role: str, shape: Sequence[int], dtype: str, alias: str | None = None) -> Value:
    return Value(
        name=name, role=role, shape=tuple(shape), dtype=dtype, layout=tuple(range(len(shape))), alias=alias
    )


# A ring is a multiple of as many positions.
_RING_STEP = 16


def ring_size(window: int, geometry: Geometry) -> int:
    """Positions that a layer with this window keeps.

    A chunk of a prompt is written before its tokens attend, and must not overwrite what the first of them sees.
    """
    needed = window + max(geometry.buckets) - 1
    return min(geometry.context, -(-needed // _RING_STEP) * _RING_STEP) if window else geometry.context


def cache_groups(c: DecoderConfig, geometry: Geometry) -> tuple[tuple[CacheArray, ...], ...]:
    """The arrays of each cache; layers that see equally far share one.

    Keys and values ``[L, B, K, S, H]``: a head's positions follow one another, as attention reads them. Those of int8
    have a scale for each position and head, ``[L, B, K, S]``.
    """
    windows = c.layer_windows
    return tuple(
        _cache_group(c, geometry, window, tuple(i for i, w in enumerate(windows) if w == window))
        for window in sorted(set(windows))
    )


def _cache_group(
    c: DecoderConfig, geometry: Geometry, window: int, layers: tuple[int, ...]
) -> tuple[CacheArray, ...]:
    shape = (len(layers), geometry.slots, c.kv_heads, ring_size(window, geometry), c.head_dim)
    prefix = f"cache.window_{window}" if window else "cache"

    def array(name: str, axes: str, shape: tuple[int, ...], dtype: str) -> CacheArray:
        return CacheArray(
            name=f"{prefix}.{name}",
            shape=shape,
            axes=axes,
            dtype=dtype,
            layout=tuple(range(len(shape))),
            window=window,
            layers=layers,
            bytes=DTYPE_BYTES[dtype] * int(np.prod(shape)),
        )

    arrays = [array(name, "LBKSH", shape, geometry.cache) for name in ("keys", "values")]
    if geometry.cache == "int8":
        arrays += [array(name, "LBKS", shape[:-1], "float32") for name in ("key_scale", "value_scale")]
    return tuple(arrays)


def cache_arrays(c: DecoderConfig, geometry: Geometry) -> tuple[CacheArray, ...]:
    """The arrays of all caches, one after another."""
    return tuple(array for group in cache_groups(c, geometry) for array in group)


def build_programs(model: StoredModel, geometry: Geometry, ops: Ops) -> tuple[ProgramSpec, ...]:
    """All programs of a target: the empty cache, a prefill for each bucket, and decode."""
    builder = _Builder(model=model, geometry=geometry, ops=ops)
    return (builder.cache(), *(builder.prefill(t) for t in geometry.buckets), builder.decode())


@dataclass(frozen=True, kw_only=True)
class _Builder:
    model: StoredModel
    geometry: Geometry
    ops: Ops

    def _caches(self) -> tuple[CacheArray, ...]:
        return cache_arrays(self.model.spec.config, self.geometry)

    def cache(self) -> ProgramSpec:
        arrays = self._caches()
        abstract = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
        return ProgramSpec(
            name="cache",
            kind="cache",
            tokens=0,
            arguments=(),
            results=tuple(_value(a.name, "cache", a.shape, a.dtype) for a in arrays),
            function=partial(self.ops.empty_cache, abstract),
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
        c, context = self.model.spec.config, self.geometry.context
        caches = self._caches()
        tables = (len(self.model.spec.ropes), context, self.model.spec.ropes[0].pairs)
        return ProgramSpec(
            name=name,
            kind=kind,
            tokens=tokens,
            arguments=(
                *inputs,
                *(_value(a.name, "cache", a.shape, a.dtype) for a in caches),
                *(_value(table, "table", tables, "float32") for table in TABLES),
                *(_value(name, "weight", a.shape, a.dtype) for name, a in self.model.arrays()),
            ),
            results=(
                _value("token", "token", (rows,), "int32"),
                _value("logits", "logits", (rows, c.vocab), "float32"),
                *(_value(a.name, "cache", a.shape, a.dtype, alias=a.name) for a in caches),
            ),
            function=partial(
                step,
                caches=tuple(map(len, cache_groups(c, self.geometry))),
                bind=self.model.bind,
                ops=self.ops,
            ),
            flops=_flops(c, context, tokens=tokens, rows=rows),
        )


def _step_arguments(
    arrays: Sequence[Array], caches: Sequence[int]
) -> tuple[KVCaches, Array, Array, Sequence[Array]]:
    """KVCaches (of so many arrays each), tables and weights out of what follows a program's inputs."""
    left = iter(arrays)
    taken = tuple(KVCache.from_arrays(tuple(islice(left, count))) for count in caches)
    cos, sin = islice(left, len(TABLES))
    return taken, cos, sin, tuple(left)


def _prefill(
    tokens: Array,
    length: Array,
    start: Array,
    slot: Array,
    *arrays: Array,
    caches: Sequence[int],
    bind: Callable[[Sequence[Array]], Decoder],
    ops: Ops,
) -> tuple[Array, ...]:
    """One chunk of one slot's prompt: ``tokens [T]`` at ``start``, of which ``length`` are true."""
    held, cos, sin, weights = _step_arguments(arrays, caches)
    model = bind(weights)
    batch = Batch(slots=slot[None], starts=start[None], lengths=length[None])
    x, held = model.step(tokens[None], batch, cos, sin, held, ops)  # [1, T, D]
    last = gather_rows(x[0], (length - 1).reshape(1, 1))[0]  # [1, D]
    return _results(model.logits(last, ops), held, ops)


def _decode(
    tokens: Array,
    positions: Array,
    *arrays: Array,
    caches: Sequence[int],
    bind: Callable[[Sequence[Array]], Decoder],
    ops: Ops,
) -> tuple[Array, ...]:
    """One token of every slot: ``tokens [B]`` at ``positions [B]``, −1 where a slot is not in use."""
    held, cos, sin, weights = _step_arguments(arrays, caches)
    model = bind(weights)
    batch = Batch(
        slots=jnp.arange(tokens.shape[0], dtype=jnp.int32),
        starts=positions + (positions < 0),
        lengths=(positions >= 0).astype(jnp.int32),
    )
    x, held = model.step(tokens[:, None], batch, cos, sin, held, ops)  # [B, 1, D]
    return _results(model.logits(x[:, 0], ops), held, ops)


def _results(logits: Array, caches: KVCaches, ops: Ops) -> tuple[Array, ...]:
    return ops.argmax(logits), logits, *(array for cache in caches for array in cache.arrays())


def _flops(c: DecoderConfig, context: int, *, tokens: int, rows: int) -> int:
    """Multiplications and additions of a call: the compiler cannot count those inside kernels."""
    attention_width = c.heads * c.head_dim
    experts = 1 if c.mixture is None else c.mixture.experts_per_token
    fed = (3 if c.gated else 2) * c.width * c.ff_width * experts + (
        0 if c.mixture is None else c.width * c.mixture.experts
    )
    projections = c.width * (2 * attention_width + 2 * c.kv_heads * c.head_dim) + fed
    seen = sum(min(window, context) if window else context for window in c.layer_windows)
    scores = 2 * attention_width * seen
    return 2 * rows * (tokens * (c.layers * projections + scores) + c.vocab * c.width)
