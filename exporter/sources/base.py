"""The model that an export reads, independent of the kind of source."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class QuantisedBlocks:
    """A quantised matrix ``[out, in]`` of a checkpoint, represented exactly in one of the block formats.

    Attributes:
        format: name of the format in `block_formats.BLOCK_FORMATS`.
        codes: ``[out, in]``; int8 for 8 bits, otherwise uint8.
        coefficients: arrays ``[out, n]``, in the order that `BlockFormat.pack` expects; scales may be negative.
    """

    format: str
    codes: np.ndarray
    coefficients: tuple[np.ndarray, ...]


@dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """A tensor of a checkpoint, read only on demand.

    Attributes:
        shape: shape in the model's Hugging Face checkpoint (``[out, in]`` for a linear layer).
        dtype: name of the stored type ("float32", "bfloat16", "Q4_1", …), for messages and provenance.
        read: returns a new float32 array of `shape`, which the caller owns.
        block_format: the format of the result of `blocks`; None if no block format represents the tensor exactly.
        blocks: returns the tensor before dequantisation; None if `block_format` is None.
        is_linear: True if the shape is ``[out, in]`` even if the architecture's own checkpoints transpose the matrix.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    block_format: str | None = None
    blocks: Callable[[], QuantisedBlocks] | None = None
    is_linear: bool = False


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """The record of a file that an export has read, for the artifact's provenance."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to export.

    Attributes:
        name: a short lower-case name suitable for a folder ("smollm2-135m-instruct").
        config: keys of a Hugging Face ``config.json``, including ``model_type``. A GGUF file's metadata is translated
            to the same keys.
        tensors: all tensors by their names in the Hugging Face checkpoint ("model.layers.0.self_attn.q_proj.weight").
        tokenizer_json: contents of a ``tokenizer.json`` for the `tokenizers` library.
        chat_template: Jinja source of the chat template, or None.
        bos_token: text of the beginning-of-sequence token, or None.
        eos_token: text of the end-of-sequence token, or None.
        eos_token_ids: ids of the tokens that end a generation.
        sampling: defaults from ``generation_config.json`` or a GGUF file's metadata, by field of the manifest's
            `SamplingDefaults`; may be empty.
        licence: SPDX name, or None if the source names no licence.
        files: the files read, with their hashes.
        named_templates: Jinja sources of further chat templates by name ("tool_use", "rag").
        remarks: sentences for the user about repairs and omissions.
    """

    name: str
    config: Mapping[str, object]
    tensors: Mapping[str, SourceTensor]
    tokenizer_json: bytes
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    eos_token_ids: tuple[int, ...]
    sampling: Mapping[str, object]
    licence: str | None
    files: tuple[SourceFile, ...]
    named_templates: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
