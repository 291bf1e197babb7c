"""A GGUF file's metadata as the keys of a Hugging Face config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .architectures import ARCHITECTURES, MIXTRAL, GgufArchitecture, Shapes
from .metadata import MetadataReader
from .rope import read_rope_scaling

# Keys below the architecture's own prefix that are translated.
_UNDERSTOOD = frozenset(
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

# Keys that change nothing while they have one of these values.
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

# Keys about how the file was made.
_HARMLESS = frozenset({"tensor_data_layout", "rope.scaling.finetuned"})


def read_architecture(path: Path, metadata: Mapping[str, Any]) -> GgufArchitecture:
    """What the file holds.

    Args:
        path: the file, for messages.
        metadata: all of its metadata.

    Raises:
        PrecastError: for an architecture that is not supported.
    """
    name = str(metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        *others, last = ARCHITECTURES
        raise PrecastError(
            f"{path}: holds a model of architecture {name}, and only {', '.join(others)} and {last} are "
            "supported as GGUF; use the model's Hugging Face checkpoint."
        )
    return MIXTRAL if name == "llama" and metadata.get("llama.expert_count") else ARCHITECTURES[name]


def translate_config(
    path: Path, metadata: Mapping[str, Any], shapes: Shapes, factors: Mapping[str, np.ndarray]
) -> dict[str, object]:
    """The config.json that the model's Hugging Face checkpoint would have.

    Args:
        path: the file, for messages.
        metadata: all of its metadata.
        shapes: the shape of every other tensor than `factors`, by GGUF name, outermost axis first.
        factors: the tensors of RoPE factors that the architecture may have, by GGUF name, each ``[P]``: what each
            RoPE frequency is divided by.

    Raises:
        PrecastError: for an unsupported architecture, a key that is missing, not understood or at odds with
            the tensors, or a scaling of RoPE that cannot be carried over exactly.
    """
    architecture = read_architecture(path, metadata)
    reader = MetadataReader(path=path, prefix=metadata["general.architecture"], metadata=metadata)
    _refuse_unknown(reader, architecture)
    if (layers := reader.integer("block_count")) > len(shapes):
        raise reader.unexpected("block_count", f"at most the {len(shapes)} tensors that the file has", layers)
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
    known = _UNDERSTOOD | _HARMLESS | architecture.known_keys
    for key, value in reader.metadata.items():
        short = key.removeprefix(f"{reader.prefix}.")
        if short == key or short in known or value in _NEUTRAL.get(short, ()):
            continue
        raise PrecastError(
            f"{reader.path}: has the metadata key {key} = {value!r:.80}, which is not understood and may change the "
            "maths; use the model's Hugging Face checkpoint."
        )


def _head_dims(reader: MetadataReader, heads: int, *, partial: bool) -> tuple[int, int]:
    """H, of keys and values alike, and how much of it RoPE turns: all, unless `partial`."""
    head_dim = reader.integer("attention.key_length", reader.integer("embedding_length") // heads)
    if (values := reader.integer("attention.value_length", head_dim)) != head_dim:
        raise reader.unexpected("attention.value_length", f"the head dimension {head_dim}", values)
    rotated = reader.integer("rope.dimension_count", head_dim)
    if rotated > head_dim or (rotated != head_dim and not partial):
        raise reader.unexpected("rope.dimension_count", f"the head dimension {head_dim}", rotated)
    return head_dim, rotated


def _vocab_size(reader: MetadataReader, shapes: Shapes) -> int:
    """V, which is the rows of the embedding."""
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
