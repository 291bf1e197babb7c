"""Every key of transformers' configs and of published files is read, harmless or refused."""

import inspect
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from precast.exporter.models.config_keys import HARMLESS, UNSUPPORTED
from precast.exporter.models.parameters import abstract_model
from precast.exporter.models.registry import ARCHITECTURES, ModelSpec, read_model
from precast.loaders.artifact.errors import PrecastError

SIZES: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
GPT2_SIZES: Mapping[str, Any] = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 320}


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **(GPT2_SIZES if model_type == "gpt2" else SIZES), **changes}


def read(model_type: str = "llama", **changes: Any) -> ModelSpec:
    return read_model(config(model_type, **changes), "m/config.json")


def refusal(model_type: str = "llama", **changes: Any) -> str:
    with pytest.raises(PrecastError) as caught:
        read(model_type, **changes)
    return str(caught.value)


def assert_same(one: ModelSpec, other: ModelSpec) -> None:
    assert one.config == other.config
    for a, b in zip(one.tables(16), other.tables(16), strict=True):
        np.testing.assert_array_equal(a, b)


architectures = pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))


# --- transformers' own keys ---------------------------------------------------------------------------------


@architectures
def test_configs_that_transformers_writes(model_type):
    """A config with all keys of a transformers class at their defaults is accepted."""
    from transformers import AutoConfig

    made = AutoConfig.for_model(
        model_type, **{k: v for k, v in config(model_type).items() if k != "model_type"}
    )
    written = {**made.to_dict(), "model_type": model_type}
    assert len(written) > 20
    read_model(written, "m/config.json")


@architectures
def test_attributes_of_every_config_of_transformers(model_type):
    """The attributes that all config classes share are accepted at their defaults and change nothing."""
    from transformers import PretrainedConfig

    plain = read(model_type)
    for key, value in vars(PretrainedConfig()).items():
        if key != "model_type":
            assert_same(read(model_type, **{key: value}), plain)


def test_a_shared_attribute_has_its_place():
    from transformers import PretrainedConfig

    assert set(vars(PretrainedConfig())) - HARMLESS - UNSUPPORTED.keys() == set()
    parameters = inspect.signature(PretrainedConfig.__init__).parameters
    assert {
        name for name in parameters if name not in ("self", "kwargs")
    } - HARMLESS - UNSUPPORTED.keys() == set()
    assert not HARMLESS & UNSUPPORTED.keys()


# Attributes of transformers 4 with their defaults. The keys of generation_config.json are left out: the source reads
# them.
OLDER = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "finetuning_task": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "prefix": None,
    "pruned_heads": {},
    "sep_token_id": None,
    "task_specific_params": None,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "torch_dtype": "bfloat16",
    "torchscript": False,
    "use_bfloat16": False,
}


@architectures
@pytest.mark.parametrize("key", OLDER)
def test_attributes_of_older_configs(model_type, key):
    assert_same(read(model_type, **{key: OLDER[key]}), read(model_type))


# --- keys that published files carry ------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_sequence_length", 2048),
        ("model_max_length", 4096),
        ("is_decoder", True),
        ("use_flash_attn", True),
        ("_flash_attn_2_enabled", True),
        ("attn_implementation", "flash_attention_2"),
        ("gradient_checkpointing", True),
        ("hidden_dropout_prob", 0.1),
        ("unsloth_fixed", True),
        ("transformers.js_config", {"dtype": "q4"}),
        ("_name_or_path", "/home/somebody/model"),
        ("is_causal", True),
        ("mlp_bias", False),
        ("pretraining_tp", 1),
    ],
)
def test_a_harmless_key_has_no_effect(model_type, key, value):
    assert_same(read(model_type, **{key: value}), read(model_type))


@pytest.mark.parametrize(
    ("model_type", "changes", "kind"),
    [
        ("llama", {}, "full_attention"),
        ("qwen3_moe", {}, "full_attention"),
        ("mistral", {"sliding_window": None}, "full_attention"),
        ("mistral", {"sliding_window": 8}, "sliding_attention"),
        ("phi3", {"sliding_window": 8}, "sliding_attention"),
    ],
)
def test_layer_types_of_uniform_layers(model_type, changes, kind):
    other = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}[kind]
    assert_same(read(model_type, **changes, layer_types=[kind] * 2), read(model_type, **changes))
    for types in ([other] * 2, [kind, other], [kind], [kind] * 3, kind):
        text = refusal(model_type, **changes, layer_types=types)
        assert text.endswith(
            f": expected 'layer_types' to be {kind} for all 2 layers, as in transformers, found {types!r}; remove or"
            " correct the key."
        )


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_a_key_supported_with_neutral_values_only(key):
    """A neutral value has no effect, and any other is refused by name. Llama's config uses some of the keys."""
    for value in UNSUPPORTED[key].neutral:
        assert_same(read("gemma2", **{key: value}), read("gemma2"))
    on: Any = next(value for value in (True, 7, "x") if value not in UNSUPPORTED[key].neutral)
    if key == "attention_bias":
        assert refusal("qwen2", **{key: on}).startswith(
            "m/config.json: 'attention_bias' is True, which adds biases"
        )
    elif key == "is_causal":
        assert "lets tokens attend to later tokens" in refusal(**{key: False})
    else:
        assert refusal("gemma2", **{key: on}).startswith(f"m/config.json: '{key}' is ")


def test_a_refusal_names_the_effect_of_the_key():
    assert refusal(is_encoder_decoder=True) == (
        "m/config.json: 'is_encoder_decoder' is True, which describes an encoder-decoder model, but precast"
        " does not support that; remove the key if it does not apply to the model."
    )


def test_a_number_is_not_a_boolean():
    assert "'is_encoder_decoder' is 0" in refusal(is_encoder_decoder=0)


# --- sizes that nothing could hold --------------------------------------------------------------------------

HUGE = ((1 << 31) - 1, 1 << 31, 1 << 62, 10**40)


@architectures
@pytest.mark.parametrize("value", HUGE)
def test_huge_sizes(model_type, value):
    """Each size is refused in a sentence or contradicts the tensors' shapes, and no large array is allocated."""
    extra = {"num_experts": 4, "moe_intermediate_size": 16} if model_type in ("qwen3_moe", "mixtral") else {}
    sizes = {
        **config(model_type),
        **extra,
        "max_position_embeddings": 64,
        "sliding_window": 8,
        "head_dim": 12,
    }
    for key in sizes.keys() - {"model_type"}:
        tracemalloc.start()
        try:
            abstract_model(read_model({**sizes, key: value}, "m/config.json"))
        except PrecastError as error:
            text = str(error)
            assert text.startswith("m/config.json: ")
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 64 << 20, key


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_values_that_are_no_finite_numbers(key, value):
    assert refusal(**{key: value}).startswith(f"m/config.json: '{key}' is ")
