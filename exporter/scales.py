"""Search for the scales and minima of integer weights, and round the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

HALF_MAX = float(np.finfo(np.float16).max)
# The ranges that the search with minima tries for a group: the shares of the group's own range to clip at the bottom
# and at the top. A negative share widens the range. In the last range, the group's own range takes 14 of the 15 steps
# of int4. That range reproduces weights that an earlier quantisation rounded to -7..7.
_ENDS = (-0.03, 0.0, 0.03, 0.06)
_CLIPPED = (*((bottom, top) for bottom in _ENDS for top in _ENDS), (0.0, -1 / 14))
# The searches without minima first scale a group so that its value of the largest magnitude becomes ±127 for int8, or
# −8 for int4. Then they multiply the group by each of these factors, and round. The negative factors turn −8 into a
# positive value, which is clipped to 7.
_STRETCHES = np.linspace(0.98, 1.02, 17).tolist()
_SYMMETRIC_STRETCHES = [*np.linspace(0.9, 1.15, 11).tolist(), *np.linspace(-1.0, -0.8, 9).tolist()]
# The largest magnitude of int8, the largest value of int4, and the value that represents zero in int4-symmetric.
INT8_MAX, INT4_LEVELS, INT4_ZERO = 127, 15, 8
_REFITS = 2
# The exponents of scales that are powers of two: those of normal numbers that 12, the largest integer of MXFP4, can
# multiply.
_LEAST_EXPONENT, _MOST_EXPONENT = -126, 124
LARGEST_POWER = 2.0**_MOST_EXPONENT
# Numbers up to this magnitude count as zero: they underflow float16, and the reciprocals of some overflow float32.
_TINY = 1e-30

# The values of a block ``[n, G]`` (G groups of n), the scales ``[G]``, and for int4 the minima ``[G]``.
Quantised = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Grid:
    """The integers that scales multiply: all from `lowest` to `highest`, or only those of a codebook.

    Attributes:
        lowest: the smallest integer.
        highest: the largest integer.
        codebook: the integers; empty for all.
    """

    lowest: int
    highest: int
    codebook: tuple[int, ...] = ()

    def nearest(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return the integer nearest to each number, as float32; write to `out` if it is not None."""
        if not self.codebook:
            rounded: np.ndarray = np.clip(np.rint(x, out=out), self.lowest, self.highest, out=out)
            return rounded
        halves = (np.clip(x, self.lowest, self.highest) - np.float32(self.lowest)) * np.float32(2)
        found: np.ndarray = np.take(self._nearest, halves.astype(np.int32), out=out, mode="clip")
        return found

    @cached_property
    def _nearest(self) -> np.ndarray:
        """The integer of the codebook nearest to all numbers of each interval of 1/2, from `lowest` on.

        The boundaries between two integers' neighbourhoods are multiples of 1/2.
        """
        middles = np.arange(self.lowest, self.highest + 1, 0.5) + 0.25
        integers = np.array(self.codebook, np.float32)
        nearest: np.ndarray = integers[np.abs(middles[:, None] - integers).argmin(axis=1)]
        nearest[-1] = self.highest
        return nearest


_INT8 = Grid(-INT8_MAX, INT8_MAX)


def quantise_int8(x: np.ndarray) -> Quantised:
    """Quantise each column of x ``[n, G]`` to values from −127 to 127 and a scale."""
    return _quantise_without_minimum(x, _INT8, _int8_step(x), fit_int8(x))


def quantise_symmetric(x: np.ndarray, zero: int = INT4_ZERO) -> Quantised:
    """Quantise each column to values from 0 to 2 · zero − 1 and a scale; the value `zero` represents a weight of 0."""
    grid = Grid(-zero, zero - 1)
    values, scale = quantise_without_minimum(x, grid)
    return values + zero, scale


def quantise_without_minimum(x: np.ndarray, grid: Grid) -> Quantised:
    """Quantise each column to integers of a grid and a scale."""
    return _quantise_without_minimum(x, grid, _symmetric_step(x, grid.lowest), fit_symmetric(x, grid))


def _quantise_without_minimum(x: np.ndarray, grid: Grid, step: np.ndarray, fitted: np.ndarray) -> Quantised:
    """Quantise each column with the scale that has the least error.

    The candidates are `fitted` and `step`, both rounded to the nearest float16, and `step` rounded up.
    """
    return _closest(x, grid, [(near_half(fitted), None), (near_half(step), None), (_above(step), None)])


def quantise_with_exponents(
    x: np.ndarray, grid: Grid, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise each column of x ``[n, G]`` to integers of a grid and a scale that is a power of two.

    Args:
        x: the columns.
        grid: the integers.
        weight: the weight of each squared error, ``[n, G]``; None for equal weights.

    Returns:
        The integers ``[n, G]``, and the exponents of the scales, int32 ``[G]``.
    """
    most = np.abs(x).max(0) * np.float32(1 / grid.highest)
    exponent = np.maximum(np.frexp(most)[1], _LEAST_EXPONENT)  # the first power above `most`
    best, values, least = exponent, np.zeros_like(x), np.full(most.shape, np.inf, np.float32)
    for tried in (exponent, exponent - 1, exponent - 2):
        tried = np.clip(tried, _LEAST_EXPONENT, _MOST_EXPONENT)
        other, error = round_to(x, grid, np.ldexp(np.float32(1), tried), None, weight)
        better = error < least
        least = np.where(better, error, least)
        values = np.where(better, other, values)
        best = np.where(better, tried, best)
    return values, best


def _int8_step(x: np.ndarray) -> np.ndarray:
    step: np.ndarray = np.maximum(x.max(0), -x.min(0)) / np.float32(INT8_MAX)
    return step


def _symmetric_step(x: np.ndarray, lowest: int) -> np.ndarray:
    """Return, for each column, the scale that maps the value of the largest magnitude to the integer `lowest`."""
    low, high = x.min(0), x.max(0)
    step: np.ndarray = np.where(-low > high, low, high) / np.float32(lowest)
    return step


def fit_int8(x: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Return the scale of each column of x ``[n, G]`` for values from −127 to 127, as float32 ``[G]``.

    Args:
        x: the columns.
        weight: the weight of each squared error, ``[n, G]``; None for equal weights.
    """
    return _fit_scale(x, _INT8, _int8_step(x), _STRETCHES, weight)


def fit_symmetric(x: np.ndarray, grid: Grid, weight: np.ndarray | None = None) -> np.ndarray:
    """Return the scale of each column, as `fit_int8` does, for the integers of a grid."""
    return _fit_scale(x, grid, _symmetric_step(x, grid.lowest), _SYMMETRIC_STRETCHES, weight)


def _fit_scale(
    x: np.ndarray,
    grid: Grid,
    step: np.ndarray,
    stretches: Sequence[float],
    weight: np.ndarray | None,
) -> np.ndarray:
    """Find a scale for each column.

    Divide x by the initial scale `step`, and multiply it by each of the stretches. Round the products, refit the scale
    to the rounded values by least squares, and compute the error. Return the refitted scale with the least error.
    """
    best, least = step, np.full(step.shape, np.inf, np.float32)
    t = x * inverse(step)
    u, q = np.empty_like(t), np.empty_like(t)
    for stretch in stretches:
        np.multiply(t, np.float32(stretch), out=u)
        grid.nearest(u, out=q)
        u -= q
        # u holds the rounding errors; the error after refitting follows from them.
        wq, wu = (q, u) if weight is None else (q * weight, u * weight)
        qq, qu = _dot(wq, q), _dot(wq, u)
        qq = np.where(qq > 0, qq, 1)
        error = (_dot(wu, u) - qu * qu / qq) / np.float32(stretch**2)
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better, step * (1 + qu / qq) / np.float32(stretch), best)
    return best


def quantise_with_minimum(x: np.ndarray, levels: int = INT4_LEVELS) -> Quantised:
    """Quantise each column of x ``[n, G]`` to values from 0 to `levels`, a scale and a minimum.

    Try several ranges, slightly clipped or widened at each end. For each range, round the values and fit the scale and
    the minimum to them by least squares. Then round and fit the best range `_REFITS` times more. If plain rounding over
    the column's own range has a smaller error, return its result instead.
    """
    low, high = x.min(0), x.max(0)
    step = (high - low) / np.float32(levels)
    below = _below(low)
    rest = (high - below) / np.float32(levels)
    scale, minimum = fit_with_minimum(x, levels)
    return _closest(x, Grid(0, levels), [
        (near_half(scale), near_half(minimum)),
        (near_half(step), near_half(low)),
        # For groups far from zero or of tiny magnitude, where rounding the coefficients to float16 costs the most.
        (near_half(rest), below),
        (_above(rest), below),
    ])  # fmt: skip


def fit_with_minimum(
    x: np.ndarray, levels: int, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return a scale and a minimum for each column of x ``[n, G]``, to quantise it to values from 0 to `levels`.

    Args:
        x: the columns.
        levels: the largest value.
        weight: the weight of each squared error, ``[n, G]``; None for equal weights.
    """
    low = x.min(0)
    step = (x.max(0) - low) / np.float32(levels)
    t = (x - low) * inverse(step)
    if weight is None:
        weight = np.ones((len(x), 1), np.float32)
    weight = weight * inverse(weight.sum(0))
    mean = (weight * t).sum(0)
    scale, minimum = _search_ranges(t, mean, levels, weight)
    for _ in range(_REFITS):
        q = np.clip(np.rint((t - minimum) * inverse(scale)), 0, levels)
        scale, minimum, _ = _fit(t, mean, q, weight)
    return scale * step, low + minimum * step


def _search_ranges(
    t: np.ndarray, mean: np.ndarray, levels: int, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the fitted scale and minimum of the best range, for columns whose values span 0 to `levels`."""
    q = np.empty_like(t)
    scale = minimum = np.zeros(t.shape[1], np.float32)
    most = np.full(t.shape[1], -np.inf, np.float32)
    for bottom, top in _CLIPPED:
        stretch = 1 / (1 - bottom - top)
        np.multiply(t, np.float32(stretch), out=q)
        q -= np.float32(levels * bottom * stretch)
        np.clip(np.rint(q, out=q), 0, levels, out=q)
        new_scale, new_minimum, explained = _fit(t, mean, q, weight)
        better = explained > most
        scale, minimum = np.where(better, new_scale, scale), np.where(better, new_minimum, minimum)
        most = np.where(better, explained, most)
    return scale, minimum


def _fit(
    t: np.ndarray, mean: np.ndarray, q: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scale and minimum of the least-squares fit of t by q, and the variance of t that the fit explains.

    Args:
        t: ``[n, G]``.
        mean: the weighted mean of t, ``[G]``.
        q: ``[n, G]``.
        weight: the weight of each squared error, ``[n, 1]`` or ``[n, G]``; the sum over n is one.
    """
    weighted = q * weight
    average = weighted.sum(0)
    covariance = _dot(weighted, t) - average * mean
    variance = _dot(weighted, q) - average * average
    scale = covariance * inverse(variance)
    return scale, mean - scale * average, scale * covariance


def _closest(
    x: np.ndarray, grid: Grid, candidates: Sequence[tuple[np.ndarray, np.ndarray | None]]
) -> Quantised:
    """Return, for each column, the values, scale and minimum of the candidate with the least error."""
    (scale, minimum), *others = candidates
    values, least = round_to(x, grid, scale, minimum)
    for other_scale, other_minimum in others:
        other, error = round_to(x, grid, other_scale, other_minimum)
        better = error < least
        least = np.where(better, error, least)
        values = np.where(better, other, values)
        scale = np.where(better, other_scale, scale)
        if minimum is not None and other_minimum is not None:
            minimum = np.where(better, other_minimum, minimum)
    return (values, scale) if minimum is None else (values, scale, minimum)


def round_to(
    x: np.ndarray,
    grid: Grid,
    scale: np.ndarray,
    minimum: np.ndarray | None,
    weight: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise the columns of x ``[n, G]`` with these coefficients ``[G]``.

    Returns:
        The integers, as float32 ``[n, G]``, and the sum of each column's squared errors, weighted by `weight`
        ``[n, G]`` if it is not None.
    """
    scale = scale.astype(np.float32)
    offset = np.float32(0) if minimum is None else minimum.astype(np.float32)
    values = x - offset
    values *= inverse(scale)
    grid.nearest(values, out=values)
    error = values * scale
    error += offset
    error -= x
    return values, _dot(error, error if weight is None else error * weight)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product: np.ndarray = np.einsum("kg,kg->g", a, b)
    return product


def inverse(x: np.ndarray) -> np.ndarray:
    """Return 1 / x, or 0 for |x| up to `_TINY`."""
    result: np.ndarray = np.divide(np.float32(1), x, out=np.zeros_like(x), where=np.abs(x) > _TINY)
    return result


def near_half(x: np.ndarray) -> np.ndarray:
    """Return the nearest finite float16."""
    near: np.ndarray = np.clip(x, -HALF_MAX, HALF_MAX).astype(np.float16)
    return near


def _below(x: np.ndarray) -> np.ndarray:
    """Return the largest float16 not above x."""
    half = near_half(x)
    with np.errstate(over="ignore"):
        return np.where(half > x, np.nextafter(half, np.float16(-np.inf)), half)


def _above(x: np.ndarray) -> np.ndarray:
    """Return the smallest float16 not below x, or the largest finite one."""
    half = near_half(x)
    with np.errstate(over="ignore"):
        up = np.nextafter(half, np.float16(np.inf))
    return np.where((half < x) & np.isfinite(up), up, half)
