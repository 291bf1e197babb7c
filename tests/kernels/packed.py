"""Stacks of weights as the kernels' operands, in every format."""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from precast.exporter.block_formats import (
    BLOCK_FORMATS,
    FLOAT_GROUP,
    GROUP,
    SUPER,
    UNIT,
    BlockFormat,
    Scales,
)
from precast.exporter.quantize import FORMATS

NAMES = (*FORMATS, *BLOCK_FORMATS)
# The formats whose activations are quantised to 16 bits, and to 8 bits.
WIDE = ("int8", "q8_0", "iq4_nl", "iq4_xs")
NARROW = ("int4", "int4-symmetric", *(name for name in BLOCK_FORMATS if name not in (*WIDE, "e4m3")))


def pack(name: str, stack: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return a stack ``[L, out, in]`` as the kernels' operands, and its decoded values in float64.

    In block formats, the weights are random, and as large as those of the stack.
    """
    if name in BLOCK_FORMATS:
        return pack_mixed([name] * len(stack), stack)
    layers = [FORMATS[name].encode(matrix) for matrix in stack]
    decoded = [FORMATS[name].decode(layer, *stack.shape[1:]) for layer in layers]
    return [np.stack(arrays) for arrays in zip(*layers, strict=True)], np.stack(decoded).astype(np.float64)


def pack_mixed(names: Sequence[str], stack: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the operands and the values of random mixed weights, as large as those of a stack ``[L, out, in]``."""
    _, outs, size = stack.shape
    rng = np.random.default_rng(outs + size)
    records = [
        random_records(rng, BLOCK_FORMATS[name], matrix) for name, matrix in zip(names, stack, strict=True)
    ]
    decoded = [BLOCK_FORMATS[name].decode(r, outs, size) for name, r in zip(names, records, strict=True)]
    return mixed(names, records), np.stack(decoded).astype(np.float64)


def mixed(names: Sequence[str], records: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the operands of matrices in block formats: units of bytes, and the table. The last matrix comes first."""
    order = range(len(records))[::-1]
    starts, units = np.zeros(len(records), np.int32), 0
    for i in order:
        starts[i], units = units, units + records[i].size // UNIT
    values = np.concatenate([records[i].reshape(-1, UNIT) for i in order])
    codes = np.int32([BLOCK_FORMATS[name].code for name in names])
    return [values, np.stack([codes, starts], axis=1)]


def random_records(rng: np.random.Generator, kind: BlockFormat, matrix: np.ndarray) -> np.ndarray:
    """Return the records of random weights of about the magnitude of those in a matrix."""
    outs, size = matrix.shape
    most = float(np.abs(matrix).max(initial=0.0))

    def halves(n: int, factor: float, *, signed: bool) -> np.ndarray:
        signs = rng.choice([-1.0, 1.0], (outs, n)) if signed else 1.0
        return (rng.uniform(0.5, 1.5, (outs, n)) * signs * factor).astype(np.float16)

    groups, step = -(-size // GROUP), most / 2 ** (kind.bits if kind.codebook is None else 7)
    supers = -(-groups // SUPER)
    match kind.scales:
        case Scales.HALF:
            coefficients = [halves(groups, step, signed=True)]
        case Scales.HALF_AND_MINIMUM:
            coefficients = [halves(groups, step, signed=True), halves(groups, most, signed=True)]
        case Scales.SUPER:
            codes = (rng.integers(0, 64, (outs, groups), np.uint8) for _ in range(2))
            coefficients = [
                halves(supers, step / 63, signed=True),
                halves(supers, most / 63, signed=True),
                *codes,
            ]
        case Scales.SUPER_OF_16:
            scales = rng.integers(-128, 128, (outs, 2 * groups), np.int8)
            coefficients = [halves(supers, step / 127, signed=True), scales]
        case Scales.SUPER_SIGNED:
            scales = rng.integers(-32, 32, (outs, groups), np.int8)
            coefficients = [halves(supers, step / 31, signed=True), scales]
        case Scales.EXPONENT:
            exponent = int(np.floor(np.log2(max(most, 1e-30) / 12))) + 128
            coefficients = [rng.integers(exponent - 1, exponent + 2, (outs, groups)).astype(np.uint8)]
        case Scales.FLOAT:
            coefficients = [halves(-(-size // FLOAT_GROUP), most / 448, signed=True).astype(np.float32)]
    codes = rng.integers(-128, 128, (outs, size), np.int8)
    if kind.has_float_codes:
        codes[codes & 127 == 127] = 0  # NaN
    if kind.bits < 8:
        codes = codes.view(np.uint8) & (2**kind.bits - 1)
        codes[:, :1] = 2**kind.bits - 1  # a row of zeros would allow a product no error
    return kind.pack(codes, *coefficients)


def whole_numbers(
    name: str, rng: np.random.Generator, shape: tuple[int, int, int], *, layer: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return a stack of small whole numbers that the format holds exactly, as operands and as float32.

    The scales, or the values of float formats, of layers other than `layer` are NaN.
    """
    values = rng.integers(-7, 9, shape).astype(np.float32)
    if name in BLOCK_FORMATS:
        return _whole_numbers_in_blocks(BLOCK_FORMATS[name], values, layer)
    if name not in (*WIDE, *NARROW):
        operands = pack(name, values)[0]
        operands[0][np.arange(shape[0]) != layer] = np.nan
        return operands, values
    # Scale 1 for every weight, for int4 the minimum -7, and symmetric weights from -8 to 7.
    least = 8 if name == "int4-symmetric" else 7
    values = values - (least - 7)
    stored = [np.zeros(a.shape, a.numpy_dtype) for a in FORMATS[name].arrays(shape)]
    _, outs, size = shape
    o, k = np.meshgrid(np.arange(outs), np.arange(size), indexing="ij")
    if name == "int8":
        stored[0][:, o // 16, k // 2, o % 16, k % 2] = values.astype(np.int8)
    else:
        shifted = (values + least).astype(np.uint8) << np.where(k % 8 < 4, 0, 4).astype(np.uint8)
        for half in (k % 8 < 4, k % 8 >= 4):
            stored[0][:, (o // 16)[half], (k // 8)[half], (o % 16)[half], (k % 4)[half]] |= shifted[:, half]
        if name == "int4":
            stored[2][:, o // 16, k // 32, o % 16] = -7.0
    stored[1][:, o // 16, k // 32, o % 16] = 1.0
    stored[1][np.arange(shape[0]) != layer] = np.nan
    return stored, values


def _whole_numbers_in_blocks(
    kind: BlockFormat, values: np.ndarray, layer: int
) -> tuple[list[np.ndarray], np.ndarray]:
    has_minima = kind.scales in (Scales.HALF_AND_MINIMUM, Scales.SUPER)
    if kind.has_float_codes:
        codes = values.astype(ml_dtypes.float8_e4m3fn).view(np.int8)
    elif kind.codebook is not None:
        integers = np.float32(kind.codebook)
        codes = np.abs(values[..., None] - integers).argmin(axis=-1).astype(np.uint8)
        values = integers[codes]
    else:
        if not has_minima:
            values = values - 1  # -8 to 7
        codes = (values + (7 if has_minima else kind.zero)).astype(np.int8 if kind.bits == 8 else np.uint8)
    records = []
    for i, matrix in enumerate(codes):
        shapes = kind.coefficient_shapes(matrix.shape[1])
        coefficients = [np.ones((len(matrix), n), dtype) for n, dtype in shapes]
        if has_minima:
            coefficients[-1][:] = -7 if kind.scales is Scales.HALF_AND_MINIMUM else 7
        if kind.scales is Scales.EXPONENT:
            coefficients[0][:] = 128 if i == layer else 255
        elif i != layer:
            coefficients[0][:] = np.nan
        records.append(kind.pack(matrix, *coefficients))
    return mixed([kind.name] * len(records), records), values
