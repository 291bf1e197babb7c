"""A GGUF file: llama.cpp's container of metadata, tokenizer and (quantised) tensors.

The container is read with llama.cpp's own `gguf` library, which maps the file; `gguf_config` and
`gguf_tokenizer` translate what stands in its metadata. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .base import QuantisedBlocks, Source, SourceTensor
from .files import hash_file, slug, spdx
from .gguf_config import ARCHITECTURES, ROPE_FACTORS, translate_config
from .gguf_metadata import check_types
from .gguf_tokenizer import build_tokenizer

# Rows dequantised at a time; small, because the library holds the result of one call twice.
_SLAB = 512

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?:(?P<layer>blk\.\d+)\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")

# Types whose blocks are handed on as they are: 32 values behind a scale, and a minimum where the type has one.
_BLOCK = 32
_COEFFICIENTS = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2}

# The endings that converters and people put after a model's name.
_QUANTISATION = re.compile(
    r"[-._](?:(?:ud-)?(?:i?q\d|tq\d)[a-z0-9_]*|f16|f32|bf16|fp16|fp32|mxfp4|gguf)$", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A tensor as the file has it: `data` is a view into the mapped file, its rows bytes where quantised."""

    shape: tuple[int, ...]
    type: Any
    data: np.ndarray


def open_gguf(path: Path, *, name: str | None = None) -> Source:
    """Read a GGUF file of architecture llama or qwen2.

    Args:
        path: the file.
        name: a name for the model; None takes the file's, without the name of a quantisation at its end.

    Raises:
        PrecastError: when the file is broken or one part of several, or holds an architecture, a metadata
            key, a tensor, a tensor type or a tokenizer that is not supported.
    """
    metadata, stored = _read(path)
    check_types(path, metadata)
    _check_whole_model(path, metadata)
    factors = _factors(stored)
    tensors = {gguf_name: tensor for gguf_name, tensor in stored.items() if gguf_name != ROPE_FACTORS}
    shapes = {gguf_name: tensor.shape for gguf_name, tensor in tensors.items()}
    config = translate_config(path, metadata, shapes, factors)
    return Source(
        name=slug(name or _stem(path)),
        config=config,
        tensors=_tensors(path, tensors, config),
        tokenizer_json=build_tokenizer(path, metadata),
        chat_template=metadata.get("tokenizer.chat_template") or None,
        bos_token=_token(path, metadata, "bos_token_id"),
        eos_token=_token(path, metadata, "eos_token_id"),
        eos_token_ids=_eos_token_ids(metadata),
        sampling=_sampling(metadata),
        licence=spdx(metadata.get("general.license")),
        files=(hash_file(path),),
    )


# --- container ----------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Metadata and tensors; the reader's own records, many small arrays, are let go."""
    _check_magic(path)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise PrecastError(_explain(path, error)) from error
    if reader.byte_order == "S":
        raise PrecastError(
            f"{path}: is a big-endian GGUF file; convert it to little-endian (gguf-convert-endian) first."
        )
    return metadata, {
        tensor.name: _Tensor(shape=shapes[tensor.name], type=tensor.tensor_type, data=tensor.data)
        for tensor in reader.tensors
    }


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise PrecastError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions."
        ) from error
    if magic != b"GGUF":
        raise PrecastError(
            f"{path}: is not a GGUF file (expected it to begin with b'GGUF', found {magic!r})."
        )


def _explain(path: Path, error: Exception) -> str:
    """The reader slices beyond the end without noticing, and fails on what it makes of the missing bytes."""
    text = str(error).strip("'")
    if any(word in text.lower() for word in ("version", "is not a valid", "duplicate")):
        return (
            f"{path}: is not a GGUF file that the gguf library knows ({text}); update it or convert the "
            "model again."
        )
    return (
        f"{path}: ends before its header or its tensors do (it has {path.stat().st_size:,} bytes), so it is "
        "truncated or damaged; fetch it again."
    )


def _check_whole_model(path: Path, metadata: Mapping[str, Any]) -> None:
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise PrecastError(
            f"{path}: is one of {parts} parts of a model; join them with llama-gguf-split --merge first."
        )
    if metadata.get("general.type", "model") != "model":
        raise PrecastError(
            f"{path}: holds a {metadata['general.type']}, not a model; name the model's own GGUF file."
        )


# --- tensors ------------------------------------------------------------------------------------------------


def _tensors(path: Path, stored: Mapping[str, _Tensor], config: Mapping[str, Any]) -> dict[str, SourceTensor]:
    _check_types(path, stored)
    interleaved = ARCHITECTURES[config["model_type"]].interleaved
    heads = (
        {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        if interleaved
        else {}
    )
    tensors = {}
    for name, tensor in stored.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match["part"] not in _NAMES:
            raise PrecastError(
                f"{path}: holds the tensor {name}, which is not understood, so it cannot be left out."
            )
        layer = match["layer"].replace("blk", "model.layers") + "." if match["layer"] else ""
        tensors[f"{layer}{_NAMES[match['part']]}.{match['kind']}"] = SourceTensor(
            shape=tensor.shape,
            dtype=tensor.type.name,
            read=partial(_dequantise, tensor, heads.get(match["part"])),
            blocks=partial(_blocks, tensor, heads.get(match["part"])) if _in_blocks(tensor) else None,
        )
    return tensors


def _check_types(path: Path, stored: Mapping[str, _Tensor]) -> None:
    """Refuse a type that cannot be dequantised before a long export begins."""
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


def _dequantise(tensor: _Tensor, heads: int | None) -> np.ndarray:
    """The tensor in float32, slab by slab; with `heads`, in the order of rows that Hugging Face has."""
    from gguf.quants import dequantize

    order = None if heads is None else half_split_order(tensor.shape[0], heads)
    # A vector that is quantised would be one row; a plain one is as many rows of one value.
    rows = (
        tensor.data.reshape(tensor.shape[0], -1)
        if len(tensor.shape) > 1 or order is not None
        else tensor.data[None]
    )
    out = np.empty((rows.shape[0], int(np.prod(tensor.shape)) // max(rows.shape[0], 1)), np.float32)
    for start in range(0, rows.shape[0], _SLAB):
        slab = slice(start, start + _SLAB)
        out[slab] = dequantize(rows[slab] if order is None else rows[order[slab]], tensor.type)
    _let_go(tensor.data)
    return out.reshape(tensor.shape)


def _in_blocks(tensor: _Tensor) -> bool:
    return len(tensor.shape) == 2 and tensor.type.name in _COEFFICIENTS


def _blocks(tensor: _Tensor, heads: int | None) -> QuantisedBlocks:
    """The blocks of a matrix taken apart, its rows in the same order as `_dequantise` has them.

    Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q8_0, block_q4_0, block_q4_1).
    """
    rows, columns = tensor.shape
    kind, count = tensor.type.name, _COEFFICIENTS[tensor.type.name]
    order = np.arange(rows) if heads is None else half_split_order(rows, heads)
    values = np.empty((rows, columns), np.uint8)
    coefficients = np.empty((count, rows, columns // _BLOCK), np.float16)
    for start in range(0, rows, _SLAB):
        slab = slice(start, start + _SLAB)
        stored = tensor.data[order[slab]]
        stored = stored.reshape(len(stored), columns // _BLOCK, -1)
        head = np.ascontiguousarray(stored[..., : 2 * count]).view("<f2")
        coefficients[:, slab] = np.moveaxis(head, -1, 0)
        values[slab] = _values(kind, stored[..., 2 * count :]).reshape(-1, columns)
    _let_go(tensor.data)
    minimum = coefficients[1] if count > 1 else None
    return QuantisedBlocks(
        values=values if kind == "Q4_1" else values.view(np.int8), scale=coefficients[0], minimum=minimum
    )


def _values(kind: str, stored: np.ndarray) -> np.ndarray:
    """The 32 values of each block; 16 bytes hold the first half in low nibbles, the second in high ones."""
    if kind == "Q8_0":
        return stored
    values = np.concatenate([stored & 15, stored >> 4], axis=-1)
    return values - np.uint8(8) if kind == "Q4_0" else values  # wraps, and is read as signed


def _let_go(array: np.ndarray) -> None:
    """Gives the mapped file's pages back, which otherwise stay in this process until the export ends."""
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def half_split_order(rows: int, heads: int) -> np.ndarray:
    """Where each row of a Hugging Face q or k projection stands in a llama GGUF file, ``[rows]``.

    llama.cpp rotates neighbours (0, 1), (2, 3), …; Hugging Face rotates the first half of a head against the
    second. Its converter therefore interleaves the halves of each head, which this undoes: row ``2·i + half``
    of a head in the file is row ``half·H/2 + i`` of that head. Source: `LlamaModel.permute` of
    convert_hf_to_gguf.py.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _factors(stored: Mapping[str, _Tensor]) -> np.ndarray | None:
    return _dequantise(stored[ROPE_FACTORS], None) if ROPE_FACTORS in stored else None


# --- the rest of the metadata -------------------------------------------------------------------------------


def _stem(path: Path) -> str:
    """The file's name without ending and quantisation: "Qwen2-0.5B-Q4_K_M.gguf" becomes "Qwen2-0.5B"."""
    return _QUANTISATION.sub("", path.stem) or path.stem


def _token(path: Path, metadata: Mapping[str, Any], key: str) -> str | None:
    """The text of a special token; `build_tokenizer` has checked the list by the time this looks into it."""
    token_id = metadata.get(f"tokenizer.ggml.{key}")
    if token_id is None:
        return None
    tokens = metadata["tokenizer.ggml.tokens"]
    if not 0 <= token_id < len(tokens):
        raise PrecastError(
            f"{path}: tokenizer.ggml.{key} is {token_id}, beyond the vocabulary of {len(tokens)}; convert "
            "the model again."
        )
    return str(tokens[token_id])


def _eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of sequence, of turn and of message, as far as the file names them."""
    found = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))


def _sampling(metadata: Mapping[str, Any]) -> dict[str, float | int]:
    """The recommended sampler, which newer converters copy out of generation_config.json.

    The export checks that they are possible.
    """
    keys = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    keys |= {"penalty_repeat": "repetition_penalty"}
    said = {theirs: metadata.get(f"general.sampling.{ours}") for ours, theirs in keys.items()}
    return {key: value for key, value in said.items() if value is not None} if said["temperature"] else {}
