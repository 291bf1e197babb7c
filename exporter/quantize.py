"""Storage formats of weights: float32, bfloat16, and small integers with shared scales.

A linear layer's weight is ``[out, in]``; a stack of layers puts L in front. In the integer formats, each group of
`GROUP` consecutive inputs of an output shares a scale, and in int4 also a minimum. The values of `PANEL` outputs (a
panel) are contiguous and interleaved in the order in which the kernels read them:

- int8: values ``[out/16, in/2, 16, 2]``; scale ``[out/16, in/32, 16]``; a weight is scale · value.
- int4: values ``[out/16, in/8, 16, 4]`` with two values per byte: of eight consecutive inputs, the low nibbles hold the
  first four and the high nibbles the last four; scale and minimum ``[out/16, in/32, 16]``; a weight is
  scale · value + minimum.
- int4-symmetric: the same without the minimum; a weight is scale · (value − 8).

Outputs are padded to whole panels and inputs to whole groups; the padding's values, scales and minima are zero. In a
partly filled int4 group, the padded weights dequantise to the group's minimum, or to −8 · scale, not to zero. So the
activations that multiply them must be zero.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .sources.base import QuantisedBlocks

GROUP = 32
PANEL = 16

# The format of int4 weights whose source has no minima. An export chooses it by itself.
INT4_SYMMETRIC = "int4-symmetric"

# Number of weights quantised at a time, so that the intermediate arrays fit into the CPU's cache.
_BLOCK = 1 << 18
# Maximum number of threads. Each works on one block, which needs about 12 MB. They run in parallel, because NumPy
# releases the GIL.
_THREADS = 8
_HALF_MAX = float(np.finfo(np.float16).max)
# The int4 search tries several ranges for a group. Each clips a share of the group's own range at the bottom and at the
# top; a negative share widens the range. In the last range tried, the group's own range takes 14 of the 15 steps, which
# reproduces weights that an earlier quantisation rounded to -7..7.
_ENDS = (-0.03, 0.0, 0.03, 0.06)
_CLIPPED = (*((bottom, top) for bottom in _ENDS for top in _ENDS), (0.0, -1 / 14))
# The searches for int8 and int4-symmetric multiply a group by each of these factors before rounding. Before that, the
# value of the largest magnitude is 127, or −8. The negative factors make that value positive, 7 or less.
_STRETCHES = np.linspace(0.98, 1.02, 17).tolist()
_SYMMETRIC_STRETCHES = [*np.linspace(0.9, 1.15, 11).tolist(), *np.linspace(-1.0, -0.8, 9).tolist()]
# The value that represents zero in int4-symmetric.
INT4_ZERO = 8
_REFITS = 2
# Smaller numbers underflow float16, and the reciprocals of the smallest overflow float32.
_TINY = 1e-30


@dataclass(frozen=True)
class StoredArray:
    """One of the arrays that store a parameter.

    Attributes:
        suffix: the part of the array's name after the parameter's name: "", ".scale" or ".minimum".
        shape: shape in the programs.
        dtype: "float32", "bfloat16", "float16", "int8" or "uint8".
    """

    suffix: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """A storage format of weights.

    Attributes:
        name: its key in `FORMATS`.
        largest: largest magnitude that it can hold.
        takes_blocks: True if `repack` can convert some quantised blocks.
    """

    name: str
    largest: float
    takes_blocks: bool = False

    @abstractmethod
    def arrays(self, shape: tuple[int, ...]) -> tuple[StoredArray, ...]:
        """Return the arrays that store a parameter of this shape: ``[L, out, in]`` or ``[out, in]``."""

    @abstractmethod
    def encode(self, matrix: np.ndarray, name: str = "a matrix") -> tuple[np.ndarray, ...]:
        """Convert one layer's float32 matrix ``[out, in]`` to this format.

        Args:
            matrix: the matrix.
            name: its name in messages.

        Returns:
            The arrays that store the matrix, in the order of `arrays` and without the L axis.

        Raises:
            PrecastError: the format cannot hold a value.
        """

    @abstractmethod
    def decode(self, arrays: Sequence[np.ndarray], rows: int, columns: int) -> np.ndarray:
        """Dequantise one layer's arrays into a float32 matrix ``[rows, columns]``."""

    def repack(self, blocks: QuantisedBlocks) -> tuple[np.ndarray, ...] | None:
        """Convert quantised blocks to this format without changing any value; return None if that is impossible."""
        return None

    def _check(self, matrix: np.ndarray, name: str) -> None:
        most = max(float(matrix.max()), -float(matrix.min())) if matrix.size else 0.0
        if not most <= self.largest:  # also for NaN
            raise PrecastError(
                f"{name}: holds a value of {most:.6g}, expected at most {self.largest:.6g}, the most that {self.name}"
                " can hold; store the weights in a wider type."
            )


@dataclass(frozen=True, kw_only=True)
class _Plain(Format):
    """A format of plain floating-point arrays."""

    def arrays(self, shape: tuple[int, ...]) -> tuple[StoredArray, ...]:
        return (StoredArray("", shape, self.name),)

    def encode(self, matrix: np.ndarray, name: str = "a matrix") -> tuple[np.ndarray, ...]:
        self._check(matrix, name)
        return (matrix.astype(StoredArray("", (), self.name).numpy_dtype, copy=False),)

    def decode(self, arrays: Sequence[np.ndarray], rows: int, columns: int) -> np.ndarray:
        return arrays[0].astype(np.float32).reshape(rows, columns)


# The values of a block ``[n, G]`` (G groups of n), the scales ``[G]``, and for int4 the minima ``[G]``.
_Quantised = tuple[np.ndarray, ...]


@dataclass(frozen=True, kw_only=True)
class _Grouped(Format):
    """Integers in panels, with a scale and possibly a minimum (the coefficients) for each group.

    Attributes:
        dtype: type of the packed values.
        inputs: length in bytes of the last axis of the packed values, which contains consecutive inputs of one output.
        nibbles: values per byte.
        suffixes: name suffixes of the arrays that hold the coefficients.
        quantise: quantises groups ``[n, G]``.
        convert: converts blocks to values and coefficients without changing a weight, or returns None.
        zero: the value that represents zero, if there is no minimum.
    """

    dtype: str
    inputs: int
    nibbles: int
    suffixes: tuple[str, ...]
    quantise: Callable[[np.ndarray], _Quantised]
    convert: Callable[[QuantisedBlocks], tuple[np.ndarray, ...] | None]
    zero: int = 0

    def arrays(self, shape: tuple[int, ...]) -> tuple[StoredArray, ...]:
        layers, rows, columns = (1,) * (3 - len(shape)) + shape
        panels, groups = -(-rows // PANEL), -(-columns // GROUP)
        chunk = self.inputs * self.nibbles
        values = (layers, panels, groups * GROUP // chunk, PANEL, self.inputs)
        of_groups = (layers, panels, groups, PANEL)
        return (
            StoredArray("", values, self.dtype),
            *(StoredArray(suffix, of_groups, "float16") for suffix in self.suffixes),
        )

    def encode(self, matrix: np.ndarray, name: str = "a matrix") -> tuple[np.ndarray, ...]:
        self._check(matrix, name)
        return self._store(matrix.shape, lambda rows: self._quantise_rows(matrix[rows]))

    def decode(self, arrays: Sequence[np.ndarray], rows: int, columns: int) -> np.ndarray:
        values = self._unpack(arrays[0])[:rows, :columns].astype(np.float32) - np.float32(self.zero)
        for i, coefficients in enumerate(arrays[1:]):
            panels, groups, _ = coefficients.shape
            each = coefficients.swapaxes(1, 2).reshape(panels * PANEL, groups)[:rows].astype(np.float32)
            spread = np.repeat(each, GROUP, axis=1)[:, :columns]
            values = values * spread if i == 0 else values + spread
        return values

    def repack(self, blocks: QuantisedBlocks) -> tuple[np.ndarray, ...] | None:
        converted = self.convert(blocks)
        if converted is None:
            return None
        return self._store(blocks.values.shape, lambda rows: tuple(part[rows] for part in converted))

    def _store(
        self, shape: tuple[int, ...], quantised: Callable[[slice], tuple[np.ndarray, ...]]
    ) -> tuple[np.ndarray, ...]:
        """Pack values ``[rows, in]`` and coefficients ``[rows, groups]``.

        Args:
            shape: rows and columns of the whole matrix.
            quantised: returns the values and the coefficients of a slice of rows; several threads call it.
        """
        arrays = [np.zeros(a.shape[1:], a.numpy_dtype) for a in self.arrays(shape)]

        def store(rows: slice) -> None:
            values, *coefficients = quantised(rows)
            panels = slice(rows.start // PANEL, -(-rows.stop // PANEL))
            arrays[0][panels] = self._pack(_padded(values, GROUP))
            for array, found in zip(arrays[1:], coefficients, strict=True):
                array[panels] = _padded(found, 1).reshape(-1, PANEL, found.shape[1]).swapaxes(1, 2)

        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(store, _row_blocks(*shape)):
                pass  # raises the exception of a failed thread
        return tuple(arrays)

    def _quantise_rows(self, block: np.ndarray) -> tuple[np.ndarray, ...]:
        """Quantise a few rows; return values ``[rows, in]`` and coefficients ``[rows, groups]``."""
        rows, columns = block.shape
        whole = columns // GROUP * GROUP
        parts = [(block[:, :whole], GROUP)] if whole else []
        if whole < columns:  # fit a shorter last group to its own values, without padding
            parts.append((block[:, whole:], columns - whole))
        found = []
        for part, size in parts:
            values, *coefficients = self.quantise(np.ascontiguousarray(part.reshape(-1, size).T))
            found.append((values.T.reshape(rows, -1), *(c.reshape(rows, -1) for c in coefficients)))
        return tuple(np.concatenate(pieces, axis=1) for pieces in zip(*found, strict=True))

    def _pack(self, values: np.ndarray) -> np.ndarray:
        split = values.astype(self.dtype).reshape(-1, PANEL, values.shape[1] // (self.nibbles * self.inputs),
                                                  self.nibbles, self.inputs)  # fmt: skip
        packed = split[..., 0, :] if self.nibbles == 1 else split[..., 0, :] | split[..., 1, :] << 4
        return packed.swapaxes(1, 2)

    def _unpack(self, packed: np.ndarray) -> np.ndarray:
        parts = (packed,) if self.nibbles == 1 else (packed & 15, packed >> 4)
        values = np.stack(parts, axis=-2)  # [panel, chunk, PANEL, nibble, input]
        return values.swapaxes(1, 2).reshape(len(packed) * PANEL, -1)


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(PANEL, _BLOCK // max(columns, 1) // PANEL * PANEL)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _padded(array: np.ndarray, multiple: int) -> np.ndarray:
    """Pad an array with zeros: rows to whole panels, and columns to a multiple of `multiple`."""
    rows, columns = array.shape
    return np.pad(array, ((0, -rows % PANEL), (0, -columns % multiple)))


# --- blocks of a quantised checkpoint -----------------------------------------------------------------------


def _as_int8(blocks: QuantisedBlocks) -> tuple[np.ndarray, ...] | None:
    if blocks.minimum is not None or blocks.values.min(initial=0) < -127:
        return None
    return blocks.values, blocks.scale


def _as_int4(blocks: QuantisedBlocks) -> tuple[np.ndarray, ...] | None:
    """Return the blocks as values 0..15, scale and minimum; None if a value or a minimum is out of range.

    Blocks without a minimum have signed values -8..7: these are shifted by 8, and the minimum becomes -8 · scale.
    """
    low, high = blocks.values.min(initial=0), blocks.values.max(initial=0)
    if blocks.minimum is not None:
        return (blocks.values, blocks.scale, blocks.minimum) if low >= 0 and high <= 15 else None
    minimum = -8 * blocks.scale.astype(np.float32)
    if low < -8 or high > 7 or np.abs(minimum).max(initial=0) > _HALF_MAX:
        return None
    return (blocks.values + np.int8(8)).view(np.uint8), blocks.scale, minimum.astype(np.float16)


def _as_symmetric(blocks: QuantisedBlocks) -> tuple[np.ndarray, ...] | None:
    low, high = blocks.values.min(initial=0), blocks.values.max(initial=0)
    if blocks.minimum is not None or low < -INT4_ZERO or high > 15 - INT4_ZERO:
        return None
    return (blocks.values + np.int8(INT4_ZERO)).view(np.uint8), blocks.scale


# --- the search for scales ----------------------------------------------------------------------------------


def _quantise_int8(x: np.ndarray) -> _Quantised:
    """Find values -127..127 and a scale for each column."""
    step = np.maximum(x.max(0), -x.min(0)) / np.float32(127)
    return _quantise_without_minimum(x, step, -127, 127, _STRETCHES)


def _quantise_symmetric(x: np.ndarray) -> _Quantised:
    """Find values 0..15 and a scale for each column; 8 represents zero."""
    low, high = x.min(0), x.max(0)
    step = np.where(-low > high, low, high) / np.float32(-INT4_ZERO)
    values, scale = _quantise_without_minimum(x, step, -INT4_ZERO, 15 - INT4_ZERO, _SYMMETRIC_STRETCHES)
    return values + INT4_ZERO, scale


def _quantise_without_minimum(
    x: np.ndarray, step: np.ndarray, lowest: int, highest: int, stretches: Sequence[float]
) -> _Quantised:
    """Find values and a scale for each column.

    Multiply x / step by each of the stretches. Round the products, refit the scale to the rounded values by least
    squares, and compute the error. Use the refitted scale with the least error, unless plain rounding with the scale
    `step` has a smaller error.
    """
    best, least = step, np.full(step.shape, np.inf, np.float32)
    t = x * _inverse(step)
    u, q = np.empty_like(t), np.empty_like(t)
    for stretch in stretches:
        np.multiply(t, np.float32(stretch), out=u)
        np.clip(np.rint(u, out=q), lowest, highest, out=q)
        u -= q
        # u holds the rounding errors; the error after refitting follows from them.
        qq, qu = np.maximum(_dot(q, q), 1), _dot(q, u)
        error = (_dot(u, u) - qu * qu / qq) / np.float32(stretch**2)
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better, step * (1 + qu / qq) / np.float32(stretch), best)
    return _closest(x, lowest, highest, [(_near(best), None), (_near(step), None), (_above(step), None)])


def _quantise_int4(x: np.ndarray) -> _Quantised:
    """Find values 0..15, a scale and a minimum for each column.

    Try several ranges, slightly clipped or widened at each end. For each range, round the values and fit the scale and
    the minimum to them by least squares. Then round and fit the best range `_REFITS` times more. Use the result, unless
    plain rounding has a smaller error.
    """
    low, high = x.min(0), x.max(0)
    step = (high - low) / np.float32(15)
    t = (x - low) * _inverse(step)
    mean = t.mean(0)
    scale, minimum = _search_int4(t, mean)
    for _ in range(_REFITS):
        q = np.clip(np.rint((t - minimum) * _inverse(scale)), 0, 15)
        scale, minimum, _ = _fit(t, mean, q)
    below = _below(low)
    rest = (high - below) / np.float32(15)
    return _closest(x, 0, 15, [
        (_near(scale * step), _near(low + minimum * step)),
        (_near(step), _near(low)),
        # For groups far from zero or of tiny magnitude, where rounding the coefficients to float16 costs the most.
        (_near(rest), below),
        (_above(rest), below),
    ])  # fmt: skip


def _search_int4(t: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the fitted scale and minimum of the best range, for columns whose values span 0 to 15."""
    q = np.empty_like(t)
    scale = minimum = np.zeros(t.shape[1], np.float32)
    most = np.full(t.shape[1], -np.inf, np.float32)
    for bottom, top in _CLIPPED:
        stretch = 1 / (1 - bottom - top)
        np.multiply(t, np.float32(stretch), out=q)
        q -= np.float32(15 * bottom * stretch)
        np.clip(np.rint(q, out=q), 0, 15, out=q)
        new_scale, new_minimum, explained = _fit(t, mean, q)
        better = explained > most
        scale, minimum = np.where(better, new_scale, scale), np.where(better, new_minimum, minimum)
        most = np.where(better, explained, most)
    return scale, minimum


def _fit(t: np.ndarray, mean: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scale and minimum of the least-squares fit of t by q, and the variance of t that the fit explains."""
    total = q.sum(0)
    covariance = _dot(q, t) - total * mean
    variance = _dot(q, q) - total * total / len(t)
    scale = covariance * _inverse(variance)
    return scale, mean - scale * total / len(t), scale * covariance


def _closest(
    x: np.ndarray, lowest: int, highest: int, candidates: Sequence[tuple[np.ndarray, np.ndarray | None]]
) -> _Quantised:
    """Return, for each column, the values, scale and minimum of the candidate with the least error."""
    (scale, minimum), *others = candidates
    values, least = _rounded(x, lowest, highest, scale, minimum)
    for other_scale, other_minimum in others:
        other, error = _rounded(x, lowest, highest, other_scale, other_minimum)
        better = error < least
        least = np.where(better, error, least)
        values = np.where(better, other, values)
        scale = np.where(better, other_scale, scale)
        if minimum is not None and other_minimum is not None:
            minimum = np.where(better, other_minimum, minimum)
    return (values, scale) if minimum is None else (values, scale, minimum)


def _rounded(
    x: np.ndarray, lowest: int, highest: int, scale: np.ndarray, minimum: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise x with these coefficients; return the integers, and each column's squared error."""
    scale = scale.astype(np.float32)
    offset = np.float32(0) if minimum is None else minimum.astype(np.float32)
    values = (x - offset) * _inverse(scale)
    np.clip(np.rint(values, out=values), lowest, highest, out=values)
    error = values * scale
    error += offset
    error -= x
    return values, _dot(error, error)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product: np.ndarray = np.einsum("kg,kg->g", a, b)
    return product


def _inverse(x: np.ndarray) -> np.ndarray:
    """Return 1 / x, or 0 for |x| up to `_TINY`."""
    inverse: np.ndarray = np.divide(np.float32(1), x, out=np.zeros_like(x), where=np.abs(x) > _TINY)
    return inverse


def _near(x: np.ndarray) -> np.ndarray:
    """Return the nearest finite float16."""
    near: np.ndarray = np.clip(x, -_HALF_MAX, _HALF_MAX).astype(np.float16)
    return near


def _below(x: np.ndarray) -> np.ndarray:
    """Return the largest float16 not above x."""
    half = _near(x)
    with np.errstate(over="ignore"):
        return np.where(half > x, np.nextafter(half, np.float16(-np.inf)), half)


def _above(x: np.ndarray) -> np.ndarray:
    """Return the smallest float16 not below x, or the largest finite one."""
    half = _near(x)
    with np.errstate(over="ignore"):
        up = np.nextafter(half, np.float16(np.inf))
    return np.where((half < x) & np.isfinite(up), up, half)


# --- the formats --------------------------------------------------------------------------------------------

FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        _Plain(name="float32", largest=float(np.finfo(np.float32).max)),
        _Plain(name="bfloat16", largest=float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
        _Grouped(
            name="int8",
            largest=127 * _HALF_MAX,
            dtype="int8",
            inputs=2,
            nibbles=1,
            suffixes=(".scale",),
            takes_blocks=True,
            quantise=_quantise_int8,
            convert=_as_int8,
        ),
        _Grouped(
            name="int4",
            largest=_HALF_MAX,
            dtype="uint8",
            inputs=4,
            nibbles=2,
            suffixes=(".scale", ".minimum"),
            takes_blocks=True,
            quantise=_quantise_int4,
            convert=_as_int4,
        ),
        _Grouped(
            name=INT4_SYMMETRIC,
            largest=INT4_ZERO * _HALF_MAX,
            dtype="uint8",
            inputs=4,
            nibbles=2,
            suffixes=(".scale",),
            takes_blocks=True,
            quantise=_quantise_symmetric,
            convert=_as_symmetric,
            zero=INT4_ZERO,
        ),
    )
}
# The formats that an export can be asked for.
WEIGHTS = tuple(name for name in FORMATS if name != INT4_SYMMETRIC)
