"""A checkpoint's tensors as a module takes them: renamed, cut, turned or scaled, and still read only when asked for."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from ..sources.base import QuantisedBlocks, SourceTensor
from .blocks import DecoderConfig

Tensors = Mapping[str, SourceTensor]


def take(left: dict[str, SourceTensor], name: str, shape: tuple[int, ...]) -> SourceTensor:
    """Takes a tensor out of those left. What is made of it goes by another name, so its own is checked here.

    Raises:
        PrecastError: when it is missing or has another shape.
    """
    tensor = left.pop(name, None)
    if tensor is None:
        raise PrecastError(f"tensor {name!r} is missing; the config and the weights do not fit.")
    if tensor.shape != shape:
        raise PrecastError(
            f"tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)} by the config."
        )
    return tensor


def split_rows(tensor: SourceTensor, parts: Mapping[str, int]) -> dict[str, SourceTensor]:
    """Its rows as tensors of their own: by name, how many each has."""
    ends = list(accumulate(parts.values()))
    return {name: _rows(tensor, end - parts[name], end) for name, end in zip(parts, ends, strict=True)}


def _rows(tensor: SourceTensor, start: int, stop: int) -> SourceTensor:
    blocks = tensor.blocks
    return replace(
        tensor,
        shape=(stop - start, *tensor.shape[1:]),
        read=lambda: tensor.read()[start:stop].copy(),
        blocks=None if blocks is None else lambda: _block_rows(blocks(), start, stop),
    )


def _block_rows(blocks: QuantisedBlocks, start: int, stop: int) -> QuantisedBlocks:
    minimum = blocks.minimum
    return QuantisedBlocks(
        values=blocks.values[start:stop].copy(),
        scale=blocks.scale[start:stop].copy(),
        minimum=None if minimum is None else minimum[start:stop].copy(),
    )


def transposed(tensor: SourceTensor) -> SourceTensor:
    """``[in, out]`` as ``[out, in]``."""
    return replace(
        tensor,
        shape=tensor.shape[::-1],
        read=lambda: np.ascontiguousarray(tensor.read().T),
        blocks=None,
    )


def scaled(tensor: SourceTensor, factor: float) -> SourceTensor:
    """Its values times a factor, in float32; blocks could not say the product to the bit."""
    return replace(tensor, read=lambda: tensor.read() * np.float32(factor), blocks=None)


def with_norms_plus_one(tensors: Tensors) -> Tensors:
    """Weights of norms that are stored as their difference from one, as what x is multiplied by."""
    return {name: _plus_one(t) if name.endswith("norm.weight") else t for name, t in tensors.items()}


def _plus_one(tensor: SourceTensor) -> SourceTensor:
    return replace(tensor, read=lambda: tensor.read() + np.float32(1.0), blocks=None)


def with_experts_apart(tensors: Tensors, c: DecoderConfig) -> Tensors:
    """The experts of every layer as matrices of their own, where a checkpoint has them in one tensor.

    Newer ones may have ``mlp.experts.gate_up_proj`` ``[E, 2 F, D]`` and ``mlp.experts.down_proj`` ``[E, D, F]``.

    Raises:
        PrecastError: when only one of the two is there, or one has another shape.
    """
    assert c.mixture is not None
    left, made, last = dict(tensors), dict[str, SourceTensor](), _Last()
    experts, width, ff = c.mixture.experts, c.width, c.ff_width
    for prefix in (f"model.layers.{i}.mlp.experts." for i in range(c.layers)):
        fused, down = f"{prefix}gate_up_proj", f"{prefix}down_proj"
        if fused not in left and down not in left:
            continue
        stack = take(left, fused, (experts, 2 * ff, width))
        made |= _matrices(stack, last, 0, ff, f"{prefix}{{}}.gate_proj.weight")
        made |= _matrices(stack, last, ff, 2 * ff, f"{prefix}{{}}.up_proj.weight")
        stack = take(left, down, (experts, width, ff))
        made |= _matrices(stack, last, 0, width, f"{prefix}{{}}.down_proj.weight")
    return left | made


class _Last:
    """Reads tensors of which one matrix after another is asked for: each once, and kept until its last one is."""

    def __init__(self) -> None:
        self._tensor: SourceTensor | None = None
        self._array = np.empty(0, np.float32)

    def read(self, tensor: SourceTensor, matrix: int) -> np.ndarray:
        if self._tensor is not tensor:
            self._array = np.empty(0, np.float32)  # before the next is read
            self._tensor, self._array = tensor, tensor.read()
        array = self._array
        if matrix == tensor.shape[0] - 1:
            self._tensor, self._array = None, np.empty(0, np.float32)
        return array[matrix]


def _matrices(stack: SourceTensor, last: _Last, start: int, stop: int, name: str) -> dict[str, SourceTensor]:
    """Some rows of every matrix of a stack ``[E, rows, in]``."""

    def reader(matrix: int) -> Callable[[], np.ndarray]:
        return lambda: last.read(stack, matrix)[start:stop].copy()

    shape = (stop - start, stack.shape[2])
    return {
        name.format(i): replace(stack, shape=shape, read=reader(i), blocks=None)
        for i in range(stack.shape[0])
    }
