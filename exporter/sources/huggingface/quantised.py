"""Dequantise the weights of checkpoints in GPTQ, AWQ, FP8 or compressed-tensors format.

The formats store a weight ``[out, in]`` as small numbers with scales, under names that begin like the weight's own. A
weight is the product of a number and its scale, computed in float32. The formats' libraries also compute it in float16
or bfloat16, and then round it.

- GPTQ: each int32 of ``qweight [in·b/32, out]`` holds the b-bit numbers of consecutive inputs. Each int32 of
  ``qzeros [groups, out·b/32]`` holds the b-bit zero points of consecutive outputs. ``scales`` is ``[groups, out]``, and
  ``g_idx [in]`` contains the group of each input. Unless ``checkpoint_format`` is "gptq_v2", the stored zero points are
  too small by one.
- AWQ, version "gemm": ``qweight [in, out/8]`` and ``qzeros [groups, out/8]``. The outputs in an int32 have the order
  `_AWQ_ORDER`. ``scales`` is ``[groups, out]``.
- FP8: ``weight [out, in]`` in float8_e4m3, with ``weight_scale_inv`` for each block of ``weight_block_size``.
- compressed-tensors: ``weight_packed [out, in·b/32]`` with ``weight_shape``, or ``weight`` in int8 or float8_e4m3;
  ``weight_scale``, ``weight_zero_point`` and ``weight_g_idx``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from ...block_formats import GROUP
from ..base import QuantisedBlocks, SourceTensor
from .affine import Affine, are_halves

# The half byte that holds each of eight consecutive outputs, counted from the lowest bits of an int32.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_WORD_BITS = 32
_BITS = (1, 2, 4, 8)
# Endings of tensors that only concern activations.
_ACTIVATIONS = (
    ".input_scale",
    ".input_zero_point",
    ".activation_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
)
# Formats of compressed-tensors whose weights the docstring describes; a config may leave its format out.
_COMPRESSED = (
    None,
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)
_REMEDY = "fetch the checkpoint again"


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A tensor as it is stored.

    Attributes:
        where: its file, for messages.
        shape: its shape.
        dtype: its type in safetensors' terms, such as "F16", "I32" or "F8_E4M3".
        read: returns the array in the stored type.
    """

    where: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """The quantisation of a checkpoint's weights, as the checkpoint's config describes it.

    Attributes:
        method: "gptq", "awq", "fp8" or "compressed-tensors".
        bits: number of bits in a packed number; 0 to derive it from the shapes.
        zero_offset: added to stored zeros.
        group: number of inputs that share a scale if there is no index; 0 to derive it from the shapes.
        block: numbers of rows and columns that share a scale; None to derive them from the shapes.
    """

    method: str
    bits: int = 0
    zero_offset: int = 0
    group: int = 0
    block: tuple[int, int] | None = None


def quantisation_of(method: str, config: Mapping[str, object]) -> Quantisation | None:
    """Return the quantisation that the keys of ``quantization_config`` describe; None if it is not supported."""
    bits = config.get("bits", config.get("w_bit", 4))
    match method:
        case "gptq" if bits in (2, 4, 8) and isinstance(bits, int):
            form = config.get("checkpoint_format") or "gptq"
            offsets = {"gptq": 1, "gptq_v2": 0}
            if isinstance(form, str) and form in offsets:
                return Quantisation(
                    method=method, bits=bits, zero_offset=offsets[form], group=_group_size(config)
                )
        case "awq" if bits == 4 and str(config.get("version", "gemm")).lower() == "gemm":
            return Quantisation(method=method, bits=4, group=_group_size(config))
        case "fp8":
            return Quantisation(method=method, block=_block(config.get("weight_block_size")))
        case "compressed-tensors" if _is_readable(config):
            return Quantisation(method=method, block=_block(_block_structure(config.get("config_groups"))))
    return None


def _group_size(config: Mapping[str, object]) -> int:
    """Return the number of inputs in a group; 0 if the config omits it, or puts all inputs in one group (-1)."""
    size = config.get("group_size", config.get("q_group_size"))
    return size if type(size) is int and size > 0 else 0


def _is_readable(config: Mapping[str, object]) -> bool:
    """Return True if the config of compressed-tensors describes dense weights in a known format, without transforms."""
    sparsity = config.get("sparsity_config") or {"format": "dense"}
    is_dense = isinstance(sparsity, dict) and sparsity.get("format") in (None, "dense")
    # A transform rotates the activations at run time, so the weights alone are not the model.
    return is_dense and config.get("format") in _COMPRESSED and not config.get("transform_config")


def _block_structure(groups: object) -> object:
    """Return the `block_structure` of the first group of compressed-tensors' config that has one."""
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("block_structure"):
            return weights["block_structure"]
    return None


def _block(size: object) -> tuple[int, int] | None:
    match size:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def dequantised(raw: Mapping[str, RawTensor], quantisation: Quantisation) -> dict[str, SourceTensor]:
    """Return a quantised checkpoint's tensors; each quantised weight has the name that it has in other checkpoints.

    Tensors in float16, bfloat16 or float32 that belong to no quantised weight are returned as they are.

    Raises:
        PrecastError: a tensor that belongs to a quantised weight is missing, or has the wrong type or shape.
    """
    left = {name: tensor for name, tensor in raw.items() if not name.endswith(_ACTIVATIONS)}
    found: dict[str, SourceTensor] = {}
    endings = {
        "gptq": (".qweight", partial(_gptq, quantisation)),
        "awq": (".qweight", partial(_awq, quantisation)),
        "fp8": (".weight_scale_inv", partial(_scaled, quantisation, ".weight_scale_inv")),
    }
    for ending, make in (
        endings.get(quantisation.method, (".weight_packed", partial(_packed, quantisation))),
        (".weight_scale", partial(_scaled, quantisation, ".weight_scale")),
    ):
        for name in [name for name in left if name.endswith(ending)]:
            if name in left:
                base = name.removesuffix(ending)
                found[f"{base}.weight"] = make(_Parts(left, base))
    return found | {name: _plain(name, tensor) for name, tensor in left.items()}


class _Parts:
    """The tensors that store one weight. Taking a tensor removes it from `left`.

    Args:
        left: the tensors that are not assigned to a weight yet.
        base: the common beginning of the names of the weight's tensors.
    """

    def __init__(self, left: dict[str, RawTensor], base: str) -> None:
        self._left, self._base = left, base

    def take(self, ending: str, dtypes: tuple[str, ...], axes: int | None = 2) -> RawTensor:
        """Return a tensor of one of these types, with this number of axes if it is not None.

        Raises:
            PrecastError: the tensor is missing, or has another type or number of axes.
        """
        tensor = self.find(ending, dtypes, axes)
        if tensor is None:
            raise PrecastError(
                f"{self._base}: the quantised weight lacks its tensor {ending[1:]!r}; {_REMEDY}."
            )
        return tensor

    def find(self, ending: str, dtypes: tuple[str, ...], axes: int | None = 2) -> RawTensor | None:
        """Return the tensor as `take` does, or None if it is missing."""
        tensor = self._left.pop(self._base + ending, None)
        if tensor is not None and (
            tensor.dtype not in dtypes or (axes is not None and len(tensor.shape) != axes)
        ):
            expected = " or ".join(dtypes) + ("" if axes is None else f" with {axes} axes")
            raise PrecastError(
                f"{tensor.where}: expected {self._base}{ending} to be {expected}, found {tensor.dtype}"
                f" {list(tensor.shape)}; {_REMEDY}."
            )
        return tensor

    def fail(self, what: str) -> PrecastError:
        """Return the error about shapes that do not fit together."""
        return PrecastError(f"{self._base}: {what}; {_REMEDY}.")


_FLOATS = ("F32", "F16", "BF16")
_NUMBERS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _plain(name: str, tensor: RawTensor) -> SourceTensor:
    if tensor.dtype not in _FLOATS:
        raise PrecastError(
            f"{tensor.where}: expected {name} to be F32, F16 or BF16, or to belong to a quantised weight, found"
            f" {tensor.dtype}; {_REMEDY}."
        )
    return SourceTensor(
        shape=tensor.shape, dtype=_NUMBERS[tensor.dtype], read=lambda: tensor.read().astype(np.float32)
    )


def _gptq(quantisation: Quantisation, parts: _Parts) -> SourceTensor:
    bits, per = quantisation.bits, _WORD_BITS // quantisation.bits
    words, zeros = parts.take(".qweight", ("I32",)), parts.take(".qzeros", ("I32",))
    scales, index = parts.take(".scales", _FLOATS), parts.find(".g_idx", ("I32", "I64"), 1)
    (packed, outs), groups = words.shape, scales.shape[0]
    inputs = packed * per
    if scales.shape != (groups, outs) or zeros.shape != (groups, -(-outs // per)) or groups == 0:
        raise parts.fail(
            f"expected scales [groups, {outs}] and qzeros [groups, {-(-outs // per)}], found"
            f" {list(scales.shape)} and {list(zeros.shape)}"
        )
    if index is not None and index.shape != (inputs,):
        raise parts.fail(f"expected g_idx to have {inputs} elements, found {list(index.shape)}")

    def lowest() -> np.ndarray:
        return _unpacked(zeros.read(), bits)[:, :outs].T.astype(np.float32) + quantisation.zero_offset

    return Affine(
        fail=parts.fail,
        shape=(outs, inputs),
        dtype=f"GPTQ, {bits} bits",
        bits=bits,
        groups=groups,
        size=quantisation.group,
        numbers=lambda: _unpacked(words.read().T, bits),
        zeros=lowest,
        scales=lambda: scales.read().T,
        index=None if index is None else index.read,
    ).source()


def _awq(quantisation: Quantisation, parts: _Parts) -> SourceTensor:
    words, zeros = parts.take(".qweight", ("I32",)), parts.take(".qzeros", ("I32",))
    scales = parts.take(".scales", _FLOATS)
    (inputs, packed), groups = words.shape, scales.shape[0]
    outs = packed * len(_AWQ_ORDER)
    if scales.shape != (groups, outs) or zeros.shape != (groups, packed) or groups == 0:
        raise parts.fail(
            f"expected scales [groups, {outs}] and qzeros [groups, {packed}], found {list(scales.shape)} and"
            f" {list(zeros.shape)}"
        )

    def ordered(array: np.ndarray) -> np.ndarray:
        numbers = _unpacked(array, quantisation.bits).reshape(len(array), packed, len(_AWQ_ORDER))
        return numbers[..., _AWQ_ORDER].reshape(len(array), outs).T  # [out, …]

    return Affine(
        fail=parts.fail,
        shape=(outs, inputs),
        dtype="AWQ, 4 bits",
        bits=quantisation.bits,
        groups=groups,
        size=quantisation.group,
        numbers=lambda: ordered(words.read()),
        zeros=lambda: ordered(zeros.read()).astype(np.float32),
        scales=lambda: scales.read().T,
        index=None,
    ).source()


def _packed(quantisation: Quantisation, parts: _Parts) -> SourceTensor:
    words, stated = parts.take(".weight_packed", ("I32",)), parts.take(".weight_shape", ("I64", "I32"), 1)
    scales, zeros = (
        parts.take(".weight_scale", _FLOATS, None),
        parts.find(".weight_zero_point", ("I32", "I8"), None),
    )
    index = parts.find(".weight_g_idx", ("I32", "I64"), 1)
    shape = tuple(int(n) for n in stated.read())
    bits = _WORD_BITS * words.shape[1] // shape[1] if len(shape) == 2 and shape[1] > 0 else 0
    if bits not in _BITS or words.shape != (shape[0], -(-shape[1] * bits // _WORD_BITS)):
        raise parts.fail(
            f"weight_packed {list(words.shape)} cannot store a weight of shape {list(shape)} in 1, 2, 4 or 8 bits"
        )
    outs, inputs = shape
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    if scales.shape not in ((outs, groups), (1,), ()) or groups == 0:
        raise parts.fail(f"expected weight_scale [{outs}, groups], found {list(scales.shape)}")
    if index is not None and index.shape != (inputs,):
        raise parts.fail(f"expected weight_g_idx to have {inputs} elements, found {list(index.shape)}")
    per, half = _WORD_BITS // bits, 1 << bits - 1
    if zeros is not None and zeros.dtype == "I32" and zeros.shape != (-(-outs // per), groups):
        raise parts.fail(
            f"expected weight_zero_point [{-(-outs // per)}, {groups}], found {list(zeros.shape)}"
        )

    if zeros is not None and zeros.dtype == "I8" and zeros.shape != scales.shape:
        raise parts.fail(f"expected weight_zero_point {list(scales.shape)}, found {list(zeros.shape)}")

    def lowest() -> np.ndarray:
        if zeros is not None and zeros.dtype == "I32":
            return _unpacked(zeros.read().T, bits)[:, :outs].T.astype(np.float32)
        signed = 0.0 if zeros is None else zeros.read().astype(np.float32).reshape(-1, groups)
        return np.full((outs, groups), half, np.float32) + signed

    return Affine(
        fail=parts.fail,
        shape=(outs, inputs),
        dtype=f"compressed-tensors, {bits} bits",
        bits=bits,
        groups=groups,
        size=0,
        numbers=lambda: _unpacked(words.read(), bits)[:, :inputs],
        zeros=lowest,
        scales=lambda: np.broadcast_to(scales.read().reshape(-1, groups), (outs, groups)),
        index=None if index is None else index.read,
    ).source()


def _scaled(quantisation: Quantisation, ending: str, parts: _Parts) -> SourceTensor:
    # With the method "fp8", a byte of an int8 weight holds two numbers of 4 bits.
    types = ("F8_E4M3",) if quantisation.method == "fp8" else ("F8_E4M3", "I8")
    weight = parts.take(".weight", types)
    scales = parts.take(ending, _FLOATS, None)
    zeros = parts.find(".weight_zero_point", ("I8",), None)
    sizes = [
        _spread(n, count, quantisation.block, axis)
        for axis, (n, count) in enumerate(zip(weight.shape, (1, 1, *scales.shape)[-2:], strict=True))
    ]
    is_ambiguous = len(scales.shape) == 1 and scales.shape != (1,)  # of the outputs or of the inputs
    if (
        len(scales.shape) > 2
        or is_ambiguous
        or None in sizes
        or (zeros is not None and zeros.shape != scales.shape)
    ):
        raise parts.fail(
            f"expected {ending.removeprefix('.')} with a scale for each row or block of {list(weight.shape)}, found"
            f" {list(scales.shape)}"
        )

    def spread(coefficients: np.ndarray) -> np.ndarray:
        whole = coefficients.astype(np.float32).reshape((1, 1, *scales.shape)[-2:])
        for axis, size in enumerate(sizes):
            if size is not None and size != weight.shape[axis]:
                whole = np.repeat(whole, size, axis)
        return whole[: weight.shape[0], : weight.shape[1]]

    def read() -> np.ndarray:
        numbers = weight.read().astype(np.float32)
        if zeros is not None:
            numbers -= spread(zeros.read())
        numbers *= spread(scales.read())
        return numbers

    def blocks() -> QuantisedBlocks:
        scale = np.broadcast_to(spread(scales.read()), weight.shape)[:, ::GROUP].astype(np.float16)
        return QuantisedBlocks(format="q8_0", codes=weight.read(), coefficients=(scale,))

    rows, columns = weight.shape
    has_groups = sizes[1] is not None and (sizes[1] == columns or sizes[1] % GROUP == 0)
    is_exact = weight.dtype == "I8" and zeros is None and has_groups and are_halves(scales.read())
    return SourceTensor(
        shape=(rows, columns),
        dtype="FP8" if weight.dtype == "F8_E4M3" else "8 bits",
        read=read,
        block_format="q8_0" if is_exact else None,
        blocks=blocks if is_exact else None,
    )


def _spread(size: int, scales: int, block: tuple[int, int] | None, axis: int) -> int | None:
    """Return the number of consecutive elements of an axis that share a scale; None if the counts do not fit."""
    if scales == 1:
        return size
    if block is not None and -(-size // block[axis]) == scales:
        return block[axis]
    return size // scales if scales > 0 and size % scales == 0 else None


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the numbers in the last axis of int32 words, lowest bits first: ``[…, n]`` → uint8 ``[…, n·32/bits]``."""
    shifts = np.arange(0, _WORD_BITS, bits, dtype=np.uint32)
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    numbers = np.empty((*words.shape, len(shifts)), np.uint8)
    for i, shift in enumerate(shifts):
        numbers[..., i] = unsigned >> shift & np.uint32((1 << bits) - 1)
    return numbers.reshape(*words.shape[:-1], -1)
