"""The architectures that a GGUF file may contain.

llama.cpp's converter renames and changes a checkpoint's tensors and keys. Each architecture's entry undoes that.
Source: https://github.com/ggml-org/llama.cpp/tree/master/conversion.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nextafter

from .metadata import MetadataReader

# The shape of every tensor, outermost axis first, by the tensor's GGUF name.
Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """An architecture as GGUF files name and store it, and its translation to Hugging Face's names and values.

    Attributes:
        model_type: Hugging Face's name of the architecture.
        model: name of transformers' class, the value of `architectures` in config.json.
        names: GGUF's name of each module ("attn_q"), and Hugging Face's name without "model.layers.N.". In the latter,
            "{}" stands for the number of an expert, because GGUF stacks the experts' matrices in one tensor.
        extra_keys: returns the keys of config.json that only some architectures have.
        known_keys: metadata keys that are read only for this architecture, without the architecture's prefix.
        interleaved: True if the rows of q and k are permuted for llama.cpp's interleaved RoPE.
        norm_offset: constant that the converter adds to the weights of norms.
        longrope: True if the file may have RoPE factors for short and long contexts.
        partial_rope: True if RoPE may rotate only a part of a head.
    """

    model_type: str
    model: str
    names: Mapping[str, str]
    extra_keys: Callable[[MetadataReader, Shapes], Config]
    known_keys: frozenset[str] = frozenset()
    interleaved: bool = False
    norm_offset: float = 0.0
    longrope: bool = False
    partial_rope: bool = False


_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA = _ENDS | _PRE_NORMS | _ATTENTION | _MLP
_SANDWICH_NORMS = _POST_NORMS | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}

# The activation as a key of config.json. GGUF files lack it, because llama.cpp has a fixed one for each architecture.
_SILU: Config = {"hidden_act": "silu"}
_GELU: Config = {"hidden_activation": "gelu_pytorch_tanh"}


def _biases(shapes: Shapes) -> Config:
    return {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_gate.bias" in shapes}


def _llama(_: MetadataReader, shapes: Shapes) -> Config:
    return _SILU | _biases(shapes)


def _qwen2(_: MetadataReader, __: Shapes) -> Config:
    return dict(_SILU)


def _qwen3(_: MetadataReader, shapes: Shapes) -> Config:
    return _SILU | {"attention_bias": "blk.0.attn_q.bias" in shapes}


# --- Gemma --------------------------------------------------------------------------------------------------

_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
# Keys of the RoPE base in layers with a window: the one of llama.cpp's converter, then the one of Ollama's.
_LOCAL_BASES = ("rope.freq_base_swa", "rope.local.freq_base")
# The 27B models scale attention scores by (D / N) ** -0.5 instead of H ** -0.5. The file does not say so; the number of
# layers identifies these models.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def _query_scalar(reader: MetadataReader) -> Config:
    """Return Gemma's ``query_pre_attn_scalar``, which depends on the number of layers, as in llama.cpp."""
    heads = reader.integer("attention.head_count")
    by_width = reader.integer("embedding_length") // heads
    by_head = reader.integer("attention.key_length", by_width)
    wide = reader.integer("block_count") == _SCALED_BY_WIDTH[reader.prefix]
    return {"query_pre_attn_scalar": by_width if wide else by_head}


def _layer_types(reader: MetadataReader, period: int) -> list[str]:
    """Return the type of each layer. By default, every `period`-th layer has full attention."""
    layers = reader.integer("block_count")
    stated = reader.metadata.get(f"{reader.prefix}.{_PATTERN}", period)
    if isinstance(stated, int) and not isinstance(stated, bool) and stated > 0:
        stated = [bool((layer + 1) % stated) for layer in range(layers)]
    if not isinstance(stated, list) or not all(isinstance(windowed, bool) for windowed in stated):
        raise reader.unexpected(_PATTERN, "a period or a list of true and false", stated)
    if len(stated) < layers:
        raise reader.unexpected(_PATTERN, f"a list of {layers} values (one per layer)", stated)
    return ["sliding_attention" if windowed else "full_attention" for windowed in stated[:layers]]


def _gemma3(reader: MetadataReader, _: Shapes) -> Config:
    local = next(
        (key for key in _LOCAL_BASES if f"{reader.prefix}.{key}" in reader.metadata), _LOCAL_BASES[0]
    )
    reader.number("rope.freq_base")  # refuses files without the key, whose default depends on the layer type
    return {
        **_GELU,
        **_query_scalar(reader),
        "attention_bias": False,
        "sliding_window": reader.integer(_WINDOW),
        "layer_types": _layer_types(reader, 6),
        "rope_local_base_freq": reader.number(local, 10000.0),
    }


_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _gemma2(reader: MetadataReader, _: Shapes) -> Config:
    """Return Gemma 2's keys; as in llama.cpp, the caps default to the published values."""
    return {
        **_GELU,
        **_query_scalar(reader),
        **{key: reader.number(key, default) for key, default in _CAPS.items()},
        "attention_bias": False,
        "sliding_window": reader.integer(_WINDOW),
        "layer_types": _layer_types(reader, 2),
    }


# --- Phi 3 --------------------------------------------------------------------------------------------------


def _phi3(reader: MetadataReader, _: Shapes) -> Config:
    head_dim = reader.integer("embedding_length") // reader.integer("attention.head_count")
    context = reader.integer("context_length")
    config: Config = {
        **_SILU,
        # 0 means no window. The key is required, because converters that omit it also drop the window.
        "sliding_window": reader.integer(_WINDOW, least=0) or None,
        "original_max_position_embeddings": reader.integer("rope.scaling.original_context_length", context),
    }
    if (rotated := reader.integer("rope.dimension_count", head_dim)) != head_dim:
        # `read_rope` rounds H times this factor down. If the rounded factor is too small for that, take the next float.
        part = rotated / head_dim
        config["partial_rotary_factor"] = part if int(part * head_dim) == rotated else nextafter(part, 1.0)
    return config


# --- others -------------------------------------------------------------------------------------------------

_GRANITE_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def _granite(reader: MetadataReader, shapes: Shapes) -> Config:
    scales = {key: reader.number(gguf_key) for gguf_key, key in _GRANITE_SCALES.items()}
    return _SILU | _biases(shapes) | scales


def _smollm3(reader: MetadataReader, shapes: Shapes) -> Config:
    """Return SmolLM3's keys. As in llama.cpp, every fourth layer is assumed to have no RoPE."""
    layers = reader.integer("block_count")
    has_rope = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    return _SILU | _biases(shapes) | {"no_rope_layers": has_rope, "use_sliding_window": False}


_EXPERT_KEYS = frozenset({"expert_count", "expert_used_count"})


def _mixtral(reader: MetadataReader, _: Shapes) -> Config:
    return {
        **_SILU,
        "num_local_experts": reader.integer("expert_count"),
        "num_experts_per_tok": reader.integer("expert_used_count"),
        "sliding_window": None,
    }


def _qwen3moe(reader: MetadataReader, shapes: Shapes) -> Config:
    """Return the keys of Qwen3 and of its experts; `norm_topk_prob` is true, because llama.cpp always renormalises."""
    return {
        **_qwen3(reader, shapes),
        "num_experts": reader.integer("expert_count"),
        "num_experts_per_tok": reader.integer("expert_used_count"),
        "moe_intermediate_size": reader.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


_PHI3_NAMES = (
    _ENDS
    | _PRE_NORMS
    | {
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_MIXTRAL_NAMES = (
    _ENDS
    | _PRE_NORMS
    | _ATTENTION
    | {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    }
)
_QWEN3MOE_NAMES = (
    _ENDS
    | _PRE_NORMS
    | _ATTENTION
    | _QK_NORMS
    | {
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{}.gate_proj",
        "ffn_up_exps": "mlp.experts.{}.up_proj",
        "ffn_down_exps": "mlp.experts.{}.down_proj",
    }
)

# By `general.architecture`.
ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture(
        model_type="llama", model="LlamaForCausalLM", names=_LLAMA, extra_keys=_llama, interleaved=True
    ),
    "qwen2": GgufArchitecture(model_type="qwen2", model="Qwen2ForCausalLM", names=_LLAMA, extra_keys=_qwen2),
    "qwen3": GgufArchitecture(
        model_type="qwen3", model="Qwen3ForCausalLM", names=_LLAMA | _QK_NORMS, extra_keys=_qwen3
    ),
    "gemma2": GgufArchitecture(
        model_type="gemma2",
        model="Gemma2ForCausalLM",
        names=_ENDS | _ATTENTION | _MLP | _SANDWICH_NORMS,
        extra_keys=_gemma2,
        known_keys=frozenset({_WINDOW, *_CAPS}),
        norm_offset=1.0,
    ),
    "gemma3": GgufArchitecture(
        model_type="gemma3_text",
        model="Gemma3ForCausalLM",
        names=_ENDS | _ATTENTION | _QK_NORMS | _MLP | _SANDWICH_NORMS,
        extra_keys=_gemma3,
        known_keys=frozenset({_WINDOW, _PATTERN, *_LOCAL_BASES}),
        norm_offset=1.0,
    ),
    "phi3": GgufArchitecture(
        model_type="phi3",
        model="Phi3ForCausalLM",
        names=_PHI3_NAMES,
        extra_keys=_phi3,
        known_keys=frozenset({_WINDOW, "rope.scaling.attn_factor"}),
        longrope=True,
        partial_rope=True,
    ),
    "granite": GgufArchitecture(
        model_type="granite",
        model="GraniteForCausalLM",
        names=_LLAMA,
        extra_keys=_granite,
        known_keys=frozenset(_GRANITE_SCALES),
        interleaved=True,
    ),
    "olmo2": GgufArchitecture(
        model_type="olmo2",
        model="Olmo2ForCausalLM",
        names=_ENDS | _ATTENTION | _QK_NORMS | _MLP | _POST_NORMS,
        extra_keys=_qwen3,
    ),
    "smollm3": GgufArchitecture(
        model_type="smollm3", model="SmolLM3ForCausalLM", names=_LLAMA, extra_keys=_smollm3, interleaved=True
    ),
    "qwen3moe": GgufArchitecture(
        model_type="qwen3_moe",
        model="Qwen3MoeForCausalLM",
        names=_QWEN3MOE_NAMES,
        extra_keys=_qwen3moe,
        known_keys=_EXPERT_KEYS | {"expert_feed_forward_length"},
    ),
}

# GGUF files call Mixtral "llama" too; `read_architecture` recognises it by its experts.
MIXTRAL = GgufArchitecture(
    model_type="mixtral",
    model="MixtralForCausalLM",
    names=_MIXTRAL_NAMES,
    extra_keys=_mixtral,
    known_keys=_EXPERT_KEYS,
    interleaved=True,
)
