"""A config has the meaning that transformers gives it, or is refused by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from precast.exporter.models.registry import ModelSpec, read_model
from precast.loaders.artifact.errors import PrecastError

BASE: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 320,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ACTIVATIONS = "one of gelu_fast, gelu_new, gelu_python_tanh, gelu_pytorch_tanh, silu, swish"
ABSENT = object()


def _read(model_type: str = "llama", **changes: Any) -> ModelSpec:
    config = {"model_type": model_type, **BASE, **changes}
    return read_model({k: v for k, v in config.items() if v is not ABSENT}, "m/config.json")


def _refusal(model_type: str = "llama", **changes: Any) -> str:
    with pytest.raises(PrecastError) as caught:
        _read(model_type, **changes)
    return str(caught.value)


both = pytest.mark.parametrize("model_type", ["llama", "qwen2"])


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["gemma", None, 3, ["llama"], ABSENT])
def test_an_architecture_that_is_not_supported(value: Any) -> None:
    found = "None" if value in (None, ABSENT) else repr(value)
    with pytest.raises(PrecastError) as caught:
        read_model({k: v for k, v in {**BASE, "model_type": value}.items() if v is not ABSENT}, "c.json")
    assert str(caught.value) == (
        "c.json: expected model_type to be one of gemma2, gemma3_text, gpt2, granite, llama, mistral, mixtral, olmo2,"
        f" phi3, qwen2, qwen3, qwen3_moe, smollm3, found {found}."
    )


def test_a_model_that_reads_images_is_refused_with_a_remedy() -> None:
    with pytest.raises(PrecastError, match="save its text model alone with transformers' Gemma3ForCausalLM"):
        read_model({"model_type": "gemma3", "text_config": dict(BASE)}, "c.json")


@both
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_norm", True),
        ("quantization_config", {"quant_method": "gptq"}),
        ("logits_scaling", 8.0),
        ("attention_multiplier", 0.1),
        ("final_logit_softcapping", 30.0),
        ("sliding_window_pattern", 4),
        ("num_experts", 8),
        ("original_max_position_embeddings", 64),
    ],
)
def test_an_unknown_key_is_named(model_type: str, key: str, value: Any) -> None:
    assert _refusal(model_type, **{key: value}) == (
        f"m/config.json: '{key}' may change the model's maths and is not understood; remove it if transformers' own"
        " class for this model_type has no such key, or export another model."
    )


def test_unknown_keys_are_all_named() -> None:
    assert "'qk_norm', 'sandwich_norm' may change the model's maths and are not understood" in _refusal(
        sandwich_norm=True, qk_norm=True
    )


# Qwen2 fixes these settings, so its configs have no keys for them.
@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "pretraining_tp", "rope_interleaved"])
def test_keys_of_llama_are_unknown_to_qwen2(key: str) -> None:
    assert f"'{key}' is True, which " in _refusal("qwen2", **{key: True})


@both
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "gelu", f"'hidden_act' is 'gelu', expected {ACTIVATIONS}."),
        ("hidden_act", "relu", f"'hidden_act' is 'relu', expected {ACTIVATIONS}."),
        ("hidden_act", ["silu"], f"'hidden_act' is ['silu'], expected {ACTIVATIONS}."),
        ("tie_word_embeddings", "true", "'tie_word_embeddings' is 'true', expected true or false."),
        ("tie_word_embeddings", 1, "'tie_word_embeddings' is 1, expected true or false."),
        ("rms_norm_eps", "1e-6", "'rms_norm_eps' is '1e-6', expected a number."),
        ("rms_norm_eps", True, "'rms_norm_eps' is True, expected a number."),
        ("hidden_size", "48", "'hidden_size' is '48', expected a whole number above 0."),
        ("hidden_size", 48.0, "'hidden_size' is 48.0, expected a whole number above 0."),
        ("vocab_size", True, "'vocab_size' is True, expected a whole number above 0."),
        ("vocab_size", -1, "'vocab_size' is -1, expected a whole number above 0."),
        ("num_hidden_layers", 0, "'num_hidden_layers' is 0, expected a whole number above 0."),
        ("num_attention_heads", [6], "'num_attention_heads' is [6], expected a whole number above 0."),
        ("num_key_value_heads", 0, "'num_key_value_heads' is 0, expected a whole number above 0."),
        ("intermediate_size", 8.5, "'intermediate_size' is 8.5, expected a whole number above 0."),
        ("head_dim", "8", "'head_dim' is '8', expected a whole number above 0."),
        (
            "max_position_embeddings",
            False,
            "'max_position_embeddings' is False, expected a whole number above 0.",
        ),
        (
            "num_key_value_heads",
            4,
            "expected num_attention_heads to be a multiple of num_key_value_heads, found 6 and 4.",
        ),
        ("head_dim", 7, "expected an even head_dim for rotary positions, found 7."),
        ("rope_theta", "1e4", "'rope_theta' is '1e4', expected a number."),
        ("rope_theta", 0, "'rope_theta' is 0, expected a number above 0."),
        ("rope_theta", -5.0, "'rope_theta' is -5.0, expected a number above 0."),
        ("rope_theta", float("nan"), "'rope_theta' is nan, expected a number above 0."),
        ("rope_theta", float("inf"), "'rope_theta' is inf, expected a number above 0."),
        (
            "partial_rotary_factor",
            0.5,
            "expected partial_rotary_factor to be 1 for this architecture, found 0.5; correct or remove it.",
        ),
        ("rope_scaling", "linear", "'rope_scaling' is 'linear', expected a JSON object."),
        ("rope_parameters", [1], "'rope_parameters' is [1], expected a JSON object."),
    ],
)
def test_a_value_that_is_not_understood(model_type: str, key: str, value: Any, message: str) -> None:
    assert _refusal(model_type, **{key: value}) == f"m/config.json: {message}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention_bias", "yes", "'attention_bias' is 'yes', expected true or false."),
        ("mlp_bias", 1, "'mlp_bias' is 1, expected true or false."),
        ("pretraining_tp", 2, "'pretraining_tp' is 2, expected 1."),
        ("rope_interleaved", True, "'rope_interleaved' is True, expected False."),
    ],
)
def test_a_value_that_llama_does_not_take(key: str, value: Any, message: str) -> None:
    assert _refusal(**{key: value}) == f"m/config.json: {message}"


@pytest.mark.parametrize(
    "value", [["full_attention"], "full_attention", ["full_attention", "linear_attention"]]
)
def test_layer_types_that_are_not_understood(value: Any) -> None:
    assert _refusal("qwen2", layer_types=value) == (
        f"m/config.json: 'layer_types' is {value!r}, expected full_attention or sliding_attention for each of 2 layers."
    )


@pytest.mark.parametrize("switch", [{}, {"use_sliding_window": True, "sliding_window": None}])
def test_a_windowed_layer_without_a_window(switch: Mapping[str, Any]) -> None:
    assert (
        "'layer_types' contains 'sliding_attention', but 'sliding_window' is unset or turned off; correct one of"
        in _refusal("qwen2", layer_types=["full_attention", "sliding_attention"], **switch)
    )


def test_positions_in_images_are_refused() -> None:
    assert _refusal("qwen2", use_mrope=True) == "m/config.json: 'use_mrope' is True, expected False."


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"max_window_layers": 1}, (0, 4096)),
        ({"max_window_layers": 0, "sliding_window": 5}, (5, 5)),
        ({"max_window_layers": 2, "sliding_window": 5}, ()),
        ({"max_window_layers": 0, "sliding_window": None}, ()),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}, (5, 0)),
        ({}, ()),
    ],
)
def test_windows_of_qwen2(changes: Mapping[str, Any], windows: tuple[int, ...]) -> None:
    assert _read("qwen2", use_sliding_window=True, **changes).config.windows == windows


@both
@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("value", [ABSENT, None])
def test_a_missing_size(model_type: str, key: str, value: Any) -> None:
    assert _refusal(model_type, **{key: value}) == (
        f"m/config.json: key '{key}' is missing; use the complete config.json of a decoder model."
    )


@both
@pytest.mark.parametrize("table", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"rope_type": "ntk", "factor": 2.0},
            ": expected the RoPE type to be one of default, dynamic, linear, llama3, longrope, yarn, found 'ntk'.",
        ),
        (
            {"type": "su", "factor": 4.0},
            ": expected the RoPE type to be one of default, dynamic, linear, llama3, longrope",
        ),
        (
            {"rope_type": "yarn"},
            " rope parameters: key 'factor' is missing; use the model's complete config.json.",
        ),
        (
            {"rope_type": "longrope"},
            " rope parameters: key 'short_factor' is missing; use the model's complete config.json.",
        ),
        (
            {"rope_type": "linear", "type": "dynamic", "factor": 2.0},
            ": expected rope_type and type to be equal, found linear and dynamic; remove the wrong key.",
        ),
        (
            {"rope_type": "linear"},
            " rope parameters: key 'factor' is missing; use the model's complete config.json.",
        ),
        ({"rope_type": "linear", "factor": 0}, " rope parameters: 'factor' is 0, expected a number above 0."),
        (
            {"rope_type": "linear", "factor": "2"},
            " rope parameters: 'factor' is '2', expected a number above 0.",
        ),
        (
            {"rope_type": "linear", "factor": True},
            " rope parameters: 'factor' is True, expected a number above 0.",
        ),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, " rope parameters: 'beta_fast' may change"),
        ({"rope_type": "default", "factor": 2.0}, " rope parameters: 'factor' may change"),
        ({"full_attention": {"rope_type": "default"}}, " rope parameters: 'full_attention' may change"),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            ": expected partial_rotary_factor to be 1 for this architecture, found",
        ),
        (
            {**LLAMA3, "low_freq_factor": 4.0},
            " rope parameters: expected high_freq_factor above low_freq_factor",
        ),
        (
            {**LLAMA3, "low_freq_factor": None},
            " rope parameters: key 'low_freq_factor' is missing; use the model's complete config.json.",
        ),
        (
            {**LLAMA3, "original_max_position_embeddings": None},
            " rope parameters: key 'original_max_position_embeddings' is missing; use the model's",
        ),
        ({**LLAMA3, "attention_factor": 1.2}, " rope parameters: 'attention_factor' may change"),
        ({"rope_theta": 0.0}, ": 'rope_theta' is 0.0, expected a number above 0."),
        ({"rope_theta": "1e4"}, " rope parameters: 'rope_theta' is '1e4', expected a number."),
    ],
)
def test_rope_that_is_not_understood(
    model_type: str, table: str, parameters: Mapping[str, Any], message: str
) -> None:
    assert _refusal(model_type, **{table: parameters}).startswith(f"m/config.json{message}")


def test_a_partial_rotary_factor_is_found_in_every_place() -> None:
    nested = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    assert "partial_rotary_factor" in _refusal(rope_parameters=nested, partial_rotary_factor=1.0)


@pytest.mark.parametrize(
    ("newer", "older", "key"),
    [
        ({"rope_theta": 1e6}, {"rope_type": "linear", "factor": 2.0}, "rope_theta"),
        ({"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, "rope_type"),
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 2.0}, "factor"),
    ],
)
def test_two_spellings_that_disagree(newer: Mapping[str, Any], older: Mapping[str, Any], key: str) -> None:
    """transformers silently ignores the newer spelling if both are present."""
    assert _refusal(rope_parameters=newer, rope_scaling=older) == (
        f"m/config.json: rope_parameters and rope_scaling have different values for '{key}'; remove rope_parameters or"
        " rope_scaling."
    )


# --- keys with an effect -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["LlamaForCausalLM"]),
        ("attention_dropout", 0.1),
        ("bos_token_id", 1),
        ("eos_token_id", [2, 3]),
        ("pad_token_id", None),
        ("initializer_range", 0.02),
        ("torch_dtype", "bfloat16"),
        ("dtype", "float32"),
        ("use_cache", False),
        ("transformers_version", "4.40.1"),
        ("_name_or_path", "x"),
        ("anything_at_all", None),
        ("rope_scaling", None),
        ("rope_scaling", {}),
        ("rope_scaling", {"type": "default"}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("rope_theta", 10000),
        ("partial_rotary_factor", 1.0),
        ("hidden_act", None),
        ("hidden_act", "swish"),
        ("cache_implementation", "hybrid"),
    ],
)
def test_a_harmless_key_has_no_effect(model_type: str, key: str, value: Any) -> None:
    plain, found = _read(model_type), _read(model_type, **{key: value})
    assert found.config == plain.config
    np.testing.assert_array_equal(found.ropes[0].frequencies, plain.ropes[0].frequencies)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1},
        {"layer_types": ["full_attention", "full_attention"]},
        {"sliding_window": None},
        {"use_mrope": False},
    ],
)
def test_a_disabled_option_has_no_effect(changes: Mapping[str, Any]) -> None:
    assert _read("qwen2", **changes).config == _read("qwen2").config


@both
@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("hidden_size", 96, "width"),
        ("intermediate_size", 64, "ff_width"),
        ("num_hidden_layers", 5, "layers"),
        ("num_attention_heads", 12, "heads"),
        ("num_key_value_heads", 1, "kv_heads"),
        ("head_dim", 10, "head_dim"),
        ("vocab_size", 99, "vocab"),
        ("max_position_embeddings", 77, "max_positions"),
        ("rms_norm_eps", 1e-3, "norm_eps"),
        ("tie_word_embeddings", True, "tied_embeddings"),
    ],
)
def test_a_key_that_sets_the_shape(model_type: str, key: str, value: Any, field: str) -> None:
    # A change of the width or of the number of heads would also change the head dimension.
    fixed = {"head_dim": 8, key: value}
    assert getattr(_read(model_type, **fixed).config, field) == value
    assert getattr(_read(model_type).config, field) != value


@both
@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_an_activation_by_any_name(model_type: str, name: str) -> None:
    assert _read(model_type, hidden_act=name).config.activation == "gelu_tanh"
    assert _read(model_type).config.activation == "silu"


def test_biases() -> None:
    plain, qwen2 = _read().config, _read("qwen2").config
    assert (plain.qkv_bias, plain.out_bias, plain.mlp_bias) == (False, False, False)
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.mlp_bias) == (True, False, False)
    attention, mlp = _read(attention_bias=True).config, _read(mlp_bias=True).config
    assert (attention.qkv_bias, attention.out_bias, attention.mlp_bias) == (True, True, False)
    assert (mlp.qkv_bias, mlp.out_bias, mlp.mlp_bias) == (False, False, True)


def test_defaults_are_those_of_transformers() -> None:
    llama, qwen2 = _read(num_key_value_heads=ABSENT).config, _read("qwen2").config
    assert (llama.kv_heads, llama.head_dim, llama.max_positions, llama.norm_eps) == (6, 8, 2048, 1e-6)
    assert (qwen2.max_positions, qwen2.norm_eps, qwen2.tied_embeddings) == (32768, 1e-6, False)
    many = _read("qwen2", num_attention_heads=64, head_dim=8, num_key_value_heads=ABSENT).config
    assert many.kv_heads == 32
    assert _read("qwen2", num_key_value_heads=None).config.kv_heads == 6


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 2.0}, LLAMA3])
def test_both_spellings_of_rope_mean_the_same(scaling: Mapping[str, Any]) -> None:
    older = _read(rope_theta=5e5, rope_scaling=scaling)
    oldest = _read(
        rope_theta=5e5, rope_scaling={"type": scaling["rope_type"], **dict(list(scaling.items())[1:])}
    )
    newer = _read(rope_parameters={"rope_theta": 5e5, **scaling})
    together = _read(rope_theta=5e5, rope_parameters={"rope_theta": 5e5, **scaling}, rope_scaling=scaling)
    for spec in (oldest, newer, together):
        np.testing.assert_array_equal(spec.ropes[0].frequencies, older.ropes[0].frequencies)
    assert not np.array_equal(older.ropes[0].frequencies, _read(rope_theta=5e5).ropes[0].frequencies)
    assert not np.array_equal(older.ropes[0].frequencies, _read(rope_scaling=scaling).ropes[0].frequencies)


def test_the_newer_theta_takes_precedence() -> None:
    found = _read(rope_theta=123.0, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    np.testing.assert_array_equal(found.ropes[0].frequencies, _read(rope_theta=5e5).ropes[0].frequencies)
