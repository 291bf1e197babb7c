"""Tiny models of every GGUF architecture, which can be written as a GGUF file and as a Hugging Face checkpoint.

`write_gguf` writes files as llama.cpp's converter does. It uses the names and keys of the `gguf` library, so that the
tests do not compare precast's reader with its own tables.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

D, N, K, F, V = 64, 4, 2, 96, 300
TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

Arrays = dict[str, np.ndarray]
Writer = Any  # gguf.GGUFWriter


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model to write in both formats.

    Attributes:
        architecture: name of the architecture in GGUF files.
        config: keys of config.json that differ between cases.
        layer: shapes of a layer's tensors, by Hugging Face name.
        metadata: function that writes the metadata keys of the architecture.
        convert: function that converts a tensor as llama.cpp's converter does.
        extra: additional tensors of the GGUF file, such as RoPE factors.
    """

    architecture: str
    config: Mapping[str, Any]
    layer: Mapping[str, tuple[int, ...]]
    layers: int = 2
    head_dim: int = 16
    tied: bool = False
    metadata: Callable[[Writer], None] = lambda writer: None
    convert: Callable[[str, np.ndarray], np.ndarray] = lambda name, array: array
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def full_config(self) -> dict[str, Any]:
        common = {
            "hidden_size": D,
            "num_attention_heads": N,
            "num_key_value_heads": K,
            "intermediate_size": F,
            "vocab_size": V,
            "num_hidden_layers": self.layers,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
        }
        return common | dict(self.config)

    def arrays(self) -> Arrays:
        """Return random weights by Hugging Face name. Norm weights are near 1, or near 0 if the converter adds 1."""
        shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
        shapes |= {} if self.tied else {"lm_head.weight": (V, D)}
        for i in range(self.layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in self.layer.items()}
        generator = np.random.default_rng(0)
        centre = 0.0 if self.architecture.startswith("gemma") else 1.0
        arrays = {}
        for name, shape in shapes.items():
            values = generator.standard_normal(shape, np.float32)
            norm = name.endswith("norm.weight")
            arrays[name] = values * np.float32(0.1) + np.float32(centre) if norm else values * np.float32(0.2)
        return arrays


# --- tensors of a layer --------------------------------------------------------------------------------------


def attention(head_dim: int = 16, *, bias: bool = False) -> dict[str, tuple[int, ...]]:
    rows = {"q": N * head_dim, "k": K * head_dim, "v": K * head_dim}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{p}_proj.weight": (r, D) for p, r in rows.items()}
    shapes |= {f"self_attn.{p}_proj.bias": (r,) for p, r in rows.items()} if bias else {}
    return shapes | {"self_attn.o_proj.weight": (D, N * head_dim)}


def norms(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (D,) for name in names}


def head_norms(q: int, k: int) -> dict[str, tuple[int, ...]]:
    return {"self_attn.q_norm.weight": (q,), "self_attn.k_norm.weight": (k,)}


def experts(prefix: str, gate: str, up: str, down: str, count: int = 3) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.gate.weight": (count, D)}
    for e in range(count):
        one = {gate: (F, D), up: (F, D), down: (D, F)}
        shapes |= {f"{prefix}.experts.{e}.{part}.weight": shape for part, shape in one.items()}
    return shapes


MLP = {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
PRE = norms("input_layernorm", "post_attention_layernorm")
POST = norms("post_attention_layernorm", "post_feedforward_layernorm")
SANDWICH = PRE | norms("pre_feedforward_layernorm", "post_feedforward_layernorm")


# --- the converter -------------------------------------------------------------------------------------------


def permuted(name: str, array: np.ndarray) -> np.ndarray:
    """Permute the rows of q and k for a RoPE that rotates neighbouring dimensions."""
    for part, heads in (("q_proj", N), ("k_proj", K)):
        if f".{part}." in name:
            halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
    return array


def plus_one(name: str, array: np.ndarray) -> np.ndarray:
    return array + np.float32(1) if name.endswith("norm.weight") else array


def stacked(arrays: Arrays) -> Arrays:
    """Stack the experts of each layer into one tensor, named as the gguf library expects it."""
    out: Arrays = {}
    groups: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():
        parts = name.split(".")
        if "experts" not in parts:
            out[name] = array
            continue
        layer, part = parts[2], parts[-2]
        old = "block_sparse_moe" in parts
        stack = (
            f"layers.{layer}.feed_forward.experts.{part}"
            if old
            else f"model.layers.{layer}.mlp.experts.{part}"
        )
        groups.setdefault(f"{stack}.weight", []).append(array)
    return out | {name: np.stack(matrices) for name, matrices in groups.items()}


def write_gguf(case: Case, arrays: Arrays, path: Path, kind: str = "F32") -> Path:
    """Write the case as llama.cpp's converter does, with matrices of type `kind`."""
    import gguf
    from gguf.quants import quantize

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[case.architecture], case.layers)
    writer = gguf.GGUFWriter(path, case.architecture)
    config = case.full_config()
    writer.add_block_count(case.layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_file_type(0)
    case.metadata(writer)
    _write_tokenizer(writer)
    converted = {name: case.convert(name, array) for name, array in arrays.items()}
    for name, array in stacked(converted).items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        one = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else kind]
        writer.add_tensor(mapped, quantize(array, one), raw_dtype=one)
    for name, array in case.extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: Writer) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    padding = [f"[PAD{i}]" for i in range(259, V)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *TOKENS, *padding])
    writer.add_token_scores([0.0] * V)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [5] * len(padding))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_checkpoint(case: Case, arrays: Arrays, folder: Path) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.full_config()))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *TOKENS])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return folder


# --- the cases ----------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(theta: float, size: int) -> np.ndarray:
    """Compute the frequency divisors one by one in float32, as the converter does."""
    out = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * float(np.float32(theta) ** np.float32(i / size))
        smooth = min(max((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        out.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(out, np.float32)


def llama_keys(writer: Writer) -> None:
    writer.add_vocab_size(V)
    writer.add_rope_dimension_count(16)


def key_lengths(head_dim: int) -> Callable[[Writer], None]:
    def write(writer: Writer) -> None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)

    return write


def yarn_keys(writer: Writer) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)


GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "head_dim": 24}


def gemma2_keys(writer: Writer) -> None:
    key_lengths(24)(writer)
    writer.add_attn_logit_softcapping(20.0)
    writer.add_final_logit_softcapping(10.0)
    writer.add_sliding_window(5)


def gemma3_keys(writer: Writer) -> None:
    """Write the metadata keys as early converters did, without the window pattern and the local RoPE base."""
    from gguf import RopeScalingType

    key_lengths(24)(writer)
    writer.add_sliding_window(5)
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


def newer_gemma3_keys(pattern: int | Sequence[bool]) -> Callable[[Writer], None]:
    def write(writer: Writer) -> None:
        gemma3_keys(writer)
        writer.add_rope_freq_base_swa(500.0)
        writer.add_sliding_window_pattern(pattern)

    return write


GEMMA3 = Case(
    architecture="gemma3",
    config={
        **GEMMA,
        "model_type": "gemma3_text",
        "rope_theta": 100_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 5,
        "sliding_window_pattern": 6,
    },
    layer=attention(24) | head_norms(24, 24) | MLP | SANDWICH,
    layers=7,
    tied=True,
    metadata=gemma3_keys,
    convert=plus_one,
)

PHI3 = Case(
    architecture="phi3",
    config={"model_type": "phi3", "sliding_window": 7, "original_max_position_embeddings": 256},
    layer={
        "self_attn.qkv_proj.weight": ((N + 2 * K) * 16, D),
        "self_attn.o_proj.weight": (D, N * 16),
        "mlp.gate_up_proj.weight": (2 * F, D),
        "mlp.down_proj.weight": (D, F),
        **PRE,
    },
)
SHORT, LONG = [1.05, 1.1, 1.3, 1.7, 2.0, 2.9], [1.0, 2.5, 4.0, 8.75, 16.0, 31.9]


def phi3_keys(window: int, rotated: int = 16, original: int = 256) -> Callable[[Writer], None]:
    def write(writer: Writer) -> None:
        writer.add_rope_dimension_count(rotated)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_sliding_window(window)
        if original != 256:
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(256 / original) / math.log(original)))

    return write


def moe_keys(writer: Writer) -> None:
    writer.add_expert_count(3)
    writer.add_expert_used_count(2)


def qwen3moe_keys(writer: Writer) -> None:
    moe_keys(writer)
    key_lengths(24)(writer)
    writer.add_expert_feed_forward_length(F)


def granite_keys(writer: Writer) -> None:
    llama_keys(writer)
    writer.add_attention_scale(0.11)
    writer.add_embedding_scale(3.0)
    writer.add_residual_scale(0.22)
    writer.add_logit_scale(5.0)


CASES = {
    "llama": Case(
        architecture="llama",
        config={"model_type": "llama", "attention_bias": False},
        layer=attention() | MLP | PRE,
        metadata=llama_keys,
        convert=permuted,
    ),
    "llama3": Case(
        architecture="llama",
        config={"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": LLAMA3},
        layer=attention() | MLP | PRE,
        tied=True,
        metadata=llama_keys,
        convert=permuted,
        extra={"rope_freqs.weight": llama3_factors(500_000.0, 16)},
    ),
    "qwen2": Case(
        architecture="qwen2",
        config={"model_type": "qwen2", "rope_theta": 1_000_000.0},
        layer=attention(bias=True) | MLP | PRE,
        tied=True,
    ),
    "qwen3": Case(
        architecture="qwen3",
        config={"model_type": "qwen3", "head_dim": 24, "attention_bias": False},
        layer=attention(24) | head_norms(24, 24) | MLP | PRE,
        metadata=key_lengths(24),
    ),
    "qwen3 with yarn": Case(
        architecture="qwen3",
        config={
            "model_type": "qwen3",
            "head_dim": 16,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        layer=attention() | head_norms(16, 16) | MLP | PRE,
        tied=True,
        metadata=yarn_keys,
    ),
    "gemma3": GEMMA3,
    "gemma3, its local base named": dataclasses.replace(
        GEMMA3,
        config={**GEMMA3.config, "rope_local_base_freq": 500.0, "sliding_window_pattern": 3},
        metadata=newer_gemma3_keys(3),
    ),
    "gemma3, layer by layer": dataclasses.replace(
        GEMMA3,
        layers=3,
        config={
            **{k: v for k, v in GEMMA3.config.items() if k != "sliding_window_pattern"},
            "rope_local_base_freq": 500.0,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        metadata=newer_gemma3_keys([False, True, False]),
    ),
    "phi3": dataclasses.replace(PHI3, metadata=phi3_keys(7)),
    "phi3 with longrope": dataclasses.replace(
        PHI3,
        config={
            "model_type": "phi3",
            "sliding_window": None,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        },
        metadata=phi3_keys(0, rotated=12, original=32),
        extra={
            "rope_factors_long.weight": np.array(LONG, np.float32),
            "rope_factors_short.weight": np.array(SHORT, np.float32),
        },
    ),
    "gemma2": Case(
        architecture="gemma2",
        config={
            **GEMMA,
            "model_type": "gemma2",
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
            "sliding_window": 5,
        },
        layer=attention(24) | MLP | SANDWICH,
        layers=3,
        tied=True,
        metadata=gemma2_keys,
        convert=plus_one,
    ),
    "granite": Case(
        architecture="granite",
        config={
            "model_type": "granite",
            "attention_multiplier": 0.11,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 5.0,
        },
        layer=attention() | MLP | PRE,
        tied=True,
        metadata=granite_keys,
        convert=permuted,
    ),
    "olmo2": Case(
        architecture="olmo2",
        config={"model_type": "olmo2"},
        layer=attention() | head_norms(N * 16, K * 16) | MLP | POST,
    ),
    "smollm3": Case(
        architecture="smollm3",
        config={"model_type": "smollm3"},
        layer=attention() | MLP | PRE,
        layers=5,
        tied=True,
        metadata=llama_keys,
        convert=permuted,
    ),
    "mixtral": Case(
        architecture="llama",
        config={
            "model_type": "mixtral",
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        layer=attention() | PRE | experts("block_sparse_moe", "w1", "w3", "w2"),
        metadata=moe_keys,
        convert=permuted,
    ),
    "qwen3moe": Case(
        architecture="qwen3moe",
        config={
            "model_type": "qwen3_moe",
            "head_dim": 24,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": F,
            "norm_topk_prob": True,
        },
        layer=attention(24) | head_norms(24, 24) | PRE | experts("mlp", "gate_proj", "up_proj", "down_proj"),
        metadata=qwen3moe_keys,
    ),
}
