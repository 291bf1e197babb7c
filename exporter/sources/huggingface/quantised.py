"""Dequantise the weights of checkpoints in GPTQ, AWQ, FP8, compressed-tensors or bitsandbytes format.

The formats store a matrix ``[out, in]`` as small numbers and scales, in several tensors. The names of these tensors
begin like the name of the matrix. A weight is the product of a number and its scale. precast computes it in float32;
the formats' own libraries may compute it in float16 or bfloat16, which rounds it.

- GPTQ: each int32 of ``qweight [in·b/32, out]`` contains b-bit numbers of consecutive inputs. Each int32 of
  ``qzeros [groups, out·b/32]`` contains b-bit zero points of consecutive outputs, which are too small by 1 unless
  ``checkpoint_format`` is "gptq_v2". ``scales`` is ``[groups, out]``. ``g_idx [in]`` is the group of each input.
  AutoRound's ``packing_format`` names one of these layouts, or AWQ's.
- AWQ, version "gemm": ``qweight [in, out/8]`` and ``qzeros [groups, out/8]``. An int32 contains numbers of eight
  outputs, in the order `_AWQ_ORDER`. ``scales`` is ``[groups, out]``.
- FP8: ``weight [out, in]`` in float8_e4m3fn, and ``weight_scale_inv`` with a scale for each block of
  ``weight_block_size``.
- compressed-tensors: ``weight_packed [out, in·b/32]`` and ``weight_shape``, or ``weight`` in int8 or float8_e4m3fn. The
  tensors ``weight_scale``, ``weight_zero_point`` and ``weight_g_idx`` belong to either.
- bitsandbytes: see `bitsandbytes`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from ...block_formats import FLOAT_GROUP, GROUP
from ..base import QuantisedBlocks, SourceTensor
from . import bitsandbytes
from .affine import Affine, are_halves
from .parts import BUFFERS, FLOATS, ORIGINAL, REMEDY, Parts, RawTensor
from .quantisation import BITS, Quantisation, Settings

# For each of eight consecutive outputs, the half byte of an int32 that contains it, counted from the lowest bits.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_WORD_BITS = 32
# The layouts that store every matrix as [out, in]. Their libraries replace GPT-2's modules, which store [in, out].
_LINEAR_LAYOUTS = ("gptq", "awq", "bitsandbytes")
# Endings of the names of tensors that only concern activations.
_ACTIVATIONS = (
    ".input_scale",
    ".input_zero_point",
    ".activation_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
)
Reader = Callable[[Parts], SourceTensor]


def dequantised(raw: Mapping[str, RawTensor], quantisation: Quantisation) -> dict[str, SourceTensor]:
    """Return the tensors of a quantised checkpoint by name, as if the checkpoint were not quantised.

    Raises:
        PrecastError: a tensor is missing, or has the wrong type or shape.
    """
    left = {name: tensor for name, tensor in raw.items() if not name.endswith(_ACTIVATIONS)}
    found: dict[str, SourceTensor] = {}
    scale: tuple[str, Reader] = (".weight_scale", partial(_scaled, quantisation, ".weight_scale"))
    readers: Mapping[str, tuple[tuple[str, Reader], ...]] = {
        "gptq": ((".qweight", partial(_gptq, quantisation)),),
        "awq": ((".qweight", partial(_awq, quantisation)),),
        "fp8": ((".weight_scale_inv", partial(_scaled, quantisation, ".weight_scale_inv")), scale),
        "compressed-tensors": ((".weight_packed", partial(_packed, quantisation)), scale),
        "bitsandbytes": ((".weight.absmax", bitsandbytes.four_bits), (".SCB", bitsandbytes.eight_bits)),
    }
    for ending, make in readers[quantisation.layout]:
        for name in [name for name in left if name.endswith(ending)]:
            if name in left:
                base = name.removesuffix(ending)
                weight = make(Parts(left, base))
                found[f"{base}.weight"] = replace(weight, is_linear=quantisation.layout in _LINEAR_LAYOUTS)
    return found | {name: _plain(name, tensor) for name, tensor in left.items()}


_NUMBERS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _plain(name: str, tensor: RawTensor) -> SourceTensor:
    if tensor.dtype not in FLOATS and not name.endswith(BUFFERS):
        raise PrecastError(
            f"{tensor.where}: expected {name} to be F32, F16 or BF16, or to belong to a quantised weight, found"
            f" {tensor.dtype}; {REMEDY}."
        )
    return SourceTensor(
        shape=tensor.shape,
        dtype=_NUMBERS.get(tensor.dtype, tensor.dtype),
        read=lambda: tensor.read().astype(np.float32),
    )


def _stated(settings: Settings | None, parts: Parts) -> Settings:
    """Return the settings of a module that has a quantised weight.

    Raises:
        PrecastError: the config says that the module is not quantised.
    """
    if settings is None:
        fault = "quantization_config excludes this module, but its weight is quantised"
        raise parts.fail(fault, ORIGINAL)
    return settings


def _gptq(quantisation: Quantisation, parts: Parts) -> SourceTensor:
    words, zeros = parts.take(".qweight", ("I32",)), parts.take(".qzeros", ("I32",))
    scales, index = parts.take(".scales", FLOATS), parts.find(".g_idx", ("I32", "I64"), 1)
    (packed, outs), groups = words.shape, scales.shape[0]
    settings = _stated(quantisation.settings_of(parts.base), parts)
    bits = settings.bits
    per = _WORD_BITS // bits
    inputs = packed * per
    if scales.shape != (groups, outs) or zeros.shape != (groups, -(-outs // per)) or groups == 0:
        raise parts.fail(
            f"expected scales [groups, {outs}] and qzeros [groups, {-(-outs // per)}] for {bits} bits, found"
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
        size=settings.group,
        numbers=lambda: _unpacked(words.read().T, bits),
        zeros=lowest,
        scales=lambda: scales.read().T,
        index=None if index is None else index.read,
    ).source()


def _awq(quantisation: Quantisation, parts: Parts) -> SourceTensor:
    words, zeros = parts.take(".qweight", ("I32",)), parts.take(".qzeros", ("I32",))
    scales = parts.take(".scales", FLOATS)
    (inputs, packed), groups = words.shape, scales.shape[0]
    outs, settings = packed * len(_AWQ_ORDER), _stated(quantisation.settings_of(parts.base), parts)
    if scales.shape != (groups, outs) or zeros.shape != (groups, packed) or groups == 0:
        raise parts.fail(
            f"expected scales [groups, {outs}] and qzeros [groups, {packed}], found {list(scales.shape)} and"
            f" {list(zeros.shape)}"
        )

    def ordered(array: np.ndarray) -> np.ndarray:
        numbers = _unpacked(array, settings.bits).reshape(len(array), packed, len(_AWQ_ORDER))
        return numbers[..., _AWQ_ORDER].reshape(len(array), outs).T  # [out, …]

    return Affine(
        fail=parts.fail,
        shape=(outs, inputs),
        dtype="AWQ, 4 bits",
        bits=settings.bits,
        groups=groups,
        size=settings.group,
        numbers=lambda: ordered(words.read()),
        zeros=lambda: ordered(zeros.read()).astype(np.float32),
        scales=lambda: scales.read().T,
        index=None,
    ).source()


def _packed(quantisation: Quantisation, parts: Parts) -> SourceTensor:
    words, stated = parts.take(".weight_packed", ("I32",)), parts.take(".weight_shape", ("I64", "I32"), 1)
    scales, zeros = (
        parts.take(".weight_scale", FLOATS, None),
        parts.find(".weight_zero_point", ("I32", "I8"), None),
    )
    shape = tuple(int(n) for n in stated.read())
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    fits = partial(_fits_packed, words.shape[1], shape[-1] if shape else 0, groups)
    settings = _stated(quantisation.settings_of(parts.base, fits=fits), parts)
    has_inputs = len(shape) == 2 and shape[1] > 0
    bits = settings.bits or (_WORD_BITS * words.shape[1] // shape[1] if has_inputs else 0)
    if not has_inputs or bits not in BITS or words.shape != (shape[0], -(-shape[1] * bits // _WORD_BITS)):
        raise parts.fail(
            f"weight_packed {list(words.shape)} cannot store a weight of shape {list(shape)} in"
            f" {settings.bits or '1, 2, 4 or 8'} bits"
        )
    outs, inputs = shape
    if scales.shape not in ((outs, groups), (1,), ()) or groups == 0:
        raise parts.fail(f"expected weight_scale [{outs}, groups], found {list(scales.shape)}")
    index = _group_index(parts, inputs)
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
        size=settings.group if groups > 1 else 0,
        numbers=lambda: _unpacked(words.read(), bits)[:, :inputs],
        zeros=lowest,
        scales=lambda: np.broadcast_to(scales.read().reshape(-1, groups), (outs, groups)),
        index=index,
    ).source()


def _fits_packed(words: int, inputs: int, groups: int, settings: Settings) -> bool:
    """Return True if the settings fit the numbers of words, inputs and groups in a row of packed integers."""
    has_bits = settings.bits == 0 or words == -(-inputs * settings.bits // _WORD_BITS)
    return has_bits and (settings.group == 0 or groups == 1 or groups == -(-inputs // settings.group))


def _group_index(parts: Parts, inputs: int) -> Callable[[], np.ndarray] | None:
    """Return the reader of the index of each input's group; None if each group consists of consecutive inputs.

    The library writes −1 where it has determined no order.
    """
    stored = parts.find(".weight_g_idx", ("I32", "I64"), 1)
    if stored is None:
        return None
    if stored.shape != (inputs,):
        raise parts.fail(f"expected weight_g_idx to have {inputs} elements, found {list(stored.shape)}")
    return None if (stored.read() == -1).all() else stored.read


def _scaled(quantisation: Quantisation, ending: str, parts: Parts) -> SourceTensor:
    # With the method "fp8", a byte of an int8 weight contains two 4-bit numbers, which precast does not read.
    types = ("F8_E4M3",) if quantisation.layout == "fp8" else ("F8_E4M3", "I8")
    weight = parts.take(".weight", types)
    scales = parts.take(ending, FLOATS, None)
    zeros = parts.find(".weight_zero_point", ("I8", "F8_E4M3"), None)
    is_float = weight.dtype == "F8_E4M3"
    sizes_of = partial(_block_sizes, weight.shape, scales.shape)
    found = quantisation.settings_of(parts.base, is_float=is_float, fits=lambda s: None not in sizes_of(s))
    sizes = sizes_of(_stated(found, parts))
    # One axis of scales could belong to the outputs or to the inputs.
    is_ambiguous = len(scales.shape) == 1 and scales.shape != (1,)
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
        return _spread_blocks(coefficients.astype(np.float32), weight.shape, sizes)

    def read() -> np.ndarray:
        numbers = weight.read().astype(np.float32)
        if zeros is not None:
            numbers -= spread(zeros.read())
        numbers *= spread(scales.read())
        return numbers

    group = FLOAT_GROUP if is_float else GROUP

    def blocks() -> QuantisedBlocks:
        codes, scale = weight.read().view(np.int8), spread(scales.read())
        if is_float and (codes & 127 == 127).any():
            raise parts.fail("expected numbers in weight, found NaN")
        scale = np.broadcast_to(scale, weight.shape)[:, ::group]
        return QuantisedBlocks(
            format="e4m3" if is_float else "q8_0",
            codes=codes,
            coefficients=(scale.astype(np.float32 if is_float else np.float16),),
        )

    rows, columns = weight.shape
    has_groups = sizes[1] is not None and (sizes[1] == columns or sizes[1] % group == 0)
    is_exact = zeros is None and has_groups and (is_float or are_halves(scales.read()))
    return SourceTensor(
        shape=(rows, columns),
        dtype="FP8" if is_float else "8 bits",
        read=read,
        block_format=("e4m3" if is_float else "q8_0") if is_exact else None,
        blocks=blocks if is_exact else None,
    )


def _block_sizes(shape: tuple[int, ...], scales: tuple[int, ...], settings: Settings) -> list[int | None]:
    """Return `_spread` of each axis of a matrix, from the shapes of the matrix and its scales."""
    counts = (1, 1, *scales)[-2:]
    return [_spread(shape[axis], counts[axis], settings.block, axis) for axis in (0, 1)]


def _spread_blocks(
    coefficients: np.ndarray, shape: tuple[int, ...], sizes: Sequence[int | None]
) -> np.ndarray:
    """Repeat the coefficients of blocks for every element of a matrix.

    Args:
        coefficients: one for each block, ``[…]`` with up to two axes.
        shape: shape of the matrix.
        sizes: rows and columns of a block. An axis that is a single block is not repeated.
    """
    whole = coefficients.reshape((1, 1, *coefficients.shape)[-2:])
    for axis, size in enumerate(sizes):
        if size is not None and size != shape[axis]:
            whole = np.repeat(whole, size, axis)
    return whole[: shape[0], : shape[1]]


def _spread(size: int, scales: int, block: tuple[int, int] | None, axis: int) -> int | None:
    """Return the number of consecutive elements of an axis that share a scale.

    Args:
        size: number of elements of the axis.
        scales: number of scales along the axis.
        block: rows and columns of a block that shares a scale; None if the config does not state them.
        axis: 0 for the outputs, 1 for the inputs.

    Returns:
        The number; None if `scales` fits neither the block nor equal parts of the axis.
    """
    if scales == 1:
        return size
    if block is not None and -(-size // block[axis]) == scales:
        return block[axis]
    if block is not None and scales != size:
        return None
    return size // scales if scales > 0 and size % scales == 0 else None


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack the numbers of int32 words, lowest bits first: ``[…, n]`` → uint8 ``[…, n·32/bits]``."""
    shifts = np.arange(0, _WORD_BITS, bits, dtype=np.uint32)
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    numbers = np.empty((*words.shape, len(shifts)), np.uint8)
    for i, shift in enumerate(shifts):
        numbers[..., i] = unsigned >> shift & np.uint32((1 << bits) - 1)
    return numbers.reshape(*words.shape[:-1], -1)
