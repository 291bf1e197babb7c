"""Weights of a checkpoint that are integers, with a scale and a zero point for each group of inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from ...block_formats import BLOCK_FORMATS, GROUP
from ..base import QuantisedBlocks, SourceTensor

# The block formats whose codes are consecutive integers and whose groups have one scale and no minimum, smallest format
# first.
_SYMMETRIC = ("q4_0", "q5_0", "q8_0")


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A weight that consists of unsigned integers, and of a scale and a zero point for each group of inputs.

    Attributes:
        fail: returns the error for integers, scales and group indices that do not fit together.
        shape: ``[out, in]``.
        dtype: name of the format, for messages.
        bits: number of bits of each integer.
        groups: number of groups.
        size: number of inputs in a group; 0 if all groups have the same number of inputs.
        numbers: returns the integers, uint8 ``[out, in]``.
        zeros: returns the zero points, which are the integers that represent 0, as float32 ``[out, groups]``.
        scales: returns the scales ``[out, groups]``.
        index: returns the index of each input's group ``[in]``; None if each group consists of consecutive inputs.
    """

    fail: Callable[[str], PrecastError]
    shape: tuple[int, int]
    dtype: str
    bits: int
    groups: int
    size: int
    numbers: Callable[[], np.ndarray]
    zeros: Callable[[], np.ndarray]
    scales: Callable[[], np.ndarray]
    index: Callable[[], np.ndarray] | None

    def source(self) -> SourceTensor:
        """Return the weight as a tensor. The tensor has blocks if a block format represents the weight exactly.

        Raises:
            PrecastError: the number of inputs does not fit the number of groups.
        """
        inputs, groups, size = self.shape[1], self.groups, self.size
        if self.index is None and (-(-inputs // size) != groups if size else inputs % groups):
            raise self.fail(
                f"expected scales for groups of {f'{size} inputs' if size else 'equal size'}, found {groups} groups for"
                f" {inputs} inputs"
            )
        kind = self._block_format()
        return SourceTensor(
            shape=self.shape,
            dtype=self.dtype,
            read=self.read,
            block_format=kind,
            blocks=None if kind is None else partial(self._blocks, kind),
        )

    def read(self) -> np.ndarray:
        """Return ``(numbers − zeros) · scales`` in float32."""
        scales = self.scales().astype(np.float32)
        inputs, groups = self.shape[1], self.groups
        group = np.arange(inputs) // self._size if self.index is None else self.index().astype(np.int64)
        if group.size and not 0 <= group.min() <= group.max() < groups:
            raise self.fail(
                f"expected g_idx from 0 to {groups - 1}, found {int(group.min())} to {int(group.max())}"
            )
        result = self.numbers().astype(np.float32)
        result -= self.zeros()[:, group]
        result *= scales[:, group]
        return result

    @property
    def _size(self) -> int:
        """Number of inputs in a group, if each group consists of consecutive inputs."""
        return self.size or max(1, self.shape[1] // self.groups)

    def _block_format(self) -> str | None:
        """Return the name of the smallest block format that represents the weight exactly; None if there is none.

        The codes represent the differences between integers and zero points, so the format needs no minima. q5_0 can
        represent the differences of 4-bit integers from any zero points.
        """
        inputs, size, zeros = self.shape[1], self._size, self.zeros()
        is_whole = -(-inputs // size) == self.groups and (size % GROUP == 0 or self.groups == 1)
        is_in_order = self.index is None or np.array_equal(self.index(), np.arange(inputs) // size)
        if not (is_whole and is_in_order and are_halves(self.scales())):
            return None
        low, high = -zeros.max(initial=0), (1 << self.bits) - 1 - zeros.min(initial=1 << self.bits)
        return next((kind for kind in _SYMMETRIC if -low <= _half(kind) and high < _half(kind)), None)

    def _blocks(self, kind: str) -> QuantisedBlocks:
        """Return the weight in the block format `kind`, which must represent it exactly."""
        inputs, size = self.shape[1], self._size
        shift = (BLOCK_FORMATS[kind].zero - self.zeros()).astype(np.int16).astype(np.uint8)
        codes = self.numbers() + np.repeat(shift, size, axis=1)[:, :inputs]  # wraps around modulo 256
        return QuantisedBlocks(
            format=kind,
            codes=codes.view(np.int8) if BLOCK_FORMATS[kind].bits == 8 else codes,
            coefficients=(self.scales()[:, np.arange(0, inputs, GROUP) // size].astype(np.float16),),
        )


def _half(kind: str) -> int:
    """Return half the number of codes of a block format, h. The codes represent the integers from −h to h − 1."""
    return 1 << BLOCK_FORMATS[kind].bits - 1


def are_halves(scales: np.ndarray) -> bool:
    """Return True if float16 can represent all scales exactly."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16).astype(np.float32)
    return np.array_equal(halves, scales.astype(np.float32))
