"""The functions that are compiled into programs. Their arguments are flat: inputs, caches, RoPE tables and weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from precast.loaders.artifact.manifest import DTYPE_BYTES, CacheArray, Value

from .mixed import ParameterFormat, stored_arrays
from .models.blocks import DecoderConfig
from .models.decoder import Decoder, gather_rows
from .models.ops import Batch, KVCache, KVCaches, MixedWeight, Ops, PackedWeight, Weight
from .models.parameters import AbstractModel, Parameter, abstract_model
from .models.registry import ModelSpec
from .quantize import StoredArray
from .weights import formats_of

TABLES = ("rope.cos", "rope.sin")
SCORE_TOKENS = 16
CACHE_TYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of an artifact's programs.

    Attributes:
        context: S, number of positions in a slot.
        slots: B, sequences decoded together.
        buckets: prompt lengths with a prefill program.
        kv_cache: type of the cached keys and values, one of `CACHE_TYPES`.
    """

    context: int
    slots: int
    buckets: tuple[int, ...]
    kv_cache: str = "float32"

    @property
    def score_tokens(self) -> int:
        """Tokens in a call of the score program; ring buffers have no room for more tokens than the largest bucket."""
        return min(SCORE_TOKENS, max(self.buckets))


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model and the storage format of each parameter.

    Attributes:
        spec: the model.
        abstract: the model without weights.
        formats: the format of each parameter, by name.
    """

    spec: ModelSpec
    abstract: AbstractModel
    formats: Mapping[str, ParameterFormat]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.abstract.parameters

    def arrays(self) -> tuple[tuple[str, StoredArray], ...]:
        """Return the arrays of all parameters, each with its name in the artifact, in the order that `bind` expects."""
        return tuple((p.name + a.suffix, a) for p in self.parameters for a in self._stored(p))

    def bind(self, arrays: Sequence[Array]) -> Decoder:
        """Return the model with these arrays, in the order of `self.arrays()`, as its weights."""
        rest = iter(arrays)
        return self.abstract.bind(
            [
                _weight(p, self.formats[p.name], list(islice(rest, len(self._stored(p)))))
                for p in self.parameters
            ]
        )

    def _stored(self, parameter: Parameter) -> tuple[StoredArray, ...]:
        return stored_arrays(self.formats[parameter.name], parameter.shape)


def _weight(parameter: Parameter, stored: ParameterFormat, arrays: Sequence[Array]) -> Weight:
    """Return a parameter in the form that the model's operations expect."""
    if not isinstance(stored, str):
        *_, outs, inputs = parameter.shape
        return MixedWeight(values=arrays[0], table=arrays[1], formats=stored, outs=outs, inputs=inputs)
    return arrays[0] if len(arrays) == 1 else PackedWeight(*arrays)


def stored_model(spec: ModelSpec, weights: str) -> StoredModel:
    """Return a model whose weights are stored in the format `weights`, one of `WEIGHTS`.

    Raises:
        PrecastError: the format is unknown.
    """
    abstract = abstract_model(spec)
    return StoredModel(spec=spec, abstract=abstract, formats=formats_of(abstract.parameters, weights))


@dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """A function to compile. `Program` describes the compiled function in the manifest.

    Attributes:
        name: name of the program, such as "decode" or "prefill_64".
        kind: "cache", "prefill", "decode" or "score".
        tokens: number of tokens of each sequence in a call.
        arguments: the arguments, in order.
        results: the results, in order; `alias` names the argument whose memory a result reuses.
        function: the function from flat arguments to flat results.
        flops: number of multiplications and additions in a call.
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
        """Indices of the donated arguments: those whose memory a result reuses."""
        aliased = {r.alias for r in self.results}
        return tuple(i for i, a in enumerate(self.arguments) if a.name in aliased)

    def abstract_arguments(self) -> list[jax.ShapeDtypeStruct]:
        """Return the shapes and types of the arguments, with axes in memory order."""
        return [jax.ShapeDtypeStruct(a.physical, a.dtype) for a in self.arguments]


def with_layouts(spec: ProgramSpec, layouts: Mapping[str, tuple[int, ...]]) -> ProgramSpec:
    """Return the same program with other layouts of its caches and weights.

    The new program's arguments and results are row-major arrays whose axes are permuted into the order of the layout,
    so the runtime handles row-major arrays only. The new program undoes the permutation of its arguments before the
    computation, and permutes its results after the computation. If the compiler chooses the same layouts, these
    transpositions copy nothing.

    Args:
        spec: the program, with row-major arguments and results.
        layouts: for each name of an argument or a result, its axes from the slowest to the fastest. Arguments and
            results without an entry keep their layout.
    """

    def laid_out(values: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(replace(v, layout=layouts.get(v.name, v.layout)) for v in values)

    arguments, results = laid_out(spec.arguments), laid_out(spec.results)

    def function(*arrays: Array) -> tuple[Array, ...]:
        pairs = zip(arrays, arguments, strict=True)
        returned = spec.function(*(_transposed(a, tuple(np.argsort(v.layout).tolist())) for a, v in pairs))
        return tuple(_transposed(a, v.layout) for a, v in zip(returned, results, strict=True))

    return replace(spec, arguments=arguments, results=results, function=function)


def _transposed(array: Array, axes: tuple[int, ...]) -> Array:
    return array if axes == tuple(range(array.ndim)) else jnp.transpose(array, axes)


def _value(name: str, role: str, shape: Sequence[int], dtype: str, alias: str | None = None) -> Value:
    return Value(
        name=name, role=role, shape=tuple(shape), dtype=dtype, layout=tuple(range(len(shape))), alias=alias
    )


# The number of positions in a ring buffer, the KV cache of layers with a window, is a multiple of this.
_RING_STEP = 16


def ring_size(window: int, geometry: Geometry) -> int:
    """Return the number of positions in the KV cache of a layer with this window; a window of 0 means no window.

    A program writes a whole chunk of a prompt to the cache before it computes attention for the chunk's first token.
    The chunk must not overwrite that token's window, so the cache has room for a window and the longest chunk.
    """
    needed = window + max(geometry.buckets) - 1
    return min(geometry.context, -(-needed // _RING_STEP) * _RING_STEP) if window else geometry.context


def cache_groups(c: DecoderConfig, geometry: Geometry) -> tuple[tuple[CacheArray, ...], ...]:
    """Return the arrays of each KV cache; layers with the same window share a cache.

    Keys and values are ``[L, B, K, S, H]``, so the positions of a head are contiguous, in the order in which attention
    reads them. An int8 cache also has a scale for each position and head, ``[L, B, K, S]``.
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

    arrays = [array(name, "LBKSH", shape, geometry.kv_cache) for name in ("keys", "values")]
    if geometry.kv_cache == "int8":
        arrays += [array(name, "LBKS", shape[:-1], "float32") for name in ("key_scale", "value_scale")]
    return tuple(arrays)


def cache_arrays(c: DecoderConfig, geometry: Geometry) -> tuple[CacheArray, ...]:
    """Return the arrays of all KV caches, in order."""
    return tuple(array for group in cache_groups(c, geometry) for array in group)


def build_programs(model: StoredModel, geometry: Geometry, ops: Ops) -> tuple[ProgramSpec, ...]:
    """Return the programs of a target: cache, a prefill program for each bucket, decode and score.

    In the decode program, precast's kernels skip idle rows. Without these kernels, an idle row costs as much as any
    other, so there is a second decode program for a single sequence.
    """
    builder = _Builder(model=model, geometry=geometry, ops=ops)
    rows = {geometry.slots} if ops.kernels else {1, geometry.slots}
    return (
        builder.cache(),
        *(builder.prefill(t) for t in geometry.buckets),
        *(builder.decode(n) for n in sorted(rows)),
        builder.score(),
    )


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
        return self._program(f"prefill_{tokens}", "prefill", tokens, _chunk_inputs(tokens), _prefill, rows=1)

    def decode(self, rows: int) -> ProgramSpec:
        inputs = tuple(_value(name, name, (rows,), "int32") for name in ("tokens", "positions", "slots"))
        name = "decode" if rows == self.geometry.slots else f"decode_{rows}"
        return self._program(name, "decode", 1, inputs, _decode, rows=rows)

    def score(self) -> ProgramSpec:
        tokens = self.geometry.score_tokens
        return self._program("score", "score", tokens, _chunk_inputs(tokens), _score, rows=tokens)

    def _program(
        self,
        name: str,
        kind: str,
        tokens: int,
        inputs: tuple[Value, ...],
        step: Callable[..., tuple[Array, ...]],
        *,
        rows: int,
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
            flops=_flops(c, context, tokens=max(tokens, rows), rows=rows),
        )


def _chunk_inputs(tokens: int) -> tuple[Value, ...]:
    """Return the inputs of a program that reads a chunk of a sequence."""
    return (
        _value("tokens", "tokens", (tokens,), "int32"),
        *(_value(name, name, (), "int32") for name in ("length", "start", "slot")),
    )


def _step_arguments(
    arrays: Sequence[Array], caches: Sequence[int]
) -> tuple[KVCaches, Array, Array, Sequence[Array]]:
    """Split a program's arguments, except its inputs, into KV caches, tables and weights.

    Args:
        arrays: all arguments except the inputs.
        caches: number of arrays of each KV cache.
    """
    rest = iter(arrays)
    kv_caches = tuple(KVCache.from_arrays(tuple(islice(rest, count))) for count in caches)
    cos, sin = islice(rest, len(TABLES))
    return kv_caches, cos, sin, tuple(rest)


def _chunk(
    tokens: Array,
    length: Array,
    start: Array,
    slot: Array,
    arrays: Sequence[Array],
    caches: Sequence[int],
    bind: Callable[[Sequence[Array]], Decoder],
    ops: Ops,
) -> tuple[Decoder, Array, KVCaches]:
    """Run one chunk of a slot's sequence; return the model, the hidden states ``[T, D]``, and the KV caches."""
    kv_caches, cos, sin, weights = _step_arguments(arrays, caches)
    model = bind(weights)
    batch = Batch(slots=slot[None], starts=start[None], lengths=length[None])
    x, kv_caches = model.step(tokens[None], batch, cos, sin, kv_caches, ops)  # [1, T, D]
    return model, x[0], kv_caches


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
    """Run one chunk of a slot's prompt: the first `length` of the tokens ``[T]``, beginning at position `start`."""
    model, x, kv_caches = _chunk(tokens, length, start, slot, arrays, caches, bind, ops)
    last = gather_rows(x, (length - 1).reshape(1, 1))[0]  # [1, D]
    return _results(model, last, jnp.minimum(length, 1), kv_caches, ops)


def _score(
    tokens: Array,
    length: Array,
    start: Array,
    slot: Array,
    *arrays: Array,
    caches: Sequence[int],
    bind: Callable[[Sequence[Array]], Decoder],
    ops: Ops,
) -> tuple[Array, ...]:
    """Run one chunk of a slot's sequence as `_prefill` does, but return a result for each token."""
    model, x, kv_caches = _chunk(tokens, length, start, slot, arrays, caches, bind, ops)
    return _results(model, x, length, kv_caches, ops)


def _decode(
    tokens: Array,
    positions: Array,
    slots: Array,
    *arrays: Array,
    caches: Sequence[int],
    bind: Callable[[Sequence[Array]], Decoder],
    ops: Ops,
) -> tuple[Array, ...]:
    """Run one token of each of R sequences; tokens, positions and slots are each ``[R]``.

    Idle rows come last, with position −1.
    """
    kv_caches, cos, sin, weights = _step_arguments(arrays, caches)
    model = bind(weights)
    lengths = (positions >= 0).astype(jnp.int32)
    batch = Batch(slots=slots, starts=positions + (positions < 0), lengths=lengths)
    x, kv_caches = model.step(tokens[:, None], batch, cos, sin, kv_caches, ops)  # [R, 1, D]
    return _results(model, x[:, 0], jnp.sum(lengths, dtype=jnp.int32), kv_caches, ops)


def _results(model: Decoder, x: Array, used: Array, caches: KVCaches, ops: Ops) -> tuple[Array, ...]:
    """Return the likeliest token and the logits of each row of x ``[R, D]``, then the caches.

    The rows from index `used` are padding, and their results are meaningless.
    """
    logits = model.logits(x, ops, used)
    return ops.argmax(logits, used), logits, *(array for cache in caches for array in cache.arrays())


def _flops(c: DecoderConfig, context: int, *, tokens: int, rows: int) -> int:
    """Return the number of multiplications and additions in a call; the compiler cannot count those inside kernels.

    Args:
        c: the config.
        context: S.
        tokens: number of tokens in a call, of all sequences together.
        rows: number of tokens whose logits are computed.
    """
    attention_width = c.heads * c.head_dim
    experts = 1 if c.mixture is None else c.mixture.experts_per_token
    router = 0 if c.mixture is None else c.width * c.mixture.experts
    feed_forward = (3 if c.gated else 2) * c.width * c.ff_width * experts + router
    projections = c.width * (2 * attention_width + 2 * c.kv_heads * c.head_dim) + feed_forward
    seen = sum(min(window, context) if window else context for window in c.layer_windows)
    scores = 2 * attention_width * seen
    return 2 * (tokens * (c.layers * projections + scores) + rows * c.vocab * c.width)
