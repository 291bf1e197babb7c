"""Unpack the quantised matrices of a GGUF file into the codes and coefficients of block formats.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q4_0 and the structures that follow).
"""

from collections.abc import Callable, Mapping

import numpy as np

from ...block_formats import BLOCK_FORMATS, GROUP, for_row_blocks
from ..base import QuantisedBlocks

# Number of weights in a block, for the types whose groups share coefficients.
_SUPER = 256

# The codes [n, weights] of n blocks, and an array [n, …] for each kind of coefficient.
_Unpacked = tuple[np.ndarray, tuple[np.ndarray, ...]]


def read_blocks(
    kind: str, data: np.ndarray, columns: int, order: np.ndarray | None = None
) -> QuantisedBlocks:
    """Unpack a matrix into codes and coefficients that represent exactly the same weights.

    Args:
        kind: GGUF's name of the type in lower case, which is also its key in `BLOCK_FORMATS`.
        data: the matrix as stored, uint8 ``[rows, bytes]``; it may be mapped.
        columns: number of weights in a row.
        order: for each row of the result, its index in `data`; None for the same order.
    """
    unpack, weights = _LAYOUTS[kind]
    rows = len(data)
    form = BLOCK_FORMATS[kind]
    codes = np.empty((rows, columns), np.int8 if form.bits == 8 else np.uint8)
    coefficients = tuple(np.empty((rows, n), dtype) for n, dtype in form.coefficient_shapes(columns))

    def read(slab: slice) -> None:
        stored = data[slab if order is None else order[slab]]
        found, parts = unpack(stored.reshape(len(stored) * (columns // weights), -1))
        codes[slab] = found.view(codes.dtype).reshape(-1, columns)
        for whole, part in zip(coefficients, parts, strict=True):
            whole[slab] = part.reshape(-1, whole.shape[1])

    for_row_blocks(rows, columns, read)
    return QuantisedBlocks(format=kind, codes=codes, coefficients=coefficients)


def _q8_0(blocks: np.ndarray) -> _Unpacked:
    return blocks[:, 2:], (_halves(blocks, 0),)


def _q4_0(blocks: np.ndarray) -> _Unpacked:
    return _nibbles(blocks[:, 2:]), (_halves(blocks, 0),)


def _q4_1(blocks: np.ndarray) -> _Unpacked:
    return _nibbles(blocks[:, 4:]), (_halves(blocks, 0), _halves(blocks, 2))


def _q5_0(blocks: np.ndarray) -> _Unpacked:
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), (_halves(blocks, 0),)


def _q5_1(blocks: np.ndarray) -> _Unpacked:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes, (_halves(blocks, 0), _halves(blocks, 2))


def _q4_k(blocks: np.ndarray) -> _Unpacked:
    return _nibbles(blocks[:, 16:].reshape(-1, 4, GROUP)), _super_coefficients(blocks)


def _q5_k(blocks: np.ndarray) -> _Unpacked:
    # Bit g of byte i is the fifth bit of weight i of group g.
    bits = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, GROUP)).reshape(bits.shape)
    return low | bits << 4, _super_coefficients(blocks)


def _q6_k(blocks: np.ndarray) -> _Unpacked:
    # A block has two halves of four groups each. For each half, 64 bytes hold the lower four bits of codes: those of
    # groups 0 and 1 in the low nibbles, and those of groups 2 and 3 in the high nibbles. 32 bytes hold the other two
    # bits of the codes of all four groups.
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 2 * GROUP)).reshape(-1, 2, 4, GROUP)
    high = blocks[:, 128:192].reshape(-1, 2, 1, GROUP) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return low | high << 4, (_halves(blocks, 208), np.ascontiguousarray(blocks[:, 192:208]).view(np.int8))


def _iq4_nl(blocks: np.ndarray) -> _Unpacked:
    return _nibbles(blocks[:, 2:]), (_halves(blocks, 0),)


def _iq4_xs(blocks: np.ndarray) -> _Unpacked:
    # A block stores eight 6-bit scales, each plus 32. The lower 4 bits of the scales are the nibbles of bytes 4 to 7.
    # The upper 2 bits are in bytes 2 and 3, those of the first scale in the lowest bits.
    low = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15
    high = blocks[:, 2:4, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    scales = (low.reshape(-1, 8) | high.reshape(-1, 8) << 4).view(np.int8) - np.int8(32)
    return _nibbles(blocks[:, 8:].reshape(-1, 8, GROUP // 2)), (_halves(blocks, 0), scales)


def _mxfp4(blocks: np.ndarray) -> _Unpacked:
    return _nibbles(blocks[:, 1:]), (blocks[:, :1],)


def _halves(blocks: np.ndarray, offset: int) -> np.ndarray:
    """Return the float16 that begins at byte `offset` of each block, ``[n, 1]``."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2")


def _nibbles(stored: np.ndarray) -> np.ndarray:
    """Return the low nibbles of the bytes of the last axis, then the high nibbles: ``[…, b]`` → ``[…, 2 b]``."""
    return np.concatenate([stored & 15, stored >> 4], axis=-1)


def _fifth_bits(stored: np.ndarray) -> np.ndarray:
    """Return the bits of four bytes, lowest bit first, each shifted to bit 4 of a code: ``[n, 4]`` → ``[n, 32]``."""
    return np.unpackbits(stored, axis=1, bitorder="little") << 4


def _super_coefficients(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the coefficients of Q4_K and Q5_K: the factors of scales and of minima, then 8 scales and 8 minima.

    Scales and minima have 6 bits. Bytes 4 to 7 belong to scales, and bytes 8 to 11 to minima. The low 6 bits of each
    byte are one of the first four values. The upper 2 bits are the upper bits of one of the last four values. Bytes 12
    to 15 contain the lower 4 bits of the last four: of scales in the low nibbles, of minima in the high nibbles.
    """
    scales, minima, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    return (
        _halves(blocks, 0),
        _halves(blocks, 2),
        np.concatenate([scales & 63, rest & 15 | scales >> 6 << 4], axis=1),
        np.concatenate([minima & 63, rest >> 4 | minima >> 6 << 4], axis=1),
    )


# For each type, the function that unpacks blocks [n, bytes], and the number of weights in a block.
_LAYOUTS: Mapping[str, tuple[Callable[[np.ndarray], _Unpacked], int]] = {
    "q8_0": (_q8_0, GROUP),
    "q4_0": (_q4_0, GROUP),
    "q4_1": (_q4_1, GROUP),
    "q5_0": (_q5_0, GROUP),
    "q5_1": (_q5_1, GROUP),
    "q4_k": (_q4_k, _SUPER),
    "q5_k": (_q5_k, _SUPER),
    "q6_k": (_q6_k, _SUPER),
    "iq4_nl": (_iq4_nl, GROUP),
    "iq4_xs": (_iq4_xs, _SUPER),
    "mxfp4": (_mxfp4, GROUP),
}
