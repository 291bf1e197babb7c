"""A GGUF file's metadata as the keys of a Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from precast.loaders.artifact.errors import PrecastError

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What differs between the architectures.

    Attributes:
        model: transformers' class, for `architectures`.
        interleaved: whether rows of q and k are permuted for llama.cpp's interleaved RoPE.
        qkv_bias: whether biases on q, k and v go without saying; otherwise `attention_bias` says whether
            there are any.
    """

    model: str
    interleaved: bool
    qkv_bias: bool


# By `general.architecture`, which for both is also Hugging Face's `model_type`.
ARCHITECTURES = {
    "llama": Architecture(model="LlamaForCausalLM", interleaved=True, qkv_bias=False),
    "qwen2": Architecture(model="Qwen2ForCausalLM", interleaved=False, qkv_bias=True),
}

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
    "use_parallel_residual": (False,),
}

# Keys about how the file was made, or about kinds of RoPE scaling that are refused by their type.
_HARMLESS = frozenset(
    {"tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
)

# The constants that every Llama 3.x shares; only `factor` differs between them (8 for 3.1, 32 for 3.2).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def translate_config(
    path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: np.ndarray | None
) -> dict[str, object]:
    """The config.json that the model's Hugging Face checkpoint would have.

    Args:
        path: the file, for messages.
        metadata: all of its metadata.
        shapes: the shape of every tensor but `ROPE_FACTORS`, by GGUF name, outermost axis first.
        factors: the tensor `ROPE_FACTORS` if there is one, ``[H/2]``: what each RoPE frequency is divided by.

    Raises:
        PrecastError: for an unsupported architecture, a key that is missing, not understood or at odds with
            the tensors, or a scaling of RoPE that cannot be carried over exactly.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise PrecastError(
            f"{path}: holds a model of architecture {name}, and only {' and '.join(ARCHITECTURES)} are "
            "supported as GGUF; use the model's Hugging Face checkpoint."
        )
    _refuse_unknown(path, name, metadata)
    reader = _Reader(path=path, prefix=name, metadata=metadata)
    architecture = ARCHITECTURES[name]
    heads = reader.integer("attention.head_count")
    head_dim = _head_dim(reader, heads)
    theta = reader.number("rope.freq_base", 10000.0)
    config: dict[str, object] = {
        "architectures": [architecture.model],
        "model_type": name,
        "vocab_size": _vocab_size(reader, shapes),
        "hidden_size": reader.integer("embedding_length"),
        "intermediate_size": reader.integer("feed_forward_length"),
        "num_hidden_layers": reader.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": reader.integer("context_length"),
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(reader, theta, head_dim, factors),
        "hidden_act": "silu",  # llama.cpp has no other for these architectures
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if not architecture.qkv_bias:
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    return config


def _refuse_unknown(path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        short = key.removeprefix(f"{architecture}.")
        if short == key or short in _UNDERSTOOD or short in _HARMLESS or value in _NEUTRAL.get(short, ()):
            continue
        raise PrecastError(
            f"{path}: has the metadata key {key} = {value!r:.80}, which is not understood and may change the "
            "maths; use the model's Hugging Face checkpoint."
        )


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Typed access to the keys of one architecture."""

    path: Path
    prefix: str
    metadata: Mapping[str, Any]

    def get(self, key: str, default: object = None) -> object:
        """A value, or `default` where the file has none; one value per layer is taken if all are the same."""
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise PrecastError(
                f"{self.path}: lacks the metadata key {self.prefix}.{key}; convert the model again."
            )
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.unexpected(key, "one positive whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float as it was written before it became a float32: 1e-05, not 9.999999747378752e-06."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.unexpected(key, "one number", value)
        return float(str(np.float32(value)))

    def unexpected(self, key: str, expected: str, found: object) -> PrecastError:
        return PrecastError(
            f"{self.path}: expected {self.prefix}.{key} to be {expected}, found {found!r:.80}; use the model's "
            "Hugging Face checkpoint."
        )


def _head_dim(reader: _Reader, heads: int) -> int:
    """H, which key, value and rotated width have to agree on."""
    head_dim = reader.integer("attention.key_length", reader.integer("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := reader.integer(key, head_dim)) != head_dim:
            raise reader.unexpected(key, f"the head dimension {head_dim}", found)
    return head_dim


def _vocab_size(reader: _Reader, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """V, which is the rows of the embedding."""
    if "token_embd.weight" not in shapes:
        raise PrecastError(f"{reader.path}: lacks the tensor token_embd.weight; convert the model again.")
    rows = shapes["token_embd.weight"][0]
    if (tokens := len(reader.metadata.get("tokenizer.ggml.tokens", ()))) > rows:
        raise PrecastError(
            f"{reader.path}: has {tokens} tokens, but an embedding of {rows} rows; convert the model again."
        )
    if (found := reader.integer("vocab_size", rows)) != rows:
        raise reader.unexpected("vocab_size", f"the embedding's {rows} rows", found)
    return rows


# --- RoPE scaling -------------------------------------------------------------------------------------------


def _rope_scaling(
    reader: _Reader, theta: float, head_dim: int, factors: np.ndarray | None
) -> dict[str, object] | None:
    linear = _linear_factor(reader)
    baked = None if factors is None else _recover_llama3(reader, theta, head_dim, factors)
    if baked is not None and linear != 1.0:
        raise reader.unexpected("rope.scaling.factor", f"1 beside the tensor {ROPE_FACTORS}", linear)
    return baked if linear == 1.0 else {"rope_type": "linear", "factor": linear}


def _linear_factor(reader: _Reader) -> float:
    """The factor that positions are divided by; like llama.cpp, a factor without a type is a linear one."""
    kind = reader.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise reader.unexpected("rope.scaling.type", "none or linear", kind)
    factor = reader.number("rope.scaling.factor", reader.number("rope.scale_linear", 1.0))
    return 1.0 if kind == "none" or factor == 0.0 else factor


def _recover_llama3(
    reader: _Reader, theta: float, head_dim: int, factors: np.ndarray
) -> dict[str, object] | None:
    """The Llama 3 scaling that `factors` were computed from, or None if they are all one.

    llama.cpp's converter bakes the scaling into one divisor per frequency. Its parameters are found again by
    computing the divisors from the published constants and comparing; any other divisors are refused.
    """
    factor = float(factors.max())
    if factor == 1.0 and float(factors.min()) == 1.0:
        return None
    expected = llama3_divisors(theta, head_dim, factor)
    # The converter computes in float32, whence the tolerance; any other constant differs by far more.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0.0):
        raise PrecastError(
            f"{reader.path}: holds RoPE factors ({ROPE_FACTORS}) that are not those of Llama 3.x, which "
            "alone can be carried over exactly; use the model's Hugging Face checkpoint."
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def llama3_divisors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """What Llama 3.x divides each RoPE frequency by, ``[H/2]`` in float64.

    Wavelengths over ``original / low`` are stretched `factor` times, those under ``original / high`` not at
    all, and between the two lies a linear blend of the frequencies. Source: `_compute_llama3_parameters` of
    transformers.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / factor + blend)
