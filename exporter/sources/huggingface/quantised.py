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
from dataclasses import dataclass
from functools import partial

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from ...block_formats import FLOAT_GROUP, GROUP
from ..base import QuantisedBlocks, SourceTensor
from . import bitsandbytes
from .affine import Affine, are_halves
from .parts import FLOATS, REMEDY, Parts, RawTensor

# For each of eight consecutive outputs, the half byte of an int32 that contains it, counted from the lowest bits.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_WORD_BITS = 32
_BITS = (1, 2, 4, 8)
# Endings of the names of tensors that only concern activations.
_ACTIVATIONS = (
    ".input_scale",
    ".input_zero_point",
    ".activation_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
)
# The bits of the integers in each layout.
_LAYOUT_BITS = {"gptq": (2, 4, 8), "awq": (4,)}
# AutoRound's packing formats: the layout, and the number to add to stored zero points.
_AUTO_ROUND: Mapping[str, tuple[str, int | None]] = {
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round:gptqmodel": ("gptq", 0),
    "auto_round": ("gptq", 0),
    "auto_round:auto_awq": ("awq", 0),
}
# transformers' default for FP8.
_FP8_BLOCK = [128, 128]
# The readable formats of compressed-tensors; None for a config that names no format.
_COMPRESSED = (
    None,
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """The quantisation that a checkpoint's config describes.

    Attributes:
        method: the method that the config names, for messages.
        layout: "gptq", "awq", "fp8", "compressed-tensors" or "bitsandbytes": the tensors that store a weight.
        bits: number of bits of a packed number, unless the shapes of the tensors show another; 0 if it follows from
            the shapes alone.
        zero_offset: the number to add to stored zero points.
        group: number of consecutive inputs that share a scale; 0 if it follows from the shapes.
        groups_differ: True if some modules may have groups of another size.
        block: rows and columns of a block that shares a scale; None if they follow from the shapes.
    """

    method: str
    layout: str
    bits: int = 0
    zero_offset: int = 0
    group: int = 0
    groups_differ: bool = False
    block: tuple[int, int] | None = None


def quantisation_of(method: str, config: Mapping[str, object]) -> Quantisation | None:
    """Return the quantisation that a ``quantization_config`` describes; None if precast cannot read it."""
    if (found := _integers(method, config)) is not None:
        layout, bits, zero_offset = found
        return Quantisation(
            method=method,
            layout=layout,
            bits=bits,
            zero_offset=zero_offset,
            group=_group_size(config),
            groups_differ=bool(config.get("dynamic") or config.get("extra_config")),
        )
    match method:
        case "fp8":
            block = _block(config.get("weight_block_size", _FP8_BLOCK))
            return Quantisation(method=method, layout="fp8", block=block)
        case "compressed-tensors" if _is_readable(config):
            block = _block(_block_structure(config.get("config_groups")))
            return Quantisation(method=method, layout=method, block=block)
        case "bitsandbytes":
            return Quantisation(method=method, layout=method)
    return None


def _integers(method: str, config: Mapping[str, object]) -> tuple[str, int, int] | None:
    """Return the layout, the bits and the offset of the zero points of a config of GPTQ, AWQ or AutoRound."""
    bits = config.get("bits", config.get("w_bit", 4))
    if type(bits) is not int:
        return None
    stated = config.get("checkpoint_format")
    match method:
        case "gptq" if not config.get("is_marlin_format"):
            layout, offset = "gptq", {"": 1, "gptq": 1, "gptq_v2": 0}.get(_text(stated))
        case "awq" if _text(config.get("version") or stated or "gemm").lower() == "gemm":
            layout, offset = "awq", 0
        case "auto-round" | "intel/auto-round" if config.get("data_type", "int") == "int":
            layout, offset = _AUTO_ROUND.get(_text(config.get("packing_format")), ("", None))
        case _:
            return None
    return None if offset is None or bits not in _LAYOUT_BITS[layout] else (layout, bits, offset)


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else "?"


def _group_size(config: Mapping[str, object]) -> int:
    """Return the number of inputs in a group; 0 if it is -1 (a single group) or not stated."""
    size = config.get("group_size", config.get("q_group_size"))
    return size if type(size) is int and size > 0 else 0


def _is_readable(config: Mapping[str, object]) -> bool:
    """Return True if a config of compressed-tensors has a known format, and neither sparse nor transformed weights.

    Seven bits would take the space of eight, so the shapes would not tell them apart.
    """
    sparsity = config.get("sparsity_config") or {"format": "dense"}
    is_dense = isinstance(sparsity, dict) and sparsity.get("format") in (None, "dense")
    # A transform rotates the activations at run time, so the weights alone are not the model.
    has_known_bits = all(
        weights.get("num_bits", 4) in _BITS for weights in _weight_schemes(config.get("config_groups"))
    )
    is_known = config.get("format") in _COMPRESSED and not config.get("transform_config")
    return is_dense and is_known and has_known_bits


def _weight_schemes(groups: object) -> list[Mapping[str, object]]:
    """Return the descriptions of weights in the ``config_groups`` of compressed-tensors."""
    found = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    return [weights for weights in found if isinstance(weights, dict)]


def _block_structure(groups: object) -> object:
    """Return the first `block_structure` in the ``config_groups`` of compressed-tensors; None if there is none."""
    return next((w["block_structure"] for w in _weight_schemes(groups) if w.get("block_structure")), None)


def _block(size: object) -> tuple[int, int] | None:
    """Return the rows and columns of a block; None if `size` is not a list of two positive integers."""
    match size:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


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
        "compressed-tensors": ((".weight_packed", _packed), scale),
        "bitsandbytes": ((".weight.absmax", bitsandbytes.four_bits), (".SCB", bitsandbytes.eight_bits)),
    }
    for ending, make in readers[quantisation.layout]:
        for name in [name for name in left if name.endswith(ending)]:
            if name in left:
                base = name.removesuffix(ending)
                found[f"{base}.weight"] = make(Parts(left, base))
    return found | {name: _plain(name, tensor) for name, tensor in left.items()}


_NUMBERS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _plain(name: str, tensor: RawTensor) -> SourceTensor:
    if tensor.dtype not in FLOATS:
        raise PrecastError(
            f"{tensor.where}: expected {name} to be F32, F16 or BF16, or to belong to a quantised weight, found"
            f" {tensor.dtype}; {REMEDY}."
        )
    return SourceTensor(
        shape=tensor.shape, dtype=_NUMBERS[tensor.dtype], read=lambda: tensor.read().astype(np.float32)
    )


def _size(quantisation: Quantisation, inputs: int, groups: int) -> int:
    """Return the stated number of inputs in a group; 0 if this weight does not have it and modules may differ."""
    size = quantisation.group
    fits = size > 0 and -(-inputs // size) == groups
    return size if fits or not quantisation.groups_differ else 0


def _gptq(quantisation: Quantisation, parts: Parts) -> SourceTensor:
    words, zeros = parts.take(".qweight", ("I32",)), parts.take(".qzeros", ("I32",))
    scales, index = parts.take(".scales", FLOATS), parts.find(".g_idx", ("I32", "I64"), 1)
    (packed, outs), groups = words.shape, scales.shape[0]
    # A config may state other bits for some modules, by patterns of their names. The zero points show the bits.
    fitting = [b for b in _LAYOUT_BITS["gptq"] if zeros.shape[1] == -(-outs * b // _WORD_BITS)]
    bits = fitting[0] if fitting and quantisation.bits not in fitting else quantisation.bits
    per = _WORD_BITS // bits
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
        size=_size(quantisation, inputs, groups),
        numbers=lambda: _unpacked(words.read().T, bits),
        zeros=lowest,
        scales=lambda: scales.read().T,
        index=None if index is None else index.read,
    ).source()


def _awq(quantisation: Quantisation, parts: Parts) -> SourceTensor:
    words, zeros = parts.take(".qweight", ("I32",)), parts.take(".qzeros", ("I32",))
    scales = parts.take(".scales", FLOATS)
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
        size=_size(quantisation, inputs, groups),
        numbers=lambda: ordered(words.read()),
        zeros=lambda: ordered(zeros.read()).astype(np.float32),
        scales=lambda: scales.read().T,
        index=None,
    ).source()


def _packed(parts: Parts) -> SourceTensor:
    words, stated = parts.take(".weight_packed", ("I32",)), parts.take(".weight_shape", ("I64", "I32"), 1)
    scales, zeros = (
        parts.take(".weight_scale", FLOATS, None),
        parts.find(".weight_zero_point", ("I32", "I8"), None),
    )
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
        size=0,
        numbers=lambda: _unpacked(words.read(), bits)[:, :inputs],
        zeros=lowest,
        scales=lambda: np.broadcast_to(scales.read().reshape(-1, groups), (outs, groups)),
        index=index,
    ).source()


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
    sizes = [
        _spread(n, count, quantisation.block, axis)
        for axis, (n, count) in enumerate(zip(weight.shape, (1, 1, *scales.shape)[-2:], strict=True))
    ]
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

    is_float = weight.dtype == "F8_E4M3"
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
