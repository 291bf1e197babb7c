"""Quantise matrices to block formats: search for the coefficients of each group, and round the weights.

In a format with super-groups, each scale is the product of a code, which is a small integer, and a factor that all
groups of the super-group share. Minima have codes and a factor too. The search first finds the best scale and minimum
of each group alone, and rounds them to codes. Then it repeats two steps. The first step keeps the factors and replaces
codes by neighbours that have a smaller error. The second step keeps the codes and fits the factors by least squares.
"""

from functools import partial
from itertools import product

import ml_dtypes
import numpy as np

from . import scales
from .block_formats import FLOAT_GROUP, GROUP, SUPER, BlockFormat, Scales, for_row_blocks, spread
from .quantize import check_range
from .scales import HALF_MAX, INT8_MAX, LARGEST_POWER, Grid, inverse, near_half

# The largest code of a scale or a minimum in the formats with super-groups.
_LARGEST_CODES = {Scales.SUPER: 63, Scales.SUPER_OF_16: 127, Scales.SUPER_SIGNED: 31}
_SIGNED = (Scales.SUPER_OF_16, Scales.SUPER_SIGNED)
# The exponent of EXPONENT scales that represents 1.
_EXPONENT_ZERO = 128
# Number of times that the search repeats both steps.
_REFITS = 2

# The coefficients of a matrix, in the form that `BlockFormat.pack` requires.
Coefficients = tuple[np.ndarray, ...]


def encode(block_format: BlockFormat, matrix: np.ndarray, name: str = "a matrix") -> np.ndarray:
    """Quantise a matrix, with a small sum of the squared errors of its weights.

    Args:
        block_format: the format.
        matrix: float32 ``[out, in]``, finite.
        name: the matrix's name in messages.

    Returns:
        The records, uint8 ``[panels, record_bytes]``.

    Raises:
        PrecastError: the format cannot represent one of the values.
    """
    check_largest(block_format, matrix, name)
    codes, *coefficients = quantise(block_format, matrix)
    return block_format.pack(codes, *coefficients)


def quantise(
    block_format: BlockFormat, matrix: np.ndarray, importance: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Quantise a matrix. Return its codes ``[out, in]`` and coefficients, in the form that `BlockFormat.pack` requires.

    Args:
        block_format: the format.
        matrix: float32 ``[out, in]``.
        importance: the weight of the squared errors of each input ``[in]``; None for equal weights.
    """
    if block_format.has_float_codes:
        return _quantise_to_e4m3(matrix)
    outs, inputs = matrix.shape
    codes = np.empty(matrix.shape, code_type(block_format))
    coefficients = tuple(np.empty((outs, n), dtype) for n, dtype in block_format.coefficient_shapes(inputs))

    def store(rows: slice) -> None:
        block = matrix[rows]
        found = fit(block_format, block, importance)
        for array, part in zip(coefficients, found, strict=True):
            array[rows] = part
        codes[rows] = round_weights(block_format, block, *effective(block_format, found))

    for_row_blocks(outs, inputs, store)
    return codes, *coefficients


def _quantise_to_e4m3(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes and the scales, with which the largest weight of a group becomes the largest number."""
    outs, inputs = matrix.shape
    size = -(-inputs // FLOAT_GROUP) * FLOAT_GROUP
    groups = np.pad(matrix, ((0, 0), (0, size - inputs))).reshape(outs, -1, FLOAT_GROUP)
    most = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    scale = np.abs(groups).max(axis=2) / np.float32(most)
    numbers = np.clip(groups * inverse(scale)[..., None], -most, most).astype(ml_dtypes.float8_e4m3fn)
    return np.ascontiguousarray(numbers.reshape(outs, size)[:, :inputs]).view(np.int8), scale


def fit(
    block_format: BlockFormat,
    block: np.ndarray,
    importance: np.ndarray | None = None,
    factors: Coefficients | None = None,
) -> Coefficients:
    """Return coefficients for some rows of a matrix, with a small squared error.

    Args:
        block_format: the format.
        block: the rows, float32 ``[rows, in]``.
        importance: the weight of the squared errors of each input ``[in]``; None for equal weights.
        factors: the result of `fit_factors`, to be used unchanged; None to search for factors too.
    """
    x, weight = _columns(block_format, block, importance)
    shape = (len(block), -1)
    numbers = grid(block_format)
    match block_format.scales:
        case Scales.EXPONENT:
            _, exponents = scales.quantise_with_exponents(x, numbers, weight)
            return ((exponents + _EXPONENT_ZERO).astype(np.uint8).reshape(shape),)
        case Scales.HALF if importance is None:
            without = partial(scales.quantise_without_minimum, grid=numbers)
            quantise_groups = scales.quantise_int8 if block_format.bits == 8 else without
            return (quantise_groups(x)[1].reshape(shape),)
        case Scales.HALF_AND_MINIMUM if importance is None:
            return tuple(c.reshape(shape) for c in scales.quantise_with_minimum(x, numbers.highest)[1:])
        case Scales.HALF | Scales.HALF_AND_MINIMUM:
            found = _fit_groups(block_format, x, weight)
            return tuple(near_half(c).reshape(shape) for c in found if c is not None)
    return _fit_super(block_format, x, weight, len(block), factors)


def fit_factors(block_format: BlockFormat, block: np.ndarray, importance: np.ndarray) -> Coefficients:
    """Return the factors of the super-groups, which are the first coefficients; empty for formats without them."""
    if block_format.scales not in (Scales.SUPER, Scales.SUPER_OF_16, Scales.SUPER_SIGNED):
        return ()
    x, weight = _columns(block_format, block, importance)
    return tuple(_search_factors(block_format, x, weight, len(block))[0])


def effective(block_format: BlockFormat, coefficients: Coefficients) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the scales and the minima of the groups, each float32 ``[rows, n]``; None for absent minima."""
    floats = [c.astype(np.float32) for c in coefficients]
    match block_format.scales:
        case Scales.HALF:
            return floats[0], None
        case Scales.HALF_AND_MINIMUM:
            return floats[0], floats[1]
        case Scales.SUPER:
            factor, low_factor, scale, minimum = floats
            return _spread(block_format, factor, scale.shape) * scale, -(
                _spread(block_format, low_factor, scale.shape) * minimum
            )
        case Scales.SUPER_OF_16 | Scales.SUPER_SIGNED:
            return _spread(block_format, floats[0], floats[1].shape) * floats[1], None
        case Scales.EXPONENT:
            return np.ldexp(np.float32(1), coefficients[0].astype(np.int32) - _EXPONENT_ZERO), None
        case Scales.FLOAT:
            raise ValueError("e4m3 has no integers to round to")


def round_weights(
    block_format: BlockFormat, block: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None
) -> np.ndarray:
    """Round the weights of a block of rows to codes ``[rows, in]``, with the scales and minima of `effective`."""
    x, _ = _columns(block_format, block, None)
    low = None if minimum is None else minimum.reshape(-1)
    integers, _ = scales.round_to(x, grid(block_format), scale.reshape(-1), low)
    return codes_of(block_format, integers.T.reshape(len(block), -1)[:, : block.shape[1]])


def codes_of(block_format: BlockFormat, integers: np.ndarray) -> np.ndarray:
    """Return the codes that represent these integers, in the type that `BlockFormat.pack` requires."""
    if block_format.codebook is None:
        return (integers + block_format.zero).astype(code_type(block_format))
    least = min(block_format.codebook)
    codes = np.zeros(max(block_format.codebook) - least + 1, code_type(block_format))
    for code, integer in reversed(list(enumerate(block_format.codebook))):  # the first code of equal integers
        codes[integer - least] = code
    return codes[(integers - np.float32(least)).astype(np.intp)]


def code_type(block_format: BlockFormat) -> np.dtype:
    """Return the type of codes that `BlockFormat.pack` requires."""
    return np.dtype(np.int8 if block_format.bits == 8 else np.uint8)


def grid(block_format: BlockFormat) -> Grid:
    """Return the integers that the codes of a format represent."""
    if block_format.codebook is not None:
        return Grid(min(block_format.codebook), max(block_format.codebook), block_format.codebook)
    if block_format.bits == 8:
        return Grid(-INT8_MAX, INT8_MAX)
    return Grid(-block_format.zero, (1 << block_format.bits) - 1 - block_format.zero)


def check_largest(block_format: BlockFormat, matrix: np.ndarray, name: str) -> None:
    """Check that a format can represent all values of a matrix.

    Raises:
        PrecastError: the format cannot represent one of the values.
    """
    largest_code = _LARGEST_CODES.get(block_format.scales, 1)
    match block_format.scales:
        case Scales.FLOAT:
            largest = float(np.finfo(np.float32).max)
        case Scales.EXPONENT:
            largest = LARGEST_POWER * -grid(block_format).lowest
        case _:
            largest = HALF_MAX * largest_code * max(-grid(block_format).lowest, 1)
    check_range(matrix, name, block_format.name, largest)


def _columns(
    block_format: BlockFormat, block: np.ndarray, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the groups as columns ``[n, rows · groups]`` of n weights, and the weights of their squared errors.

    An incomplete last group is filled up with copies of its last input, so that its range stays the same.
    """
    rows, inputs = block.shape
    size, missing = GROUP // block_format.runs, -inputs % GROUP
    whole = np.pad(block, ((0, 0), (0, missing)), mode="edge") if missing else block
    x = np.ascontiguousarray(whole.reshape(-1, size).T)
    if importance is None:
        return x, None
    relative = np.pad(importance / importance.mean(), (0, missing)).astype(np.float32)
    return x, np.tile(relative.reshape(-1, size).T, rows)


def _fit_groups(
    block_format: BlockFormat, x: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the scale and the minimum of each column, float32."""
    numbers = grid(block_format)
    if block_format.scales in (Scales.SUPER, Scales.HALF_AND_MINIMUM):
        return scales.fit_with_minimum(x, numbers.highest, weight)
    if block_format.bits == 8:
        return scales.fit_int8(x, weight), None
    return scales.fit_symmetric(x, numbers, weight), None


# --- super-groups -----------------------------------------------------------------------------------------------


def _fit_super(
    block_format: BlockFormat, x: np.ndarray, weight: np.ndarray | None, rows: int, given: Coefficients | None
) -> Coefficients:
    """Return the coefficients for columns from `_columns`, in a format with super-groups; keep factors if given."""
    if given is None:
        factors, codes = _search_factors(block_format, x, weight, rows)
    else:
        factors = list(given)
        wanted = _wanted(block_format, x, weight, rows)
        codes = [_codes(block_format, part, factor) for part, factor in zip(wanted, factors, strict=True)]
    codes = best_codes(block_format, x, weight, factors, codes)
    dtype = np.int8 if block_format.scales in _SIGNED else np.uint8
    return *factors, *(c.astype(dtype) for c in codes)


def _search_factors(
    block_format: BlockFormat, x: np.ndarray, weight: np.ndarray | None, rows: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the factors of super-groups, and codes of scales and minima from which `best_codes` can start."""
    wanted = _wanted(block_format, x, weight, rows)
    factors = [_factors(block_format, part) for part in wanted]
    codes = [_codes(block_format, part, factor) for part, factor in zip(wanted, factors, strict=True)]
    for _ in range(_REFITS):
        codes = best_codes(block_format, x, weight, factors, codes)
        q = _rounded(block_format, x, factors, codes)
        factors = _refit(block_format, x, weight, factors, codes, q)
    return factors, codes


def _wanted(
    block_format: BlockFormat, x: np.ndarray, weight: np.ndarray | None, rows: int
) -> list[np.ndarray]:
    """Return the best scales, and in a format with minima also the best −minima, float32 ``[rows, n]``."""
    scale, minimum = _fit_groups(block_format, x, weight)
    if minimum is None:
        return [scale.reshape(rows, -1)]
    # The format has no positive minimum. The range of a group of positive weights therefore begins at 0.
    highest = np.float32(grid(block_format).highest)
    scale = np.where(minimum > 0, x.max(0) / highest, scale)
    return [scale.reshape(rows, -1), np.maximum(-minimum, 0).reshape(rows, -1)]


def _factors(block_format: BlockFormat, wanted: np.ndarray) -> np.ndarray:
    """Return the factors (float16 ``[rows, S]``) that give the largest scale of each super-group the largest code."""
    most = np.maximum.reduceat(np.abs(wanted), _starts(block_format, wanted.shape[1]), axis=1)
    return near_half(most / np.float32(_LARGEST_CODES[block_format.scales]))


def _codes(block_format: BlockFormat, wanted: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the codes (float32 ``[rows, n]``) whose products with the factors are nearest to the wanted scales."""
    codes = np.rint(wanted * inverse(_spread(block_format, factors.astype(np.float32), wanted.shape)))
    return _clipped(block_format, codes)


def best_codes(
    block_format: BlockFormat,
    x: np.ndarray,
    weight: np.ndarray | None,
    factors: list[np.ndarray],
    codes: list[np.ndarray],
) -> list[np.ndarray]:
    """Find better codes of scales and minima: for each group, the best of the given codes and their neighbours.

    Args:
        block_format: a format with super-groups.
        x: the columns ``[n, G]``.
        weight: the weight of each squared error, ``[n, G]``; None for equal weights.
        factors: float16 ``[rows, S]``.
        codes: float32 ``[rows, n]``.

    Returns:
        The codes of scales and minima.
    """
    best, least = codes, np.full(x.shape[1], np.inf, np.float32)
    for steps in product((0, -1, 1), repeat=len(codes)):
        tried = [_clipped(block_format, c + np.float32(s)) for c, s in zip(codes, steps, strict=True)]
        _, error = scales.round_to(x, grid(block_format), *_of_groups(block_format, factors, tried), weight)
        better = error < least
        least = np.where(better, error, least)
        best = [np.where(better.reshape(t.shape), t, b) for t, b in zip(tried, best, strict=True)]
    return best


def _rounded(
    block_format: BlockFormat, x: np.ndarray, factors: list[np.ndarray], codes: list[np.ndarray]
) -> np.ndarray:
    """Return the integers that the codes of the weights represent, float32 ``[n, G]``."""
    return scales.round_to(x, grid(block_format), *_of_groups(block_format, factors, codes))[0]


def _of_groups(
    block_format: BlockFormat, factors: list[np.ndarray], codes: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the scale and the minimum of each group, float32 ``[G]``; None for absent minima."""
    scale, *low = (
        (_spread(block_format, f.astype(np.float32), c.shape) * c).reshape(-1)
        for f, c in zip(factors, codes, strict=True)
    )
    return scale, -low[0] if low else None


def _refit(
    block_format: BlockFormat,
    x: np.ndarray,
    weight: np.ndarray | None,
    factors: list[np.ndarray],
    codes: list[np.ndarray],
    q: np.ndarray,
) -> list[np.ndarray]:
    """Return the factors with the least squared error for these codes, or the given factor if several are best."""
    shape = codes[0].shape
    starts = _starts(block_format, shape[1])

    def total(of_groups: np.ndarray) -> np.ndarray:
        sums: np.ndarray = np.add.reduceat(of_groups.astype(np.float64), starts, axis=1)
        return sums

    wq = q if weight is None else q * weight
    wx = x if weight is None else x * weight
    qq, qx = (np.einsum("kg,kg->g", wq, other).reshape(shape) for other in (q, x))
    scale = codes[0]
    aa, ax = total(scale * scale * qq), total(scale * qx)
    if len(codes) == 1:
        return [_where_finite(ax, aa, factors[0])]
    low = codes[1]
    q1, x1 = wq.sum(0).reshape(shape), wx.sum(0).reshape(shape)
    one = np.float32(len(x)) if weight is None else weight.sum(0).reshape(shape)
    ab, bb, bx = -total(scale * low * q1), total(low * low * one), -total(low * x1)
    determinant = aa * bb - ab * ab
    return [
        _where_finite(ax * bb - bx * ab, determinant, factors[0]),
        np.maximum(_where_finite(bx * aa - ax * ab, determinant, factors[1]), np.float16(0)),
    ]


def _where_finite(numerator: np.ndarray, denominator: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Return the quotient as float16, and `otherwise` wherever the denominator is close to 0 or negative."""
    fits = denominator > 1e-12
    quotient = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=fits)
    return np.where(fits, near_half(quotient), otherwise)


def _clipped(block_format: BlockFormat, codes: np.ndarray) -> np.ndarray:
    largest = _LARGEST_CODES[block_format.scales]
    clipped: np.ndarray = np.clip(codes, -largest if block_format.scales in _SIGNED else 0, largest)
    return clipped


def _starts(block_format: BlockFormat, count: int) -> np.ndarray:
    """Return the index of the first scale of each super-group."""
    return np.arange(0, count, SUPER * block_format.runs)


def _spread(block_format: BlockFormat, factors: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the factor ``[rows, n]`` of each scale, from the factors ``[rows, S]`` of the super-groups."""
    each: np.ndarray = spread(factors, SUPER * block_format.runs, shape[1])
    return each
