"""Configs of well-known models: they give the right shapes, and a change of any key has an effect or is refused."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.exporter.models.config_keys import HARMLESS
from precast.exporter.models.parameters import abstract_model
from precast.exporter.models.registry import ARCHITECTURES, ModelSpec, read_model
from precast.loaders.artifact.errors import PrecastError

# The published config.json of each model. Only the divisors of LongRoPE are invented.
PUBLISHED: Mapping[str, Any] = json.loads(Path(__file__).with_name("published_configs.json").read_text())


def _is_same(one: ModelSpec, other: ModelSpec) -> bool:
    tables = zip(one.tables(24), other.tables(24), strict=True)
    return one.config == other.config and all(np.array_equal(a, b) for a, b in tables)


# --- published configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_parameters(name: str) -> None:
    spec = read_model(PUBLISHED[name]["config"], name)
    model = abstract_model(spec)
    assert sum(parameter.size for parameter in model.parameters) == PUBLISHED[name]["parameters"]
    sources = [source for parameter in model.parameters for source in parameter.sources]
    assert len(sources) == len(set(sources))
    layers = {len(p.shape) > 1 and p.shape[0] for p in model.parameters if p.name.startswith("model.layers.")}
    experts = spec.config.mixture.experts if spec.config.mixture else 1
    assert layers == {spec.config.layers, spec.config.layers * experts}


def test_every_architecture_has_a_published_model() -> None:
    assert {entry["config"]["model_type"] for entry in PUBLISHED.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("Llama-3.1-70B", set()),
        ("Mistral-7B-v0.1", {4096}),
        ("Mistral-Nemo-Base-2407", set()),
        ("Phi-3-mini-4k-instruct", {2047}),
        ("Qwen2.5-0.5B", set()),
        ("gemma-2-2b", {0, 4096}),
        ("gemma-3-1b-it", {0, 512}),
    ],
)
def test_windows_of_published_models(name: str, windows: set[int]) -> None:
    assert set(read_model(PUBLISHED[name]["config"], name).config.windows) == windows


def test_layers_of_gemma_3() -> None:
    older, newer = (read_model(PUBLISHED[n]["config"], n).config for n in ("gemma-3-1b-it", "gemma-3-270m"))
    assert [i for i, window in enumerate(older.windows) if not window] == [5, 11, 17, 23]
    assert [i for i, window in enumerate(newer.windows) if not window] == [5, 11, 17]
    assert all((window > 0) == (rope == 1) for window, rope in zip(older.windows, older.ropes, strict=True))
    config = {k: v for k, v in PUBLISHED["gemma-3-270m"]["config"].items() if k != "layer_types"}
    assert read_model(config, "c").config == newer


def test_layers_without_positions() -> None:
    spec = read_model(PUBLISHED["SmolLM3-3B"]["config"], "c")
    assert [i for i, rope in enumerate(spec.config.ropes) if rope] == list(range(3, 36, 4))
    cos, sin = spec.tables(9)
    assert (cos[1] == 1.0).all()
    assert (sin[1] == 0.0).all()
    assert not (cos[0] == 1.0).all()


# --- every key of every published config --------------------------------------------------------------------

# For each model_type, the keys that transformers also ignores, either always or because of other keys.
_SAYS_NOTHING: Mapping[str, set[str]] = {
    "gemma3_text": {"_sliding_window_pattern"},
    "gpt2": {
        "attn_pdrop",
        "n_ctx",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    },
    "mixtral": {"output_router_logits", "router_aux_loss_coef"},
    "phi3": {"auto_map"},
    "qwen2": {"sliding_window", "max_window_layers"},
    "qwen3": {"sliding_window", "max_window_layers"},
    "qwen3_moe": {
        "intermediate_size",
        "max_window_layers",
        "output_router_logits",
        "router_aux_loss_coef",
        "sliding_window",
    },
    "smollm3": {"max_window_layers", "no_rope_layer_interval", "pretraining_tp", "sliding_window"},
}
_MODEL_SAYS_NOTHING = {
    "Phi-3-mini-4k-instruct": {"original_max_position_embeddings"},
    # The key exceeds the number of layers, no window is in use, or layer_types takes precedence.
    "Qwen2.5-0.5B": {"use_sliding_window"},
    "Qwen3-0.6B": {"use_sliding_window"},
    "Qwen3-30B-A3B": {"use_sliding_window"},
    "SmolLM3-3B": {"use_sliding_window"},
}
# Keys that a refusal may name instead, because the changed key contradicts them.
_NAMED_INSTEAD = {
    "hidden_size": "short_factor",
    "num_attention_heads": "short_factor",
    "num_hidden_layers": "layers",
    "rope_scaling": "RoPE type",
}
_INSTEAD_OF_NULL: Mapping[str, Any] = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}


def _mutated(key: str, value: Any) -> Any:
    if value is None:
        return _INSTEAD_OF_NULL.get(key, 48)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}_2"
    if isinstance(value, list):
        return value[::-1] if value != value[::-1] else [*value, 1]
    if isinstance(value, dict):
        return {**value, "of_another_kind": 1}
    return value * 2


def _keys() -> Iterator[tuple[str, str]]:
    for name, entry in PUBLISHED.items():
        yield from ((name, key) for key in entry["config"] if key not in HARMLESS | _nothing(name))


def _nothing(name: str) -> set[str]:
    model_type = PUBLISHED[name]["config"]["model_type"]
    return _SAYS_NOTHING.get(model_type, set()) | _MODEL_SAYS_NOTHING.get(name, set())


@pytest.mark.parametrize(("name", "key"), list(_keys()))
def test_a_changed_value_has_an_effect_or_is_refused_by_name(name: str, key: str) -> None:
    config = PUBLISHED[name]["config"]
    assert _is_seen(config, {**config, key: _mutated(key, config[key])}, key)


def _is_seen(config: Mapping[str, Any], changed: Mapping[str, Any], key: str) -> bool:
    try:
        return not _is_same(read_model(config, "c"), read_model(changed, "c"))
    except PrecastError as error:
        return any(name in str(error) for name in (key, _NAMED_INSTEAD.get(key, key), "'of_another_kind'"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_that_transformers_ignores_have_no_effect(name: str) -> None:
    config = PUBLISHED[name]["config"]
    for key in config.keys() & _nothing(name):
        changed = {**config, key: _mutated(key, config[key])}
        assert _is_same(read_model(config, "c"), read_model(changed, "c"))


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_older_names_of_longrope(kind: str) -> None:
    config = PUBLISHED["Phi-3-mini-128k-instruct"]["config"]
    older = {**config, "rope_scaling": {**config["rope_scaling"], "type": kind}}
    assert _is_same(read_model(config, "c"), read_model(older, "c"))
