"""A GGUF file: llama.cpp's container of metadata, tokenizer and (quantised) tensors.

`container` reads the file, `config` and `tokenizer` translate its metadata, and llama.cpp's own `gguf` library
dequantises. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError

from ..base import Source
from ..files import hash_file, slug, spdx
from .config import read_architecture, translate_config
from .container import read_container
from .generation import end_tokens, recommended_sampling
from .markers import marker_remarks
from .metadata import check_types
from .rope import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from .tensors import check_tensor_types, dequantise, source_tensors
from .tokenizer import build_tokenizer

# The end of a file name that states the type of the weights, such as "-Q4_K_M".
_QUANTISATION = re.compile(
    r"[-._](?:(?:ud-)?(?:i?q\d|tq\d)[a-z0-9_]*|f16|f32|bf16|fp16|fp32|mxfp4|gguf)$", re.IGNORECASE
)


_TEMPLATE = "tokenizer.chat_template"


def open_gguf(path: Path, *, name: str | None = None) -> Source:
    """Open a GGUF file of a supported architecture.

    Args:
        path: the file.
        name: name of the model; None for the file's name without a quantisation suffix.

    Raises:
        PrecastError: the file is damaged or one part of several, or its architecture, a metadata key, a tensor, a
            tensor type or its tokenizer is not supported.
    """
    container = read_container(path)
    metadata, stored = container.metadata, container.tensors
    check_types(path, metadata)
    _check_whole_model(path, metadata)
    architecture = read_architecture(path, metadata)
    check_tensor_types(path, stored)
    scaling = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS) if architecture.longrope else (ROPE_FACTORS,)
    factors = {key: dequantise(stored[key]) for key in scaling if key in stored}
    tensors = {key: tensor for key, tensor in stored.items() if key not in factors}
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    config = translate_config(path, metadata, shapes, factors)
    return Source(
        name=slug(name or _stem(path)),
        config=config,
        tensors=source_tensors(path, tensors, architecture, config),
        tokenizer_json=build_tokenizer(path, metadata),
        chat_template=metadata.get(_TEMPLATE) or None,
        named_templates=_named_templates(path, metadata),
        bos_token=_token(path, metadata, "bos_token_id"),
        eos_token=_token(path, metadata, "eos_token_id"),
        eos_token_ids=end_tokens(metadata),
        sampling=recommended_sampling(path, metadata),
        licence=spdx(metadata.get("general.license")),
        files=(hash_file(path),),
        remarks=marker_remarks(metadata),
    )


# --- other metadata -----------------------------------------------------------------------------------------


def _check_whole_model(path: Path, metadata: Mapping[str, Any]) -> None:
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise PrecastError(
            f"{path}: is one of {parts} parts of a model; join the parts with llama-gguf-split --merge."
        )
    if metadata.get("general.type", "model") != "model":
        raise PrecastError(
            f"{path}: expected general.type to be model, found {metadata['general.type']}; name the model's own GGUF"
            " file."
        )


def _stem(path: Path) -> str:
    """Return the file name without its ending and quantisation suffix: "Qwen2-0.5B" for "Qwen2-0.5B-Q4_K_M.gguf"."""
    return _QUANTISATION.sub("", path.stem) or path.stem


def _token(path: Path, metadata: Mapping[str, Any], key: str) -> str | None:
    """Return the text of a special token. `build_tokenizer` has already checked the list of tokens."""
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


def _named_templates(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name, without the default. The metadata key of each template ends in its name."""
    prefix = f"{_TEMPLATE}."
    keys = sorted(key for key in metadata if key.startswith(prefix) and key != f"{prefix}default")
    for key in keys:
        if not isinstance(metadata[key], str):
            raise PrecastError(
                f"{path}: expected {key} to be text, found {metadata[key]!r:.80}; convert the model again."
            )
    return {key.removeprefix(prefix): metadata[key] for key in keys}
