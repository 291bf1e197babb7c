"""Storage formats of weights: float32, bfloat16, and small integers with shared scales.

A linear layer's weight is ``[out, in]``, and a stack of L layers is ``[L, out, in]``. In the integer formats, the
weights of an output for `GROUP` consecutive inputs (a group) share a scale and, in int4, a minimum. The values of
`PANEL` outputs (a panel) are contiguous and interleaved in the order in which the kernels read them:

- int8: values ``[out/16, in/2, 16, 2]``; scale ``[out/16, in/32, 16]``; a weight is scale · value.
- int4: values ``[out/16, in/8, 16, 4]`` with two values per byte: of eight consecutive inputs, the low nibbles hold the
  first four and the high nibbles the last four; scale and minimum ``[out/16, in/32, 16]``; a weight is
  scale · value + minimum.
- int4-symmetric: the layout of int4 without the minimum; a weight is scale · (value − 8).

Outputs are padded to whole panels and inputs to whole groups; the padding's values, scales and minima are zero. The
padded weights of a partly filled int4 group dequantise to the group's minimum, or to −8 · scale, instead of zero. The
activations that multiply them must therefore be zero.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .block_formats import BLOCK_FORMATS, GROUP, PANEL, for_row_blocks
from .scales import (
    HALF_MAX,
    INT4_LEVELS,
    INT4_ZERO,
    Quantised,
    quantise_int8,
    quantise_symmetric,
    quantise_with_minimum,
)
from .sources.base import QuantisedBlocks

# The format of int4 weights whose source has no minima. Only the export itself chooses this format.
INT4_SYMMETRIC = "int4-symmetric"
# The value of --weights that keeps the values of each parameter, and also its format if that is a block format.
SOURCE = "source"
# The format of weights with a budget of bits, and the formats that the budget chooses from, smallest first.
MIXED = "mixed"
BUDGET_FORMATS = ("iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")


@dataclass(frozen=True)
class StoredArray:
    """One of the arrays that store a parameter.

    Attributes:
        suffix: the part of the array's name after the parameter's name: "", ".scale", ".minimum" or ".table".
        shape: shape in the programs.
        dtype: "float32", "bfloat16", "float16", "int8", "uint8" or "int32".
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
        name: key of the format in `FORMATS`.
        largest: largest magnitude that the format can represent.
        takes: block formats that `repack` can convert to this format if their integers fit its range.
    """

    name: str
    largest: float
    takes: tuple[str, ...] = ()

    @abstractmethod
    def arrays(self, shape: tuple[int, ...]) -> tuple[StoredArray, ...]:
        """Return the arrays that store a parameter whose shape is ``[L, out, in]`` or ``[out, in]``."""

    @abstractmethod
    def encode(self, matrix: np.ndarray, name: str = "a matrix") -> tuple[np.ndarray, ...]:
        """Convert one layer's float32 matrix ``[out, in]`` to this format.

        Args:
            matrix: the matrix.
            name: name of the matrix in messages.

        Returns:
            The arrays that store the matrix, in the order of `arrays` and without the L axis.

        Raises:
            PrecastError: the format cannot represent one of the values.
        """

    @abstractmethod
    def decode(self, arrays: Sequence[np.ndarray], rows: int, columns: int) -> np.ndarray:
        """Dequantise one layer's arrays into a float32 matrix ``[rows, columns]``."""

    def repack(self, blocks: QuantisedBlocks) -> tuple[np.ndarray, ...] | None:
        """Convert quantised blocks to this format, with the same integers and scales; return None if they do not fit.

        The values stay the same, except that int4 rounds the minima of blocks from q5_0 to float16.
        """
        return None

    def check(self, matrix: np.ndarray, name: str) -> None:
        """Check that the format can represent all values of a matrix.

        Raises:
            PrecastError: the format cannot represent one of the values.
        """
        check_range(matrix, name, self.name, self.largest)


def check_range(matrix: np.ndarray, name: str, format_name: str, largest: float) -> None:
    """Check that a format can represent all values of a matrix.

    Args:
        matrix: the matrix.
        name: name of the matrix in messages.
        format_name: name of the format in messages.
        largest: largest magnitude that the format can represent.

    Raises:
        PrecastError: the format cannot represent one of the values.
    """
    most = max(float(matrix.max()), -float(matrix.min())) if matrix.size else 0.0
    if not most <= largest:  # also for NaN
        raise PrecastError(
            f"{name}: contains a value of {most:.6g}, but {format_name} can represent at most {largest:.6g}; store the"
            " weights in a wider type."
        )


@dataclass(frozen=True, kw_only=True)
class _Plain(Format):
    """A format of plain floating-point arrays."""

    def arrays(self, shape: tuple[int, ...]) -> tuple[StoredArray, ...]:
        return (StoredArray("", shape, self.name),)

    def encode(self, matrix: np.ndarray, name: str = "a matrix") -> tuple[np.ndarray, ...]:
        self.check(matrix, name)
        return (matrix.astype(StoredArray("", (), self.name).numpy_dtype, copy=False),)

    def decode(self, arrays: Sequence[np.ndarray], rows: int, columns: int) -> np.ndarray:
        return arrays[0].astype(np.float32).reshape(rows, columns)


@dataclass(frozen=True, kw_only=True)
class _Grouped(Format):
    """Integers in panels, with a scale and possibly a minimum (the coefficients) for each group.

    Attributes:
        dtype: type of the packed values.
        inputs: number of bytes in the last axis of the packed values. These bytes belong to one output.
        nibbles: values per byte.
        suffixes: name suffixes of the arrays that store the coefficients.
        quantise: quantises G groups of n weights, ``[n, G]``; returns their values and coefficients.
        convert: converts blocks in a format of `takes` to values and coefficients, as `repack` describes.
        zero: value of a weight of zero in a format without minima.
    """

    dtype: str
    inputs: int
    nibbles: int
    suffixes: tuple[str, ...]
    quantise: Callable[[np.ndarray], Quantised]
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
        self.check(matrix, name)
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
        converted = self.convert(blocks) if blocks.format in self.takes else None
        return None if converted is None else self.pack(*converted)

    def pack(self, values: np.ndarray, *coefficients: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the arrays that store values ``[rows, in]`` and coefficients ``[rows, groups]``."""
        return self._store(values.shape, lambda rows: (values[rows], *(c[rows] for c in coefficients)))

    def _store(
        self, shape: tuple[int, ...], quantised: Callable[[slice], tuple[np.ndarray, ...]]
    ) -> tuple[np.ndarray, ...]:
        """Pack values ``[rows, in]`` and coefficients ``[rows, groups]``.

        Args:
            shape: numbers of rows and columns of the whole matrix.
            quantised: returns the values and the coefficients of a slice of rows; several threads call it.
        """
        arrays = [np.zeros(a.shape[1:], a.numpy_dtype) for a in self.arrays(shape)]

        def store(rows: slice) -> None:
            values, *coefficients = quantised(rows)
            panels = slice(rows.start // PANEL, -(-rows.stop // PANEL))
            arrays[0][panels] = self._pack(_padded(values, GROUP))
            for array, found in zip(arrays[1:], coefficients, strict=True):
                array[panels] = _padded(found, 1).reshape(-1, PANEL, found.shape[1]).swapaxes(1, 2)

        rows, columns = shape
        for_row_blocks(rows, columns, store)
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


def _padded(array: np.ndarray, multiple: int) -> np.ndarray:
    """Pad an array with zeros: rows to whole panels, and columns to a multiple of `multiple`."""
    rows, columns = array.shape
    return np.pad(array, ((0, -rows % PANEL), (0, -columns % multiple)))


# --- blocks of a quantised checkpoint -----------------------------------------------------------------------


def _as_int8(blocks: QuantisedBlocks) -> tuple[np.ndarray, ...] | None:
    kind = BLOCK_FORMATS[blocks.format]
    if kind.codebook is not None:
        return np.array(kind.codebook, np.int8)[blocks.codes], *blocks.coefficients
    values = blocks.codes.view(np.int8) - np.int8(kind.zero)
    return None if values.min(initial=0) < -127 else (values, *blocks.coefficients)


def _as_int4(blocks: QuantisedBlocks) -> tuple[np.ndarray, ...] | None:
    """Return the codes, scales and minima of blocks; None if codes have over four bits, or a minimum exceeds float16.

    The minimum of a block without one is −8 · scale in q4_0. In q5_0, it is that of the smallest code. The 5-bit codes
    may stem from 4-bit integers with zero points. In each group, the codes lie in a range of 16 values; the range
    differs between groups.
    """
    scale, *minima = blocks.coefficients
    if minima:
        return blocks.codes, scale, *minima
    codes, least = blocks.codes, np.zeros(scale.shape, np.uint8)
    if blocks.format == "q5_0":
        starts = np.arange(0, codes.shape[1], GROUP)
        least = np.minimum.reduceat(codes, starts, axis=1)
        codes = codes - np.repeat(least, GROUP, axis=1)[:, : codes.shape[1]]
    low = least.astype(np.float32) - np.float32(BLOCK_FORMATS[blocks.format].zero)
    minimum = low * scale.astype(np.float32)
    if codes.max(initial=0) > INT4_LEVELS or np.abs(minimum).max(initial=0) > HALF_MAX:
        return None
    return codes, scale, minimum.astype(np.float16)


def _as_symmetric(blocks: QuantisedBlocks) -> tuple[np.ndarray, ...]:
    return blocks.codes, *blocks.coefficients


# --- the formats --------------------------------------------------------------------------------------------

INT4 = _Grouped(
    name="int4",
    largest=HALF_MAX,
    dtype="uint8",
    inputs=4,
    nibbles=2,
    suffixes=(".scale", ".minimum"),
    takes=("q4_0", "q4_1", "q5_0"),
    quantise=quantise_with_minimum,
    convert=_as_int4,
)
# The block format that has the same codes and coefficients as int4, in another layout.
INT4_BLOCKS = BLOCK_FORMATS["q4_1"]
FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        _Plain(name="float32", largest=float(np.finfo(np.float32).max)),
        _Plain(name="bfloat16", largest=float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
        _Grouped(
            name="int8",
            largest=127 * HALF_MAX,
            dtype="int8",
            inputs=2,
            nibbles=1,
            suffixes=(".scale",),
            takes=("q8_0", "q5_0", "q4_0", "iq4_nl"),
            quantise=quantise_int8,
            convert=_as_int8,
        ),
        INT4,
        _Grouped(
            name=INT4_SYMMETRIC,
            largest=INT4_ZERO * HALF_MAX,
            dtype="uint8",
            inputs=4,
            nibbles=2,
            suffixes=(".scale",),
            takes=("q4_0",),
            quantise=quantise_symmetric,
            convert=_as_symmetric,
            zero=INT4_ZERO,
        ),
    )
}
# The formats that the option --weights accepts.
WEIGHTS = (*(name for name in FORMATS if name != INT4_SYMMETRIC), SOURCE)
