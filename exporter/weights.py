"""From a checkpoint's tensors to the artifact's weight file, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import ALIGNMENT, TensorSpec, aligned_zeros, write_weights

from .models.parameters import Parameter, unknown_sources
from .models.tensor_names import HEAD
from .quantize import FORMATS, Format
from .sources.base import QuantisedBlocks, Source, SourceTensor

# Buffers that old checkpoints carry and the config says again.
_IGNORED_ENDINGS = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")
_NAMED = 2  # of them, in a message
_VOCABULARY = ("model.embed_tokens.weight", HEAD)
_ROUTER = ".mlp.gate.weight"  # of a mixture of experts: small, and what it decides cannot be undone
_MATRIX_AXES = 3  # of a stack [L, out, in]


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """Which source tensors fill which parameters, checked before anything is written.

    Attributes:
        ignored: source tensors that are knowingly left out.
    """

    parameters: Sequence[Parameter]
    tensors: Mapping[str, SourceTensor]
    ignored: Sequence[str]

    def left_out(self) -> str | None:
        """What is left out, for people: the first names, and how many more; None where nothing is."""
        if not self.ignored:
            return None
        more = len(self.ignored) - _NAMED
        return f"leaving out {', '.join(self.ignored[:_NAMED])}" + (f", … ({more} more)" if more > 0 else "")


def plan_weights(source: Source, parameters: Sequence[Parameter], *, tied: bool) -> WeightPlan:
    """Matches a source's tensors with a model's parameters.

    Raises:
        PrecastError: for a tensor that is missing, has another shape, or belongs nowhere.
    """
    for parameter in parameters:
        for name in parameter.sources:
            _check_tensor(source, name, parameter.source_shape)
    if tied and HEAD in source.tensors:
        _check_tied(source)
    left = unknown_sources(parameters, source.tensors)
    ignored = [name for name in left if name.endswith(_IGNORED_ENDINGS) or (tied and name == HEAD)]
    if unknown := sorted(set(left) - set(ignored)):
        raise PrecastError(
            f"{source.name}: tensor {unknown[0]!r} belongs to no parameter of the model"
            f"{f' (nor do {len(unknown) - 1} more)' if len(unknown) > 1 else ''}; config and weights do not fit."
        )
    return WeightPlan(parameters=parameters, tensors=source.tensors, ignored=ignored)


def read_floats(
    tensors: Mapping[str, SourceTensor], parameter: Parameter, sources: Sequence[str], shape: tuple[int, ...]
) -> np.ndarray:
    """Some of a parameter's sources in float32, one behind the other in an array that XLA takes over as it lies."""
    if len(sources) == 1:
        return _aligned(tensors[sources[0]].read()).reshape(shape)
    array = aligned_zeros(shape, np.dtype(np.float32))
    for place, name in zip(array.reshape(len(sources), *parameter.source_shape), sources, strict=True):
        place[...] = tensors[name].read()
    return array


def _aligned(array: np.ndarray) -> np.ndarray:
    """The array itself where XLA takes it over as it lies: a copy of an embedding may be the largest thing there is."""
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


def _check_tied(source: Source) -> None:
    """A checkpoint may say that its head is the embedding, and bring another; which is meant, only its owner knows."""
    head, embedding = (source.tensors[f"{name}.weight"].read() for name in ("lm_head", "model.embed_tokens"))
    if not np.array_equal(head, embedding):
        raise PrecastError(
            f"{source.name}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; set it to"
            " false in config.json to use both, or remove lm_head.weight."
        )


def _check_tensor(source: Source, name: str, shape: tuple[int, ...]) -> None:
    tensor = source.tensors.get(name)
    if tensor is None and name == HEAD:
        raise PrecastError(
            f"{source.name}: has no {HEAD}, though its config.json does not say that the output head is the embedding;"
            ' if it is, set "tie_word_embeddings" to true there, and if the checkpoint was saved without its head (as'
            " those that embed texts are), export the one that it was made from."
        )
    if tensor is None:
        raise PrecastError(
            f"{source.name}: tensor {name!r} is missing; the config and the weights do not fit."
        )
    if tensor.shape != shape:
        raise PrecastError(
            f"{source.name}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)} by the config."
        )


def formats_of(parameters: Sequence[Parameter], weights: str) -> Mapping[str, str]:
    """The format of each parameter, by name, when matrices are to be stored as `weights`.

    Norms and biases stay float32. Embedding and output head are stored as int8 where the other matrices are int4:
    they err the most, and every answer goes through them.

    Raises:
        PrecastError: for a format that is not known.
    """
    if weights not in FORMATS:
        raise PrecastError(f"--weights: {weights!r} is not supported, expected one of {', '.join(FORMATS)}.")
    return {p.name: _format_of(p, weights) for p in parameters}


def _format_of(parameter: Parameter, weights: str) -> str:
    if parameter.name in _VOCABULARY:
        return "int8" if weights == "int4" else weights
    matrix = len(parameter.shape) == _MATRIX_AXES and not parameter.name.endswith(_ROUTER)
    return weights if matrix else "float32"


def stored_bytes(parameters: Sequence[Parameter], formats: Mapping[str, str]) -> int:
    """Bytes that the parameters take in the weight file: what `write_model_weights` reports, added up."""
    return sum(spec.bytes for p in parameters for spec in _specs(p, formats))


def _specs(parameter: Parameter, formats: Mapping[str, str]) -> list[TensorSpec]:
    return [
        TensorSpec(name=parameter.name + array.suffix, shape=array.shape, dtype=array.numpy_dtype)
        for array in FORMATS[formats[parameter.name]].arrays(parameter.shape)
    ]


def write_model_weights(
    path: Path,
    plan: WeightPlan,
    formats: Mapping[str, str],
    tables: Mapping[str, np.ndarray],
    report: Callable[[int], None],
) -> str:
    """Writes weights and tables; no more than one source tensor is in memory at a time.

    Args:
        path: file to write.
        plan: what fills what.
        formats: a key of `FORMATS` for every parameter, as `formats_of` gives them.
        tables: arrays that are computed, not read; written as they are.
        report: called with the bytes written of each source tensor, which make `stored_bytes` in all.

    Returns:
        The file's sha256.

    Raises:
        PrecastError: when a tensor has values that are no numbers, or too large for its format.
    """
    specs = [spec for p in plan.parameters for spec in _specs(p, formats)]
    specs += [TensorSpec(name=n, shape=t.shape, dtype=t.dtype) for n, t in tables.items()]
    return write_weights(path, specs, chain(tables.items(), _pieces(plan, formats, report)))


def _pieces(
    plan: WeightPlan, formats: Mapping[str, str], report: Callable[[int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every source tensor as it is stored, with the name of the array of which it is the next part."""
    for parameter in sorted(plan.parameters, key=lambda p: p.name):
        stored = FORMATS[formats[parameter.name]]
        names = [parameter.name + array.suffix for array in stored.arrays(parameter.shape)]
        for name in parameter.sources:
            arrays = _encode(name, plan.tensors[name], stored, parameter.source_shape)
            yield from zip(names, arrays, strict=True)
            report(sum(array.nbytes for array in arrays))
            del arrays  # before the next tensor is read


def _encode(
    name: str, tensor: SourceTensor, stored: Format, shape: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    if tensor.blocks is not None and stored.takes_blocks:
        blocks = tensor.blocks()
        _check_blocks(name, blocks, shape)
        if (arrays := stored.repack(blocks)) is not None:
            return arrays
        del blocks
    array = tensor.read()
    _check_array(name, array, shape)
    return stored.encode(array, name)


def _check_blocks(name: str, blocks: QuantisedBlocks, shape: tuple[int, ...]) -> None:
    _check_shape(name, blocks.values.shape, shape)
    for coefficients in (blocks.scale, blocks.minimum):
        if coefficients is not None and not np.isfinite(coefficients).all():
            _refuse_not_finite(name)


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    _check_shape(name, array.shape, shape)
    # A sum is not a number, or infinite, when any of its terms is; cheaper than a mask of the array.
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float64)
    if not np.isfinite(total):
        _refuse_not_finite(name)


def _check_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    # Of another shape but the same size, it would be written all the same, and in another order.
    if found != shape:
        raise PrecastError(
            f"{name}: expected shape {list(shape)}, found {list(found)} when reading it; the source's"
            " description of it is wrong: fetch the source again."
        )


def _refuse_not_finite(name: str) -> NoReturn:
    raise PrecastError(
        f"{name}: the tensor holds values that are not finite numbers; is the checkpoint damaged?"
    )
