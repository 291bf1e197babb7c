"""Rename, split, transpose and scale a checkpoint's tensors to fit a module, without reading their data yet."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from ..sources.base import QuantisedBlocks, SourceTensor
from .blocks import DecoderConfig

Tensors = Mapping[str, SourceTensor]


def take(left: dict[str, SourceTensor], name: str, shape: tuple[int, ...]) -> SourceTensor:
    """Remove a tensor from `left`, the tensors not yet used, and return it.

    Call this function before splitting or renaming the tensor, so that an error quotes the name in the checkpoint.

    Raises:
        PrecastError: the tensor is missing or has another shape.
    """
    tensor = left.pop(name, None)
    if tensor is None:
        raise PrecastError(f"tensor {name!r} is missing; use the config and the weights of the same model.")
    if tensor.shape != shape:
        raise PrecastError(
            f"tensor {name!r} has shape {list(tensor.shape)}, but the config requires {list(shape)}; use the"
            " config and the weights of the same model."
        )
    return tensor


def split_rows(tensor: SourceTensor, parts: Mapping[str, int]) -> dict[str, SourceTensor]:
    """Split a tensor by rows into named tensors; `parts` maps each name to the number of rows of its tensor."""
    ends = list(accumulate(parts.values()))
    return {name: _slice_rows(tensor, end - parts[name], end) for name, end in zip(parts, ends, strict=True)}


def _slice_rows(tensor: SourceTensor, start: int, stop: int) -> SourceTensor:
    blocks = tensor.blocks
    return replace(
        tensor,
        shape=(stop - start, *tensor.shape[1:]),
        read=lambda: tensor.read()[start:stop].copy(),
        blocks=None if blocks is None else lambda: _slice_blocks(blocks(), start, stop),
    )


def _slice_blocks(blocks: QuantisedBlocks, start: int, stop: int) -> QuantisedBlocks:
    return replace(
        blocks,
        codes=blocks.codes[start:stop].copy(),
        coefficients=tuple(each[start:stop].copy() for each in blocks.coefficients),
    )


def transpose(tensor: SourceTensor) -> SourceTensor:
    """Transpose ``[in, out]`` to ``[out, in]``."""
    return replace(
        tensor,
        shape=tensor.shape[::-1],
        read=lambda: np.ascontiguousarray(tensor.read().T),
        block_format=None,
        blocks=None,
    )


def scale(tensor: SourceTensor, factor: float | np.ndarray) -> SourceTensor:
    """Multiply the values by a factor in float32, or by an array that broadcasts to the tensor's shape.

    The result's `blocks` is None, because quantised blocks could not represent the products exactly.
    """
    return replace(
        tensor,
        dtype=f"{tensor.dtype}, scaled",
        read=lambda: tensor.read() * np.asarray(factor, np.float32),
        block_format=None,
        blocks=None,
    )


def add_one_to_norms(tensors: Tensors) -> Tensors:
    """Add one to the weights of norms, because the checkpoint stores each weight minus one."""
    return {name: _plus_one(t) if name.endswith("norm.weight") else t for name, t in tensors.items()}


def _plus_one(tensor: SourceTensor) -> SourceTensor:
    return replace(tensor, read=lambda: tensor.read() + np.float32(1.0), block_format=None, blocks=None)


def split_experts(tensors: Tensors, config: DecoderConfig) -> Tensors:
    """Split the stacked experts of every layer into one matrix per expert.

    Newer checkpoints stack the experts of a layer in ``mlp.experts.gate_up_proj`` ``[E, 2 F, D]`` and
    ``mlp.experts.down_proj`` ``[E, D, F]``.

    Raises:
        PrecastError: one of the two tensors is missing, or has another shape.
    """
    assert config.mixture is not None
    left, split, reader = dict(tensors), dict[str, SourceTensor](), _StackReader()
    experts, width, ff = config.mixture.experts, config.width, config.ff_width
    for prefix in (f"model.layers.{i}.mlp.experts." for i in range(config.layers)):
        fused, down = f"{prefix}gate_up_proj", f"{prefix}down_proj"
        if fused not in left and down not in left:
            continue
        stack = take(left, fused, (experts, 2 * ff, width))
        split |= _matrices(stack, reader, 0, ff, f"{prefix}{{}}.gate_proj.weight")
        split |= _matrices(stack, reader, ff, 2 * ff, f"{prefix}{{}}.up_proj.weight")
        stack = take(left, down, (experts, width, ff))
        split |= _matrices(stack, reader, 0, width, f"{prefix}{{}}.down_proj.weight")
    return left | split


class _StackReader:
    """A reader of single matrices from stacks of experts.

    The reader keeps one stack in memory until its last matrix is read. Reading all matrices of a stack in order
    therefore reads the file once.
    """

    def __init__(self) -> None:
        self._tensor: SourceTensor | None = None
        self._array = np.empty(0, np.float32)

    def read(self, tensor: SourceTensor, matrix: int) -> np.ndarray:
        if self._tensor is not tensor:
            self._array = np.empty(0, np.float32)  # frees the previous stack before the next one is read
            self._tensor, self._array = tensor, tensor.read()
        array = self._array
        if matrix == tensor.shape[0] - 1:
            self._tensor, self._array = None, np.empty(0, np.float32)
        chosen: np.ndarray = array[matrix]
        return chosen


def _matrices(
    stack: SourceTensor, reader: _StackReader, start: int, stop: int, name: str
) -> dict[str, SourceTensor]:
    """Return the rows ``[start:stop]`` of each matrix in a stack ``[E, rows, in]`` as a separate tensor.

    In `name`, "{}" stands for the index of the matrix.
    """

    def read_matrix(matrix: int) -> Callable[[], np.ndarray]:
        return lambda: reader.read(stack, matrix)[start:stop].copy()

    shape = (stop - start, stack.shape[2])
    return {
        name.format(i): replace(stack, shape=shape, read=read_matrix(i), block_format=None, blocks=None)
        for i in range(stack.shape[0])
    }
