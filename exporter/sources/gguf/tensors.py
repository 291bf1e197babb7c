"""The tensors of a GGUF file, under the names and in the order of Hugging Face checkpoints."""

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from ...block_formats import BLOCK_FORMATS
from ..base import QuantisedBlocks, SourceTensor
from .architectures import GgufArchitecture
from .blocks import read_blocks

# Number of rows dequantised at a time. It is small, because the library makes two copies of a call's result.
_SLAB = 512

_NAME = re.compile(r"(?:(?P<layer>blk\.\d+)\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor as stored in the file.

    Attributes:
        shape: outermost axis first.
        type: gguf's `GGMLQuantizationType`.
        data: view of the mapped file; rows of bytes if quantised.
        heads: number of heads if this is a projection to q or k with permuted rows; None otherwise.
        offset: constant that the converter added to every value.
    """

    shape: tuple[int, ...]
    type: Any
    data: np.ndarray
    heads: int | None = None
    offset: float = 0.0


def source_tensors(
    path: Path, stored: Mapping[str, GgufTensor], architecture: GgufArchitecture, config: Mapping[str, Any]
) -> dict[str, SourceTensor]:
    """Return all tensors by Hugging Face name.

    Args:
        path: the file, for messages.
        stored: the file's tensors, except the RoPE factors.
        architecture: the file's architecture.
        config: the file's config from `translate_config`.

    Raises:
        PrecastError: a tensor is unknown, or a stack of experts has the wrong shape.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, SourceTensor] = {}
    for gguf_name, tensor in stored.items():
        match = _NAME.fullmatch(gguf_name)
        if match is None or match["part"] not in architecture.names:
            raise PrecastError(
                f"{path}: contains the unknown tensor {gguf_name}, which may change the maths; use the model's Hugging"
                " Face checkpoint."
            )
        layer = match["layer"].replace("blk", "model.layers") + "." if match["layer"] else ""
        name = f"{layer}{architecture.names[match['part']]}.{match['kind']}"
        prepared = replace(
            tensor,
            heads=heads.get(match["part"]) if architecture.interleaved else None,
            offset=architecture.norm_offset if match["part"].endswith("norm") else 0.0,
        )
        tensors |= {each: _source(matrix) for each, matrix in _matrices(path, gguf_name, name, prepared)}
    return tensors


def _matrices(path: Path, gguf_name: str, name: str, tensor: GgufTensor) -> Iterator[tuple[str, GgufTensor]]:
    """Yield the name and matrix of each expert in a stack ``[E, …]``; a tensor that is not a stack is yielded whole."""
    if "{}" not in name:
        yield name, tensor
        return
    if len(tensor.shape) != 3:
        raise PrecastError(
            f"{path}: expected {gguf_name} to be a stack of matrices, found shape {list(tensor.shape)};"
            " convert the model again."
        )
    for expert in range(tensor.shape[0]):
        yield name.format(expert), replace(tensor, shape=tensor.shape[1:], data=tensor.data[expert])


def _source(tensor: GgufTensor) -> SourceTensor:
    kind = tensor.type.name.lower()
    has_blocks = len(tensor.shape) == 2 and kind in BLOCK_FORMATS and not tensor.offset
    return SourceTensor(
        shape=tensor.shape,
        dtype=tensor.type.name,
        read=partial(dequantise, tensor),
        block_format=kind if has_blocks else None,
        blocks=partial(_blocks, tensor) if has_blocks else None,
    )


def check_tensor_types(path: Path, stored: Mapping[str, GgufTensor]) -> None:
    """Check, before a long export begins, that every tensor can be dequantised.

    Raises:
        PrecastError: a tensor's type cannot be dequantised; the error names the tensor and the type.
    """
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    by_type = {tensor.type: name for name, tensor in stored.items()}
    for kind, name in by_type.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise PrecastError(
                f"{path}: {name} is stored as {kind.name}, which the gguf library cannot dequantise; convert "
                "the model to another type."
            ) from error


def dequantise(tensor: GgufTensor) -> np.ndarray:
    """Return a tensor in float32, without the converter's offset and with rows in the order of Hugging Face."""
    from gguf.quants import dequantize

    order = _order(tensor)
    # A vector is read as one row, because its quantised blocks cannot be split. A vector to be permuted is never
    # quantised, and is read as rows of one value.
    rows = (
        tensor.data.reshape(tensor.shape[0], -1)
        if len(tensor.shape) > 1 or order is not None
        else tensor.data[None]
    )
    out = np.empty((rows.shape[0], int(np.prod(tensor.shape)) // max(rows.shape[0], 1)), np.float32)
    for start in range(0, rows.shape[0], _SLAB):
        slab = slice(start, start + _SLAB)
        out[slab] = dequantize(rows[slab] if order is None else rows[order[slab]], tensor.type)
    _release_pages(tensor.data)
    if tensor.offset:
        out -= np.float32(tensor.offset)
    return out.reshape(tensor.shape)


def _blocks(tensor: GgufTensor) -> QuantisedBlocks:
    """Return the blocks of a matrix, with rows in the order of Hugging Face."""
    blocks = read_blocks(tensor.type.name.lower(), tensor.data, tensor.shape[1], _order(tensor))
    _release_pages(tensor.data)
    return blocks


def _release_pages(array: np.ndarray) -> None:
    """Release the pages of the mapped file, which would otherwise stay resident until the export ends."""
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _order(tensor: GgufTensor) -> np.ndarray | None:
    return None if tensor.heads is None else half_split_order(tensor.shape[0], tensor.heads)


def half_split_order(rows: int, heads: int) -> np.ndarray:
    """Return, for each row of a Hugging Face q or k projection, the index of that row in a llama GGUF file.

    llama.cpp rotates neighbours (0, 1), (2, 3), …; Hugging Face rotates the first half of a head against the second.
    llama.cpp's converter therefore interleaves the two halves of each head: row ``2·i + half`` of a head in the file is
    row ``half·H/2 + i`` of that head in the checkpoint. Source: `LlamaModel.permute` of convert_hf_to_gguf.py.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)
