"""Write a checkpoint's tensors to the artifact's weight file, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import ALIGNMENT, TensorSpec, aligned_zeros, write_weights

from . import block_quantise
from .block_formats import BLOCK_FORMATS, UNIT, BlockFormat, Scales
from .mixed import ParameterFormat, stored_arrays, table
from .models.parameters import Parameter, unknown_sources
from .models.tensor_names import HEAD
from .quantize import BUDGET_FORMATS, FORMATS, INT4, INT4_SYMMETRIC, MIXED, SOURCE, WEIGHTS, Format
from .sources.base import QuantisedBlocks, Source, SourceTensor

# Tensors that old checkpoints store, although they can be computed from the config.
_IGNORED_ENDINGS = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")
# Maximum number of ignored tensors that a remark names.
_NAMED = 2
_VOCABULARY = ("model.embed_tokens.weight", HEAD)
# A mixture's router stays float32, because it is small, and rounding it could choose the wrong experts.
_ROUTER = ".mlp.gate.weight"
_MATRIX_AXES = 3  # a stack [L, out, in]
# The largest coefficients with which kernels can scale every code without leaving float32, where float32 is not enough.
_LARGEST = {Scales.EXPONENT: 252, Scales.FLOAT: float(np.finfo(np.float32).max) / 448}
FOUR_BITS = frozenset(name for name, kind in BLOCK_FORMATS.items() if kind.bits == 4)
_FLOATS = frozenset({"float32", "f32", "float16", "f16", "bfloat16", "bf16", "float64", "f64"})


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """The source tensors of each parameter, checked before anything is written.

    Attributes:
        parameters: the model's parameters.
        tensors: source tensors by name.
        ignored: names of the source tensors that the model does not need.
    """

    parameters: Sequence[Parameter]
    tensors: Mapping[str, SourceTensor]
    ignored: Sequence[str]

    def remark(self) -> str | None:
        """Return a remark that names the first ignored tensors and counts the rest; None if no tensor is ignored."""
        if not self.ignored:
            return None
        more = len(self.ignored) - _NAMED
        return f"leaving out {', '.join(self.ignored[:_NAMED])}" + (f", … ({more} more)" if more > 0 else "")


def plan_weights(source: Source, parameters: Sequence[Parameter], *, tied: bool) -> WeightPlan:
    """Match a source's tensors with a model's parameters.

    Args:
        source: the source, with tensors adapted to the model.
        parameters: the model's parameters.
        tied: True if the output head is the embedding.

    Raises:
        PrecastError: a tensor is missing, has another shape, or belongs to no parameter.
    """
    for parameter in parameters:
        for name in parameter.sources:
            _check_tensor(source, name, parameter.source_shape)
    if tied and HEAD in source.tensors:
        _check_tied(source)
    left = unknown_sources(parameters, source.tensors)
    ignored = [
        name
        for name in left
        if name.endswith(_IGNORED_ENDINGS)
        or (tied and name == HEAD)
        or _is_zero_bias(name, source.tensors[name])
    ]
    if unknown := sorted(set(left) - set(ignored)):
        raise PrecastError(
            f"{source.name}: tensor {unknown[0]!r}"
            f"{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''} belongs to no parameter of the"
            " model; use the config and the weights of the same model."
        )
    return WeightPlan(parameters=parameters, tensors=source.tensors, ignored=ignored)


# A parameter's name, and the arrays that store one of its source tensors.
Encoded = tuple[str, tuple[np.ndarray, ...]]


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Parameters that calibration quantises.

    Attributes:
        names: names of the parameters.
        arrays: the arrays that store each source tensor of these parameters. The tensors of a parameter come in the
            order of its `sources`.
    """

    names: Set[str]
    arrays: Iterator[Encoded]


def read_floats(
    tensors: Mapping[str, SourceTensor], parameter: Parameter, sources: Sequence[str], shape: tuple[int, ...]
) -> np.ndarray:
    """Read some of a parameter's source tensors in float32 into one array, aligned for zero-copy use by XLA.

    Args:
        tensors: source tensors by name.
        parameter: the parameter.
        sources: names of the tensors to read.
        shape: shape of the returned array.
    """
    if len(sources) == 1:
        return _aligned(tensors[sources[0]].read()).reshape(shape)
    array = aligned_zeros(shape, np.dtype(np.float32))
    for place, name in zip(array.reshape(len(sources), *parameter.source_shape), sources, strict=True):
        place[...] = tensors[name].read()
    return array


def _aligned(array: np.ndarray) -> np.ndarray:
    """Return the array itself if XLA can use it zero-copy, or else an aligned copy."""
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


def _check_tied(source: Source) -> None:
    """Refuse a checkpoint whose config ties the head to the embedding, but whose head and embedding differ."""
    head, embedding = (source.tensors[f"{name}.weight"].read() for name in ("lm_head", "model.embed_tokens"))
    if not np.array_equal(head, embedding):
        raise PrecastError(
            f"{source.name}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; set"
            " tie_word_embeddings to false in config.json to use both tensors, or remove lm_head.weight."
        )


def _is_zero_bias(name: str, tensor: SourceTensor) -> bool:
    """Return True for a bias of zeros; some tools that quantise checkpoints add one to every linear layer."""
    return name.endswith(".bias") and not tensor.read().any()


def _check_tensor(source: Source, name: str, shape: tuple[int, ...]) -> None:
    tensor = source.tensors.get(name)
    if tensor is None and name == HEAD:
        raise PrecastError(
            f"{source.name}: {HEAD} is missing, and config.json does not tie the output head to the embedding; if they"
            ' are tied, set "tie_word_embeddings" to true in config.json; if this is a text-embedding checkpoint'
            " without a head, export the checkpoint that it was made from."
        )
    if tensor is None:
        raise PrecastError(
            f"{source.name}: tensor {name!r} is missing; use the config and the weights of the same model."
        )
    if tensor.shape != shape:
        raise PrecastError(
            f"{source.name}: tensor {name!r} has shape {list(tensor.shape)}, but the config requires"
            f" {list(shape)}; use the config and the weights of the same model."
        )


def formats_of(parameters: Sequence[Parameter], weights: str) -> Mapping[str, ParameterFormat]:
    """Return the storage format of each parameter, by name.

    Matrices have the format `weights`; norms, biases and routers stay float32. If `weights` is int4, the embedding and
    the output head are int8, because they would lose the most precision as int4, and every token depends on them. If
    `weights` is `MIXED`, matrices have the smallest format of `BUDGET_FORMATS`.

    Raises:
        PrecastError: the format is unknown.
    """
    if weights not in (*WEIGHTS, MIXED):
        raise PrecastError(f"--weights: expected one of {', '.join(WEIGHTS)}, found {weights!r}.")
    return {p.name: _format_of(p, weights) for p in parameters}


def _format_of(parameter: Parameter, weights: str) -> ParameterFormat:
    if weights == MIXED and _is_stored_as_chosen(parameter):
        return BUDGET_FORMATS[:1] * len(parameter.sources)
    if parameter.name in _VOCABULARY:
        return "int8" if weights == "int4" else weights
    return weights if _is_matrix(parameter) else "float32"


def _is_matrix(parameter: Parameter) -> bool:
    return len(parameter.shape) == _MATRIX_AXES and not parameter.name.endswith(_ROUTER)


def with_source_formats(
    formats: Mapping[str, ParameterFormat], plan: WeightPlan
) -> Mapping[str, ParameterFormat]:
    """Return the formats, adapted to the formats in which the source stores the parameters.

    A parameter in the format `SOURCE` gets a format that represents its values exactly. An int4 parameter becomes
    `INT4_SYMMETRIC` if all its matrices are q4_0 in the source. It keeps the source's block formats if all have 4 bits
    and at least one is neither q4_0 nor q4_1.
    """
    return {p.name: _with_source_format(p, formats[p.name], plan.tensors) for p in plan.parameters}


def _with_source_format(
    parameter: Parameter, chosen: ParameterFormat, tensors: Mapping[str, SourceTensor]
) -> ParameterFormat:
    found = [tensors[name].block_format for name in parameter.sources]
    own = tuple(name for name in found if name is not None)
    complete = len(own) == len(found)
    if chosen == SOURCE:
        if complete:
            return own
        stored = {tensors[name].dtype.lower() for name in parameter.sources}
        return "bfloat16" if stored <= {"bfloat16", "bf16"} else "float32"
    if chosen == "int4" and complete:
        if set(own) == {"q4_0"}:
            return INT4_SYMMETRIC
        if set(own) <= FOUR_BITS and not set(own) <= set(INT4.takes):
            return own
    return chosen


def widened_remark(formats: Mapping[str, ParameterFormat], plan: WeightPlan) -> str | None:
    """Return a remark on quantised parameters stored in float32 because no block format represents a matrix exactly."""
    wide = [
        parameter
        for parameter in plan.parameters
        if formats[parameter.name] == "float32"
        and _is_stored_as_chosen(parameter)
        and any(plan.tensors[name].dtype.lower() not in _FLOATS for name in parameter.sources)
    ]
    if not wide:
        return None
    first = next(name for name in wide[0].sources if plan.tensors[name].block_format is None)
    others = f" and {len(wide) - 1} more" if len(wide) > 1 else ""
    return (
        f"storing {wide[0].name}{others} in float32, because no block format represents {first}"
        f" ({plan.tensors[first].dtype}) exactly; --weights int8 takes less space"
    )


def _is_stored_as_chosen(parameter: Parameter) -> bool:
    return parameter.name in _VOCABULARY or _is_matrix(parameter)


def stored_bytes(parameters: Sequence[Parameter], formats: Mapping[str, ParameterFormat]) -> int:
    """Return the number of bytes that all parameters take in the weight file."""
    return sum(spec.bytes for p in parameters for spec in _specs(p, formats))


def _specs(parameter: Parameter, formats: Mapping[str, ParameterFormat]) -> list[TensorSpec]:
    return [
        TensorSpec(name=parameter.name + array.suffix, shape=array.shape, dtype=array.numpy_dtype)
        for array in stored_arrays(formats[parameter.name], parameter.shape)
    ]


def write_model_weights(
    path: Path,
    plan: WeightPlan,
    formats: Mapping[str, ParameterFormat],
    tables: Mapping[str, np.ndarray],
    count: Callable[[int], None],
    calibrated: Calibrated | None = None,
) -> str:
    """Write weights and tables. Without calibration, only one source tensor at a time is in memory.

    Args:
        path: file to write.
        plan: the source tensors of each parameter.
        formats: the storage format of each parameter by name, as returned by `formats_of`.
        tables: further arrays, written unchanged.
        count: called after each source tensor with the number of bytes written for it. The numbers add up to the
            result of `stored_bytes`.
        calibrated: the parameters that calibration quantises; None for no calibration.

    Returns:
        The file's sha256.

    Raises:
        PrecastError: a tensor has values that are not finite or are too large for its format.
    """
    specs = [spec for p in plan.parameters for spec in _specs(p, formats)]
    specs += [TensorSpec(name=n, shape=t.shape, dtype=t.dtype) for n, t in tables.items()]
    names = frozenset() if calibrated is None else calibrated.names
    encoded = _encoded(plan, formats, names)
    if calibrated is not None:
        encoded = chain(encoded, calibrated.arrays)
    return write_weights(path, specs, chain(tables.items(), _pieces(encoded, plan, formats, count)))


def _encoded(
    plan: WeightPlan, formats: Mapping[str, ParameterFormat], omitted: Set[str]
) -> Iterator[Encoded]:
    """Yield the arrays that store each source tensor, except those of the parameters in `omitted`."""
    for parameter in sorted(plan.parameters, key=lambda p: p.name):
        if parameter.name not in omitted:
            stored, shape = formats[parameter.name], parameter.source_shape
            tensors = [(name, plan.tensors[name]) for name in parameter.sources]
            if isinstance(stored, str):
                for name, tensor in tensors:
                    yield parameter.name, _encode(name, tensor, FORMATS[stored], shape)
            else:
                # Each row of the table is written together with the matrix that it describes.
                rows = np.split(table(stored, *shape), len(stored))
                for (name, tensor), block_format, row in zip(tensors, stored, rows, strict=True):
                    records = _encode_records(name, tensor, BLOCK_FORMATS[block_format], shape)
                    yield parameter.name, (records.reshape(-1, UNIT), row)


def _pieces(
    encoded: Iterator[Encoded],
    plan: WeightPlan,
    formats: Mapping[str, ParameterFormat],
    count: Callable[[int], None],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield pairs of an array's name and the next part of that array, until all source tensors are stored."""
    names = {p.name: [spec.name for spec in _specs(p, formats)] for p in plan.parameters}
    for name, arrays in encoded:
        yield from zip(names[name], arrays, strict=True)
        count(sum(array.nbytes for array in arrays))
        del arrays  # free them before the next tensor is read


def _encode(
    name: str, tensor: SourceTensor, stored: Format, shape: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    if (arrays := repack(name, tensor, stored, shape)) is not None:
        return arrays
    array = tensor.read()
    check_array(name, array, shape)
    return stored.encode(array, name)


def _encode_records(
    name: str, tensor: SourceTensor, stored: BlockFormat, shape: tuple[int, ...]
) -> np.ndarray:
    """Return a matrix's records; if the source stores the matrix in this block format, keep its values."""
    if (records := repack_records(name, tensor, stored, shape)) is not None:
        return records
    array = tensor.read()
    check_array(name, array, shape)
    return block_quantise.encode(stored, array, name)


def repack_records(
    name: str, tensor: SourceTensor, stored: BlockFormat, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Return the records of a matrix that the source stores in this block format; None if it uses another format.

    Raises:
        PrecastError: the tensor has another shape, or contains values that are not finite.
    """
    if tensor.blocks is None or tensor.block_format != stored.name:
        return None
    blocks = tensor.blocks()
    _check_blocks(name, blocks, shape)
    return stored.pack(blocks.codes, *blocks.coefficients)


def repack(
    name: str, tensor: SourceTensor, stored: Format, shape: tuple[int, ...]
) -> tuple[np.ndarray, ...] | None:
    """Convert a tensor's quantised blocks to a format, as `Format.repack` does; return None if they do not fit.

    Raises:
        PrecastError: the tensor has another shape, or contains values that are not finite.
    """
    if tensor.blocks is None or tensor.block_format not in stored.takes:
        return None
    blocks = tensor.blocks()
    _check_blocks(name, blocks, shape)
    return stored.repack(blocks)


def _check_blocks(name: str, blocks: QuantisedBlocks, shape: tuple[int, ...]) -> None:
    _check_shape(name, blocks.codes.shape, shape)
    largest = _LARGEST.get(BLOCK_FORMATS[blocks.format].scales, np.finfo(np.float32).max)
    if not all((np.abs(each.astype(np.float32)) <= largest).all() for each in blocks.coefficients):
        _refuse_not_finite(name)


def check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Check the shape and the values of a tensor that has been read.

    Raises:
        PrecastError: the tensor has another shape, or contains values that are not finite.
    """
    _check_shape(name, array.shape, shape)
    # The sum is NaN or infinite if any value is. It needs less memory than np.isfinite, which returns an array.
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float64)
    if not np.isfinite(total):
        _refuse_not_finite(name)


def _check_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    # A tensor of the same size but another shape would be written in the wrong order.
    if found != shape:
        raise PrecastError(
            f"{name}: the source declares shape {list(shape)}, but the tensor has shape {list(found)};"
            " fetch the source again."
        )


def _refuse_not_finite(name: str) -> NoReturn:
    raise PrecastError(
        f"{name}: the tensor contains values that are not finite numbers; fetch the checkpoint again."
    )
