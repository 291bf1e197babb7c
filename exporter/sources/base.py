"""What an export reads, whatever it came from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class QuantisedBlocks:
    """A matrix ``[out, in]`` as a checkpoint stores it in groups of 32 inputs.

    A weight is scale · value, or scale · value + minimum where there is one, each to be computed in float32.

    Attributes:
        values: ``[out, in]``; int8 without minimum, uint8 with one.
        scale: float16 ``[out, in/32]``; may be negative.
        minimum: float16 ``[out, in/32]``, or None.
    """

    values: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """One tensor of a checkpoint, read only when asked for.

    Attributes:
        shape: its shape, as the Hugging Face checkpoint of the same model would have it (``[out, in]`` for a
            linear layer).
        dtype: the name of the type it is stored in ("float32", "bfloat16", "Q4_1", …); for messages and
            provenance.
        read: returns it as a float32 array of `shape`, freshly read; the caller owns the array.
        blocks: returns what `read` does before it is multiplied out, for a matrix that is stored in blocks which
            `QuantisedBlocks` can say to the bit; else None.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    blocks: Callable[[], QuantisedBlocks] | None = None


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that an export was made from, for the artifact's provenance."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to export.

    Attributes:
        name: a short lower-case name fit for a folder ("smollm2-135m-instruct").
        config: the keys of a Hugging Face ``config.json``, ``model_type`` among them. A GGUF file's metadata
            is translated to the same keys.
        tensors: every tensor by its Hugging Face checkpoint name ("model.layers.0.self_attn.q_proj.weight").
        tokenizer_json: the bytes of a ``tokenizer.json`` that the `tokenizers` library reads.
        chat_template: the Jinja source of the chat template, or None.
        bos_token: text of the beginning-of-sequence token, or None.
        eos_token: text of the end-of-sequence token, or None.
        eos_token_ids: ids at which generation stops.
        sampling: defaults out of ``generation_config.json`` or a GGUF file's metadata, by field of the manifest's
            `SamplingDefaults`; empty when there are none.
        licence: SPDX name, or None where the source does not say.
        files: the files that were read, with their hashes.
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
