"""Mixed parameters: stacks of matrices, each of which may have another block format.

Two arrays store a mixed parameter. The first array, uint8 ``[units, 64]``, contains the records of all matrices
(`block_formats`), one matrix after another. The second array, int32 ``[L, 2]``, is a table. Its row for a matrix
contains the code of the matrix's format, and the unit at which the matrix begins.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from .block_formats import BLOCK_FORMATS, UNIT
from .quantize import FORMATS, StoredArray

# The storage format of a parameter: a key of `FORMATS`, or for a mixed parameter a tuple with a key of `BLOCK_FORMATS`
# for each matrix.
ParameterFormat = str | tuple[str, ...]

TABLE = ".table"


def stored_arrays(stored: ParameterFormat, shape: tuple[int, ...]) -> tuple[StoredArray, ...]:
    """Return the arrays that store a parameter whose shape is ``[L, out, in]`` or ``[out, in]``."""
    if isinstance(stored, str):
        return FORMATS[stored].arrays(shape)
    units = sum(_units(stored, *shape[-2:]))
    return StoredArray("", (units, UNIT), "uint8"), StoredArray(TABLE, (len(stored), 2), "int32")


def table(formats: Sequence[str], outs: int, inputs: int) -> np.ndarray:
    """Return the table of a mixed parameter, int32 ``[L, 2]``.

    Args:
        formats: the block format of each matrix.
        outs: number of outputs of a matrix.
        inputs: number of inputs of a matrix.
    """
    starts = accumulate(_units(formats, outs, inputs)[:-1], initial=0)
    return np.array(
        [[BLOCK_FORMATS[f].code, unit] for f, unit in zip(formats, starts, strict=True)], np.int32
    )


def _units(formats: Sequence[str], outs: int, inputs: int) -> list[int]:
    """Return the size of each matrix, in units of `UNIT` bytes."""
    return [BLOCK_FORMATS[name].matrix_bytes(outs, inputs) // UNIT for name in formats]


def panel_rows(stored: ParameterFormat, inputs: int) -> int | None:
    """Return the number of rows that a panel takes in an output head's first array; None without panels.

    Args:
        stored: the storage format of the output head.
        inputs: number of inputs of the output head.
    """
    if not isinstance(stored, str):
        return BLOCK_FORMATS[stored[0]].record_bytes(inputs) // UNIT
    return 1 if FORMATS[stored].takes else None
