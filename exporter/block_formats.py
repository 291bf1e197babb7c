"""Block formats: GGUF's quantised types, in panels of 16 outputs that the kernels read from front to back.

A block format stores a matrix ``[out, in]`` as small integers, the codes, with coefficients for each group of 32
inputs of an output. A weight is scale · (code − zero), or scale · code + minimum in formats with minima. In formats
with a codebook, a weight is scale · codebook[code]. In e4m3, the codes are numbers in float8_e4m3fn, and a weight is
scale · number. The formats differ in the bits of a code, in the codebook, and in how the coefficients are stored
(`Scales`).

Each panel is one record of bytes. A record has G groups (the inputs, rounded up to whole groups) and S super-groups of
up to 8 groups. It consists of these parts, in this order:

- the coefficients;
- the low 4 bits of the codes, uint8 ``[4 G, 16, 4]``: of eight consecutive inputs, the low nibbles store the first four
  and the high nibbles the last four. 8-bit codes are int8 ``[16 G, 16, 2]`` instead, and those of e4m3 ``[32 G, 16]``;
- for 5-bit codes, the fifth bits, uint8 ``[G, 16, 4]``: bit q at index j of the last axis belongs to input 4 q + j of
  the group. For 6-bit codes, the fifth and sixth bits, uint8 ``[2 G, 16, 4]``: bits 2 q and 2 q + 1 at index j of the
  last axis belong to input 4 q + j of the half of a group;
- zeros up to a multiple of 64 bytes.

The coefficients are:

- `Scales.HALF`: scales, float16 ``[G, 16]``.
- `Scales.HALF_AND_MINIMUM`: scales and minima, float16 ``[G, 2, 16]``.
- `Scales.SUPER`: factors of the scales and of the minima, float16 ``[S, 2, 16]``. Then a 12-bit number for each group:
  the low 6 bits are the group's scale, and the high 6 bits its minimum. The factors multiply them.
- `Scales.SUPER_OF_16`: factors, float16 ``[S, 16]``. Then an int8 scale for each half of a group, ``[G, 2, 16]``.
- `Scales.SUPER_SIGNED`: factors, float16 ``[S, 16]``. Then four 12-bit numbers for each super-group. Each number stores
  the signed 6-bit scales of two groups, that of the first group in the low bits.
- `Scales.EXPONENT`: exponents, uint8 ``[G, 16]``. The scale is 2 to the power of the exponent minus 128.
- `Scales.FLOAT`: scales, float32 ``[⌈G/4⌉, 16]``. Each belongs to four groups.

Four 12-bit numbers are packed into three uint16, ``[⌈n/4⌉, 3, 16]`` for n numbers. The low 12 bits of the three words
are the first three numbers. The high 4 bits of the words are the fourth number, its lowest bits first.

Outputs are padded to whole panels and inputs to whole groups; all bytes of the padding are zero. A padded weight of a
partly filled group need not dequantise to zero, so the activations that multiply it must be zero.

Source of the formats except e4m3: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Unlike there, the
number of inputs need not be a multiple of 32 or 256.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

GROUP, PANEL = 32, 16
# Groups of a super-group, and 12-bit numbers that are packed together, or groups that share a float32 scale.
SUPER, _PACKED = 8, 4
# Inputs that share a float32 scale.
FLOAT_GROUP = _PACKED * GROUP
# Entries of a stack, and records of a matrix, begin at multiples of this many bytes.
UNIT = 64

# Number of weights that a thread works on at a time, so that the intermediate arrays fit into the CPU's cache.
_BLOCK = 1 << 18
# Maximum number of threads. Each needs about 12 MB. They run in parallel, because NumPy releases the GIL.
_THREADS = 8


class Scales(Enum):
    """The ways to store the coefficients of groups; the module's docstring describes each."""

    HALF = "half"
    HALF_AND_MINIMUM = "half and minimum"
    SUPER = "super"
    SUPER_OF_16 = "super of 16"
    SUPER_SIGNED = "super signed"
    EXPONENT = "exponent"
    FLOAT = "float"


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """A block format.

    Attributes:
        name: GGUF's name, in lower case.
        code: the format's own number in artifacts and in the kernels; it never changes.
        bits: number of bits in a weight's code.
        scales: the way in which the coefficients are stored.
        zero: the weight's code that represents 0; 0 in formats with minima or a codebook.
        codebook: the integer that each code represents; None if a code represents itself, minus `zero`.
    """

    name: str
    code: int
    bits: int
    scales: Scales
    zero: int = 0
    codebook: tuple[int, ...] | None = None

    @property
    def has_float_codes(self) -> bool:
        """Return True if the codes are floating-point numbers."""
        return self.scales is Scales.FLOAT

    @property
    def runs(self) -> int:
        """Number of scales in a group: 2 if each half of a group has its own."""
        return 2 if self.scales is Scales.SUPER_OF_16 else 1

    def coefficient_shapes(self, inputs: int) -> tuple[tuple[int, np.dtype], ...]:
        """Return the count and the dtype of each kind of coefficient of one output, in the order of `pack`'s arguments.

        `Scales.HALF`: the scales. `Scales.HALF_AND_MINIMUM`: scales, minima. `Scales.SUPER`: the factors of scales and
        of minima of the super-groups, then the 6-bit scales and minima of the groups. `Scales.SUPER_OF_16` and
        `Scales.SUPER_SIGNED`: the factors of the super-groups, then the signed scales. `Scales.EXPONENT`: the
        exponents. `Scales.FLOAT`: the scales.
        """
        groups = -(-inputs // GROUP)
        supers = -(-groups // SUPER)
        half, byte = np.dtype(np.float16), np.dtype(np.uint8)
        match self.scales:
            case Scales.HALF:
                return ((groups, half),)
            case Scales.HALF_AND_MINIMUM:
                return (groups, half), (groups, half)
            case Scales.SUPER:
                return (supers, half), (supers, half), (groups, byte), (groups, byte)
            case Scales.SUPER_OF_16:
                return (supers, half), (2 * groups, np.dtype(np.int8))
            case Scales.SUPER_SIGNED:
                return (supers, half), (groups, np.dtype(np.int8))
            case Scales.EXPONENT:
                return ((groups, byte),)
            case Scales.FLOAT:
                return ((-(-groups // _PACKED), np.dtype(np.float32)),)

    def record_bytes(self, inputs: int) -> int:
        """Return the size in bytes of the record of a panel with this many inputs."""
        return -(-sum(self._sections(-(-inputs // GROUP))) // UNIT) * UNIT

    def matrix_bytes(self, outs: int, inputs: int) -> int:
        """Return the size in bytes of a matrix ``[outs, inputs]``, a multiple of `UNIT`."""
        return -(-outs // PANEL) * self.record_bytes(inputs)

    def _sections(self, groups: int) -> tuple[int, int, int]:
        """Return the bytes of coefficients, of low codes and of high bits in a record with this many groups."""
        supers = -(-groups // SUPER)
        coefficients = {
            Scales.HALF: 2 * PANEL * groups,
            Scales.HALF_AND_MINIMUM: 4 * PANEL * groups,
            Scales.SUPER: 4 * PANEL * supers + 6 * PANEL * -(-groups // _PACKED),
            Scales.SUPER_OF_16: 2 * PANEL * supers + 2 * PANEL * groups,
            Scales.SUPER_SIGNED: 2 * PANEL * supers + 6 * PANEL * supers,
            Scales.EXPONENT: PANEL * groups,
            Scales.FLOAT: 4 * PANEL * -(-groups // _PACKED),
        }[self.scales]
        weights = GROUP * PANEL * groups
        if self.bits == 8:
            return coefficients, weights, 0
        return coefficients, weights // 2, weights * (self.bits - 4) // 8

    # --- packing -----------------------------------------------------------------------------------------------

    def pack(self, codes: np.ndarray, *coefficients: np.ndarray) -> np.ndarray:
        """Return the records of a matrix.

        Args:
            codes: ``[out, in]``; int8 for 8 bits, otherwise uint8.
            coefficients: arrays ``[out, n]`` as `coefficient_shapes` describes them.

        Returns:
            uint8 ``[panels, record_bytes]``.
        """
        outs, inputs = codes.shape
        groups = -(-inputs // GROUP)
        records = np.zeros((-(-outs // PANEL), self.record_bytes(inputs)), np.uint8)
        first, low, high = self._sections(groups)

        def store(rows: slice) -> None:
            panels = records[rows.start // PANEL : -(-rows.stop // PANEL)]
            own = _in_panels(codes[rows], GROUP * groups)
            panels[:, :first] = self._packed_coefficients([_in_panels(c[rows]) for c in coefficients])
            panels[:, first : first + low] = (
                _bytes(own) if self.has_float_codes else _packed_low(own, self.bits)
            )
            if high:
                panels[:, first + low : first + low + high] = _packed_high(own, self.bits)

        for_row_blocks(outs, inputs, store)
        return records

    def _packed_coefficients(self, parts: list[np.ndarray]) -> np.ndarray:
        """Pack coefficients ``[P, n, 16]`` into bytes ``[P, n]``."""
        match self.scales:
            case Scales.HALF | Scales.HALF_AND_MINIMUM:
                return _bytes(np.stack(parts, axis=2))
            case Scales.SUPER:
                scale, minimum, *codes = parts
                words = _packed_words(codes[0], codes[1])
                return np.concatenate([_bytes(np.stack([scale, minimum], axis=2)), words], axis=1)
            case Scales.SUPER_SIGNED:
                factor, scale = parts
                scale = np.pad(scale.view(np.uint8) & 63, ((0, 0), (0, -scale.shape[1] % SUPER), (0, 0)))
                return np.concatenate([_bytes(factor), _packed_words(scale[:, ::2], scale[:, 1::2])], axis=1)
            case Scales.SUPER_OF_16 | Scales.EXPONENT | Scales.FLOAT:
                return np.concatenate([_bytes(part) for part in parts], axis=1)

    # --- unpacking ---------------------------------------------------------------------------------------------

    def unpack(self, records: Any, inputs: int) -> tuple[Any, Any, Any]:
        """Return the numbers, the scales and the minima in records, which may be arrays of NumPy or JAX.

        Args:
            records: uint8 ``[P, record_bytes]``.
            inputs: number of inputs.

        Returns:
            The numbers that the codes represent, float32 ``[P, 16, 32 G]``; the scales, float32 ``[P, 16, n]``, of
            which a group has one or two; and the minima in the same shape, or None for a format without minima.
        """
        groups = -(-inputs // GROUP)
        first, low, high = self._sections(groups)
        head, rest = records[:, :first], records[:, first:]
        if self.has_float_codes:
            codes = rest[:, :low].view(np.int8).reshape(len(records), -1, PANEL).swapaxes(1, 2)
            return _e4m3(codes), *self._unpacked_coefficients(head, groups)
        codes = _unpacked_low(rest[:, :low], self.bits)
        if high:
            codes = codes | _unpacked_high(rest[:, low : low + high], self.bits) << 4
        scale, minimum = self._unpacked_coefficients(head, groups)
        if self.codebook is None:
            return codes.astype(np.float32) - np.float32(self.zero), scale, minimum
        return codes.__array_namespace__().asarray(self.codebook, dtype=np.float32)[codes], scale, minimum

    def dequantise(self, records: Any, inputs: int) -> Any:
        """Dequantise records ``[P, record_bytes]`` of NumPy or JAX into float32 ``[P, 16, 32 G]``."""
        numbers, scale, minimum = self.unpack(records, inputs)
        groups = numbers.reshape(*scale.shape, -1) * scale[..., None]
        if minimum is not None:
            groups = groups + minimum[..., None]
        return groups.reshape(numbers.shape)

    def decode(self, records: np.ndarray, outs: int, inputs: int) -> np.ndarray:
        """Dequantise the records of a matrix into float32 ``[outs, inputs]``."""
        matrix: np.ndarray = self.dequantise(records.reshape(-1, self.record_bytes(inputs)), inputs)
        return np.ascontiguousarray(matrix.reshape(-1, matrix.shape[-1])[:outs, :inputs])

    def _unpacked_coefficients(self, head: Any, groups: int) -> tuple[Any, Any]:
        count, supers = len(head), -(-groups // SUPER)
        match self.scales:
            case Scales.HALF:
                return _floats(head, (count, groups, PANEL)), None
            case Scales.HALF_AND_MINIMUM:
                both = head.reshape(count, groups, 2, -1)
                return tuple(_floats(both[:, :, i], (count, groups, PANEL)) for i in range(2))
            case Scales.SUPER:
                size = 4 * PANEL * supers
                both = head[:, :size].reshape(count, supers, 2, -1)
                factors = [
                    spread(_floats(both[:, :, i], (count, supers, PANEL)), SUPER, groups) for i in range(2)
                ]
                scale, minimum = _unpacked_words(head[:, size:], groups)
                return factors[0] * scale.astype(np.float32), -(factors[1] * minimum.astype(np.float32))
            case Scales.SUPER_OF_16:
                size = 2 * PANEL * supers
                factor = spread(_floats(head[:, :size], (count, supers, PANEL)), 2 * SUPER, 2 * groups)
                own = head[:, size:].reshape(count, 2 * groups, PANEL).view(np.int8)
                return factor * own.swapaxes(1, 2).astype(np.float32), None
            case Scales.SUPER_SIGNED:
                size = 2 * PANEL * supers
                factor = spread(_floats(head[:, :size], (count, supers, PANEL)), SUPER, groups)
                pairs = _unpacked_words(head[:, size:], supers * _PACKED)
                both = (
                    head.__array_namespace__().stack(pairs, axis=-1).reshape(count, PANEL, -1)[..., :groups]
                )
                return factor * ((both ^ 32).astype(np.float32) - np.float32(32)), None
            case Scales.EXPONENT:
                return _powers(head.reshape(count, groups, PANEL).swapaxes(1, 2)), None
            case Scales.FLOAT:
                scale = head.reshape(count, -1, PANEL, 4).view(np.float32)[..., 0].swapaxes(1, 2)
                return spread(scale, _PACKED, groups), None


def for_row_blocks(rows: int, columns: int, work: Callable[[slice], None]) -> None:
    """Call `work` in several threads with slices of a matrix's rows. A slice is some panels of about `_BLOCK` weights.

    Raises:
        Exception: the first exception of `work`.
    """
    step = max(PANEL, _BLOCK // max(columns, 1) // PANEL * PANEL)
    slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(work, slices))  # raises the exception of a failed thread


def _in_panels(array: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Pad an array ``[out, n]`` with zeros to whole panels, and to `columns` if given; return ``[P, n, 16]``."""
    rows, width = array.shape
    padded = np.pad(array, ((0, -rows % PANEL), (0, 0 if columns is None else columns - width)))
    return padded.reshape(-1, PANEL, padded.shape[1]).swapaxes(1, 2)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)


def _packed_low(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes ``[P, I, 16]`` into bytes ``[P, n]``: 8-bit codes whole, of narrower codes the low four bits."""
    count = len(codes)
    if bits == 8:
        return _bytes(codes.reshape(count, -1, 2, PANEL).swapaxes(2, 3))
    fours = (codes & 15).reshape(count, -1, 2, 4, PANEL)
    return _bytes((fours[:, :, 0] | fours[:, :, 1] << 4).swapaxes(2, 3))


def _packed_high(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack the bits above the low four of codes ``[P, I, 16]`` into bytes ``[P, n]``."""
    width = bits - 4  # bits of each code to pack, 8 / width of them into a byte
    parts = (codes >> 4).reshape(len(codes), -1, 8 // width, 4, PANEL)
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None, None]
    return _bytes(np.bitwise_or.reduce(parts << shifts, axis=2).swapaxes(2, 3))


def _unpacked_low(low: Any, bits: int) -> Any:
    """Return the codes ``[P, 16, I]`` if they have 8 bits, or else the low four bits of each code."""
    count = len(low)
    if bits == 8:
        return low.view(np.int8).reshape(count, -1, PANEL, 2).swapaxes(1, 2).reshape(count, PANEL, -1)
    fours = low.reshape(count, -1, 1, PANEL, 4) >> np.array([0, 4], np.uint8)[:, None, None] & 15
    return fours.reshape(count, -1, PANEL, 4).swapaxes(1, 2).reshape(count, PANEL, -1)


def _unpacked_high(high: Any, bits: int) -> Any:
    """Return the bits ``[P, 16, I]`` above the low four of each code."""
    count, width = len(high), bits - 4
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None, None]
    parts = high.reshape(count, -1, 1, PANEL, 4) >> shifts & ((1 << width) - 1)
    return parts.reshape(count, -1, PANEL, 4).swapaxes(1, 2).reshape(count, PANEL, -1)


def _floats(stored: Any, shape: tuple[int, int, int]) -> Any:
    """Read bytes as float16 numbers ``[P, n, 16]``, and return them as float32 ``[P, 16, n]``."""
    halves = stored.reshape(*shape, 2).view(np.float16)[..., 0]
    return halves.swapaxes(1, 2).astype(np.float32)


def spread(factors: Any, times: int, count: int) -> Any:
    """Repeat each of the factors ``[P, 16, S]`` `times` times; return the first `count`."""
    return factors.repeat(times, axis=-1)[..., :count]


def _packed_words(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Pack 6-bit numbers ``[P, n, 16]``, two to a 12-bit number, into bytes ``[P, m]``."""
    both = low.astype(np.uint16) | high.astype(np.uint16) << 6
    both = np.pad(both, ((0, 0), (0, -both.shape[1] % _PACKED), (0, 0)))
    fours = both.reshape(len(both), -1, _PACKED, PANEL)
    shifts = np.array([0, 4, 8], np.uint16)[:, None]
    return _bytes(fours[:, :, :3] | (fours[:, :, 3:] >> shifts) << 12)


def _unpacked_words(stored: Any, count: int) -> tuple[Any, Any]:
    """Return the low and the high 6 bits, uint16 ``[P, 16, n]``, of the first n 12-bit numbers in bytes ``[P, m]``."""
    words = stored.reshape(len(stored), -1, 3, PANEL, 2).view(np.uint16)[..., 0]
    top = words >> 12
    fourth = top[:, :, :1] | top[:, :, 1:2] << 4 | top[:, :, 2:] << 8
    xp = words.__array_namespace__()
    both = xp.concatenate([words & 0xFFF, fourth], axis=2)  # [P, ⌈n/4⌉, 4, 16]
    both = both.reshape(len(words), -1, PANEL).swapaxes(1, 2)[..., :count]
    return both & 63, both >> 6


def _e4m3(codes: Any) -> Any:
    """Return the numbers in float8_e4m3fn, int8, as float32. A NaN becomes ±480.

    The bits of such a number, moved into float16, represent the number divided by 256, also if it is subnormal.
    """
    halves = (codes.astype(np.int16) << 7 & np.int16(-0x4080)).view(np.float16)
    return halves.astype(np.float32) * np.float32(256)


def _powers(exponents: Any) -> Any:
    """Return 2 to the power of each exponent, a uint8, minus 128. The bits of the two smallest powers are subnormal."""
    xp = exponents.__array_namespace__()
    wide = exponents.astype(np.uint32)
    return xp.where(wide < 2, 0x200000 << wide, (wide - 1) << 23).astype(np.uint32).view(np.float32)


# --- the formats ------------------------------------------------------------------------------------------------

# The integers of IQ4_NL and IQ4_XS are denser around zero. Those of MXFP4 are e2m1 numbers, doubled; code 8 is −0.
_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

BLOCK_FORMATS: Mapping[str, BlockFormat] = {
    f.name: f
    for f in (
        BlockFormat(name="q8_0", code=1, bits=8, scales=Scales.HALF),
        BlockFormat(name="q4_0", code=2, bits=4, scales=Scales.HALF, zero=8),
        BlockFormat(name="q4_1", code=3, bits=4, scales=Scales.HALF_AND_MINIMUM),
        BlockFormat(name="q5_0", code=4, bits=5, scales=Scales.HALF, zero=16),
        BlockFormat(name="q5_1", code=5, bits=5, scales=Scales.HALF_AND_MINIMUM),
        BlockFormat(name="q4_k", code=6, bits=4, scales=Scales.SUPER),
        BlockFormat(name="q5_k", code=7, bits=5, scales=Scales.SUPER),
        BlockFormat(name="q6_k", code=8, bits=6, scales=Scales.SUPER_OF_16, zero=32),
        BlockFormat(name="iq4_nl", code=9, bits=4, scales=Scales.HALF, codebook=_NON_LINEAR),
        BlockFormat(name="iq4_xs", code=10, bits=4, scales=Scales.SUPER_SIGNED, codebook=_NON_LINEAR),
        BlockFormat(name="mxfp4", code=11, bits=4, scales=Scales.EXPONENT, codebook=_E2M1),
        BlockFormat(name="e4m3", code=12, bits=8, scales=Scales.FLOAT),
    )
}
