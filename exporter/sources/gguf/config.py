"""Translate a GGUF file's metadata to the keys of a Hugging Face config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .architectures import ARCHITECTURES, MIXTRAL, GgufArchitecture, Shapes
from .metadata import MetadataReader
from .rope import read_rope_scaling

# Keys that this module translates, without the architecture's prefix.
_TRANSLATED = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scale_linear",
    }
)

# Keys that are accepted only with a value that has no effect.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (1.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0,),
    "pooling_type": (0,),
    "residual_scale": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}

# Keys that describe how the model and the file were made.
_HARMLESS = frozenset({"tensor_data_layout", "rope.scaling.finetuned"})


def read_architecture(path: Path, metadata: Mapping[str, Any]) -> GgufArchitecture:
    """Return the architecture of a file.

    Args:
        path: the file, for messages.
        metadata: all metadata of the file.

    Raises:
        PrecastError: the architecture is not supported.
    """
    name = str(metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise PrecastError(
            f"{path}: expected general.architecture to be one of {', '.join(ARCHITECTURES)}, found {name}; use the"
            " model's Hugging Face checkpoint."
        )
    return MIXTRAL if name == "llama" and metadata.get("llama.expert_count") else ARCHITECTURES[name]


def translate_config(
    path: Path, metadata: Mapping[str, Any], shapes: Shapes, factors: Mapping[str, np.ndarray]
) -> dict[str, object]:
    """Return the config.json of the model's Hugging Face checkpoint.

    Args:
        path: the file, for messages.
        metadata: all metadata of the file.
        shapes: shapes of all tensors except `factors`, by GGUF name, outermost axis first.
        factors: by GGUF name, the tensors ``[P]`` of factors that divide the RoPE frequencies.

    Raises:
        PrecastError: the architecture is not supported; a key is missing, is not understood or contradicts the tensors;
            or a RoPE scaling cannot be converted exactly.
    """
    architecture = read_architecture(path, metadata)
    reader = MetadataReader(path=path, prefix=metadata["general.architecture"], metadata=metadata)
    _refuse_unknown(reader, architecture)
    if (layers := reader.integer("block_count")) > len(shapes):
        raise reader.unexpected(
            "block_count", f"at most {len(shapes)} (the number of tensors in the file)", layers
        )
    heads = reader.integer("attention.head_count")
    head_dim, rotated = _head_dims(reader, heads, partial=architecture.partial_rope)
    theta = reader.positive("rope.freq_base", 10000.0)
    return {
        "architectures": [architecture.model],
        "model_type": architecture.model_type,
        "vocab_size": _vocab_size(reader, shapes),
        "hidden_size": reader.integer("embedding_length"),
        "intermediate_size": reader.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": reader.integer("context_length"),
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": read_rope_scaling(reader, theta, rotated, factors),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        **architecture.extra_keys(reader, shapes),
    }


def _refuse_unknown(reader: MetadataReader, architecture: GgufArchitecture) -> None:
    known = _TRANSLATED | _HARMLESS | architecture.known_keys
    for key, value in reader.metadata.items():
        short = key.removeprefix(f"{reader.prefix}.")
        if short == key or short in known or value in _NEUTRAL.get(short, ()):
            continue
        raise PrecastError(
            f"{reader.path}: has the metadata key {key} = {value!r:.80}, which is not understood and may change the "
            "maths; use the model's Hugging Face checkpoint."
        )


def _head_dims(reader: MetadataReader, heads: int, *, partial: bool) -> tuple[int, int]:
    """Return H and the number of dimensions that RoPE rotates, which is H if `partial` is false."""
    head_dim = reader.integer("attention.key_length", reader.integer("embedding_length") // heads)
    if (values := reader.integer("attention.value_length", head_dim)) != head_dim:
        raise reader.unexpected("attention.value_length", f"the head dimension {head_dim}", values)
    rotated = reader.integer("rope.dimension_count", head_dim)
    if rotated > head_dim or (rotated != head_dim and not partial):
        most = "at most " if partial else ""
        raise reader.unexpected("rope.dimension_count", f"{most}the head dimension {head_dim}", rotated)
    return head_dim, rotated


def _vocab_size(reader: MetadataReader, shapes: Shapes) -> int:
    """Return V, the number of rows of the embedding."""
    if "token_embd.weight" not in shapes:
        raise PrecastError(f"{reader.path}: lacks the tensor token_embd.weight; convert the model again.")
    rows = shapes["token_embd.weight"][0]
    if (tokens := len(reader.metadata.get("tokenizer.ggml.tokens", ()))) > rows:
        raise PrecastError(
            f"{reader.path}: has {tokens} tokens, but an embedding of {rows} rows: tokens were added to the tokenizer"
            " alone, so call resize_token_embeddings on the model in transformers, save it, and convert it again."
        )
    if (found := reader.integer("vocab_size", rows)) != rows:
        raise reader.unexpected("vocab_size", f"the embedding's {rows} rows", found)
    return rows
