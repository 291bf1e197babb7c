"""Every architecture's config: defaults, the effect of keys, and refusals by name."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.exporter.models.registry import ARCHITECTURES, ModelSpec, read_model
from precast.loaders.artifact.errors import PrecastError

# The required keys; all others have defaults.
_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "vocab_size": 320,
}
_GPT2_SIZES = {"n_embd": 48, "n_layer": 7, "n_head": 8, "vocab_size": 320}


def _sparse(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **(_GPT2_SIZES if model_type == "gpt2" else _SIZES), **changes}


def _read(model_type: str, **changes: Any) -> ModelSpec:
    return read_model(_sparse(model_type, **changes), "config.json")


every = pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
rotated = pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - {"gpt2"}))

# --- defaults -----------------------------------------------------------------------------------------------

_VARIATIONS: Mapping[str, list[dict[str, Any]]] = {
    "gemma2": [
        {"final_logit_softcapping": None, "attn_logit_softcapping": None},
        {"sliding_window": 9},
        {"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 4},
    ],
    "gemma3_text": [
        {"sliding_window_pattern": 3},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
        {"final_logit_softcapping": 20.0},
    ],
    "gpt2": [{"n_inner": 64}, {"scale_attn_weights": False}],
    "granite": [{"residual_multiplier": 0.5}, {"logits_scaling": 4, "attention_multiplier": 0.1}],
    "llama": [{"head_dim": 16}, {"rope_theta": 5e5}],
    "mistral": [{"sliding_window": None}, {"head_dim": 16}],
    "mixtral": [{"sliding_window": 9}, {"num_local_experts": 4}],
    "olmo2": [{"attention_bias": True}],
    "phi3": [
        {"sliding_window": 9},
        {"partial_rotary_factor": 0.5},
        {
            "num_attention_heads": 8,
            "max_position_embeddings": 9000,
            "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 4, "long_factor": [3.0] * 4},
        },
        {
            "num_attention_heads": 8,
            "original_max_position_embeddings": 512,
            "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 4, "long_factor": [3.0] * 4},
        },
    ],
    "qwen2": [
        {"use_sliding_window": True, "max_window_layers": 3},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 9},
        {"use_sliding_window": True, "sliding_window": None},
        {"num_attention_heads": 16, "num_key_value_heads": None},
    ],
    "qwen3": [{"use_sliding_window": True, "max_window_layers": 3}, {"head_dim": 16}],
    "qwen3_moe": [
        {"use_sliding_window": True},
        {"sliding_window": 9},
        {"head_dim": 16, "norm_topk_prob": True, "num_experts": 64},
    ],
    "smollm3": [
        {"no_rope_layer_interval": 2},
        {"no_rope_layers": [0, 0, 1, 1, 1, 1, 0]},
        {"use_sliding_window": True, "sliding_window": 9},
        {"sliding_window": 9},
    ],
}


def _cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for model_type in sorted(ARCHITECTURES):
        # With few query heads, transformers' default number of key/value heads may be larger than their number.
        many = {} if model_type == "gpt2" else {"num_attention_heads": 32, "hidden_size": 64}
        for changes in ({}, *_VARIATIONS[model_type]):
            yield model_type, {**many, **changes}


@pytest.mark.parametrize(("model_type", "changes"), list(_cases()))
def test_defaults_of_a_sparse_config_are_those_of_transformers(
    model_type: str, changes: dict[str, Any]
) -> None:
    """transformers reads a sparse config and writes it with all defaults; both configs must mean the same."""
    transformers = pytest.importorskip("transformers")
    sparse = _sparse(model_type, **changes)
    whole = transformers.AutoConfig.for_model(**json.loads(json.dumps(sparse))).to_diff_dict()
    read = read_model(json.loads(json.dumps(whole)), "whole")
    found = read_model(sparse, "sparse")
    assert found.config == read.config
    for ours, theirs in zip(found.tables(24), read.tables(24), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(whole) > len(sparse) + 5


# --- refusals by every architecture --------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_layernorm", True),
        ("sandwich_norm", True),
        ("clip_qkv", 8.0),
        ("alibi", True),
        ("per_layer_config", {"0": {"hidden_size": 24}}),
        ("quantization_config", {"quant_method": "fp8"}),
        ("n_shared_experts", 1),
        ("attn_output_gate", True),
    ],
)
def test_an_unknown_key_is_named(model_type: str, key: str, value: Any) -> None:
    with pytest.raises(
        PrecastError,
        match=f"'{key}' (may change the model's maths|is .*, which .*, but precast does not support that)",
    ):
        _read(model_type, **{key: value})


@every
def test_an_unknown_activation_is_named(model_type: str) -> None:
    key = {"gpt2": "activation_function", "gemma2": "hidden_activation", "gemma3_text": "hidden_activation"}
    key = key.get(model_type, "hidden_act")
    for activation in ("gelu", "quick_gelu", "relu2"):
        with pytest.raises(PrecastError, match=f"'{key}' is '{activation}', expected one of"):
            _read(model_type, **{key: activation})


@rotated
@pytest.mark.parametrize("kind", ["ntk", "mrope", "proportional"])
def test_an_unknown_rope_is_named(model_type: str, kind: str) -> None:
    with pytest.raises(PrecastError, match=f"expected the RoPE type to be one of .*, found '{kind}'"):
        _read(model_type, rope_scaling={"rope_type": kind, "factor": 2.0})


@rotated
def test_heads_are_rotated_partially_only_if_transformers_does_so(model_type: str) -> None:
    changes = {"head_dim": 8, "partial_rotary_factor": 0.5}
    if model_type == "phi3":
        assert _read(model_type, **changes).ropes[0].pairs == 2
    else:
        with pytest.raises(PrecastError, match="partial_rotary_factor"):
            _read(model_type, **changes)


# --- keys of single architectures ----------------------------------------------------------------------------

_BIASES = {"qkv_bias": True, "out_bias": True}
_CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gemma2", {}, {"attention_cap": 50.0, "logit_cap": 30.0, "embedding_scale": 48**0.5, "head_dim": 256}),
    ("gemma2", {"query_pre_attn_scalar": 100}, {"attention_scale": 0.1}),
    ("gemma2", {"attn_logit_softcapping": None}, {"attention_cap": 0.0, "logit_cap": 30.0}),
    ("gemma2", {"final_logit_softcapping": None}, {"attention_cap": 50.0, "logit_cap": 0.0}),
    ("gemma2", {"attention_bias": True}, _BIASES),
    ("gemma2", {"hidden_activation": "silu"}, {"activation": "silu"}),
    ("gemma2", {"sliding_window": 9}, {"windows": (9, 0, 9, 0, 9, 0, 9)}),
    ("gemma3_text", {}, {"qk_norm": "head", "attention_cap": 0.0, "logit_cap": 0.0, "tied_embeddings": True}),
    ("gemma3_text", {"final_logit_softcapping": 7.0}, {"logit_cap": 7.0}),
    ("gemma3_text", {"sliding_window_pattern": 2, "sliding_window": 9}, {"ropes": (1, 0, 1, 0, 1, 0, 1)}),
    ("gpt2", {}, {"learned_positions": True, "ff_width": 192, "mlp_bias": True, **_BIASES}),
    ("gpt2", {"scale_attn_weights": False}, {"attention_scale": 1.0}),
    ("gpt2", {"n_inner": 9, "n_positions": 99}, {"ff_width": 9, "max_positions": 99}),
    (
        "granite",
        {},
        {"attention_scale": 1.0, "embedding_scale": 1.0, "logit_scale": 1.0, "residual_scale": 1.0},
    ),
    ("granite", {"attention_multiplier": 0.25}, {"attention_scale": 0.25}),
    ("granite", {"embedding_multiplier": 12}, {"embedding_scale": 12}),
    ("granite", {"logits_scaling": 8.0}, {"logit_scale": 0.125}),
    ("granite", {"residual_multiplier": 0.22}, {"residual_scale": 0.22}),
    ("granite", {"mlp_bias": True}, {"mlp_bias": True, "qkv_bias": False}),
    ("llama", {"attention_bias": True}, {**_BIASES, "mlp_bias": False}),
    ("mistral", {}, {"windows": (4096,) * 7, "kv_heads": 8, "max_positions": 131_072}),
    ("mistral", {"sliding_window": None}, {"windows": ()}),
    ("mixtral", {"sliding_window": 9}, {"windows": (9,) * 7}),
    ("olmo2", {}, {"qk_norm": "all", "norm_eps": 1e-5, "qkv_bias": False}),
    ("olmo2", {"attention_bias": True}, _BIASES),
    ("phi3", {"sliding_window": 9}, {"windows": (9,) * 7, "norm_eps": 1e-5}),
    ("qwen2", {"num_key_value_heads": 2}, {"qkv_bias": True, "out_bias": False}),
    ("qwen3", {"num_key_value_heads": 2}, {"qk_norm": "head", "head_dim": 128, "qkv_bias": False}),
    ("qwen3", {"attention_bias": True, "num_key_value_heads": 2}, _BIASES),
    ("qwen3_moe", {"intermediate_size": 9}, {"ff_width": 768, "kv_heads": 4, "qk_norm": "head"}),
    ("qwen3_moe", {"moe_intermediate_size": 9}, {"ff_width": 9}),
    ("qwen3_moe", {"use_sliding_window": True}, {"windows": (4096,) * 7}),
    ("smollm3", {}, {"tied_embeddings": True, "ropes": (0, 0, 0, 1, 0, 0, 0), "windows": ()}),
    ("smollm3", {"no_rope_layers": [1] * 9}, {"ropes": ()}),
    (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 9, "no_rope_layer_interval": 3},
        {"windows": (0, 0, 9, 0, 0, 9, 0), "ropes": (0, 0, 1, 0, 0, 1, 0)},
    ),
]


@pytest.mark.parametrize(("model_type", "changes", "fields"), _CHANGES)
def test_effects_of_keys(model_type: str, changes: dict[str, Any], fields: dict[str, Any]) -> None:
    found = vars(_read(model_type, **changes).config)
    assert {name: found[name] for name in fields} == fields


def test_experts() -> None:
    moe = _read("qwen3_moe").config.mixture
    assert (moe.experts, moe.experts_per_token, moe.renormalised) == (128, 8, False)
    moe = _read("qwen3_moe", num_experts=9, num_experts_per_tok=2, norm_topk_prob=True).config.mixture
    assert (moe.experts, moe.experts_per_token, moe.renormalised) == (9, 2, True)
    assert _read("qwen3_moe", num_local_experts=9).config.mixture.experts == 9
    mixtral = _read("mixtral").config.mixture
    assert (mixtral.experts, mixtral.experts_per_token, mixtral.renormalised) == (8, 2, True)


_REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    (
        "gemma2",
        {"use_bidirectional_attention": True},
        "'use_bidirectional_attention' is True, expected False.",
    ),
    ("gemma2", {"hidden_act": "silu"}, "'hidden_act' is 'silu', expected 'gelu_pytorch_tanh' or 'gelu'."),
    ("gemma2", {"sliding_window": None}, "'sliding_window' is unset or turned off"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' is 0, expected a number above 0."),
    (
        "gemma2",
        {"attn_logit_softcapping": 0.0},
        "'attn_logit_softcapping' is 0.0, expected a number above 0.",
    ),
    (
        "gemma2",
        {"final_logit_softcapping": float("inf")},
        "'final_logit_softcapping' is inf, expected a number",
    ),
    # transformers reads this key of Gemma 3 but ignores it.
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' may change"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
    (
        "gemma3_text",
        {"sliding_window_pattern": 0},
        "'sliding_window_pattern' is 0, expected a whole number above 0.",
    ),
    ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True, expected False."),
    (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "'scale_attn_by_inverse_layer_idx' is True, expected False.",
    ),
    ("gpt2", {"n_head": 9}, "'n_head' is 9, expected a divisor of n_embd, which is 48."),
    ("gpt2", {"hidden_size": 48}, "'hidden_size' may change"),
    ("gpt2", {"rope_theta": 1e4}, "'rope_theta' may change"),
    ("granite", {"logits_scaling": 0.0}, "'logits_scaling' is 0.0, expected a number above 0."),
    ("granite", {"residual_multiplier": "0.2"}, "'residual_multiplier' is '0.2', expected a number."),
    ("llama", {"sliding_window": 9}, "'sliding_window' may change"),
    ("llama", {"embedding_multiplier": 12.0}, "'embedding_multiplier' may change"),
    ("mistral", {"sliding_window": 0}, "'sliding_window' is 0, expected a whole number above 0."),
    (
        "mistral",
        {"layer_types": ["full_attention"] * 7},
        "expected 'layer_types' to be sliding_attention for all 7 layers, as in transformers, found ['full_attention'",
    ),
    ("mistral", {"attention_bias": True}, "'attention_bias' is True, which adds biases"),
    (
        "mixtral",
        {"num_experts_per_tok": 9},
        "'num_experts_per_tok' is 9, expected at most 8 (the number of experts).",
    ),
    (
        "mixtral",
        {"num_experts": 4, "num_local_experts": 8},
        "expected num_experts and num_local_experts to be equal, found 4 and 8; remove the wrong key.",
    ),
    ("olmo2", {"clip_qkv": 8.0}, "'clip_qkv' may change"),
    ("phi3", {"attention_bias": True}, "'attention_bias' is True, expected False."),
    (
        "phi3",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "expected the RoPE type to be one of default, longrope, su",
    ),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "'mlp_only_layers' is [0], expected []."),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "'decoder_sparse_step' is 2, expected 1."),
    ("qwen3_moe", {"shared_expert_intermediate_size": 9}, "'shared_expert_intermediate_size' may change"),
    (
        "smollm3",
        {"no_rope_layers": [1, 0]},
        "'no_rope_layers' is [1, 0], expected 0 or 1 for each of 7 layers.",
    ),
    (
        "smollm3",
        {"no_rope_layers": [1, 2, 0, 1, 1, 1, 1]},
        "'no_rope_layers' is [1, 2, 0, 1, 1, 1, 1], expected",
    ),
    (
        "smollm3",
        {"layer_types": ["sliding_attention"] * 7, "sliding_window": 9},
        "'sliding_window' is unset or turned off",
    ),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), _REFUSALS)
def test_what_is_refused(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrecastError) as caught:
        _read(model_type, **{"num_key_value_heads": 2, **changes} if model_type != "gpt2" else changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


# --- docs ---------------------------------------------------------------------------------------------------


def test_the_worked_example_is_the_file() -> None:
    root = Path(__file__).parents[2]
    guide = (root / "docs" / "adding-an-architecture.md").read_text(encoding="utf-8")
    example = (root / "exporter" / "models" / "architectures" / "olmo2.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in guide
    assert f"`exporter/models/architectures/olmo2.py`, {len(example.splitlines())} lines:" in guide
    row = '    "olmo2": Architecture(read_config=olmo2.read_config, module=_POST_NORM),\n'
    assert f"```python\n{row}```" in guide
    assert row in (root / "exporter" / "models" / "registry.py").read_text(encoding="utf-8")
