"""The keys of generation_config.json: each is applied, harmless or refused, and none is ignored silently."""

import numpy as np
import pytest

from precast.exporter.sources.generation import KEYS, Treatment, read_sampling, without_generation
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

ONE = {"model.embed_tokens.weight": np.ones((4, 2), np.float32)}
GREEDY = {}
SAMPLED = {"temperature": 1.0, "top_k": 50}
# For each refused key, a value that would change the answers.
HOSTILE = {
    "is_assistant": True,
    "num_beams": 4,
    "num_beam_groups": 2,
    "constraints": [["x"]],
    "force_words_ids": [[1]],
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "max_time": 2.5,
    "token_healing": True,
    "guidance_scale": 1.5,
    "sequence_bias": [[[1], 2.0]],
    "exponential_decay_length_penalty": [15, 1.6],
    "watermarking_config": {"bias": 2.5},
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 3,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 1,
    "typical_p": 0.9,
    "top_h": 0.4,
    "epsilon_cutoff": 0.0003,
    "eta_cutoff": 0.0003,
}


def refused() -> list[str]:
    return [key for key, known in KEYS.items() if known.treatment is Treatment.REFUSED]


def read(tmp_path, **said):
    return read_sampling(tmp_path / "generation_config.json", said)


def test_every_key_of_transformers_is_listed():
    """The test fails if a newer version of transformers adds a key."""
    transformers = pytest.importorskip("transformers", reason="the keys are transformers' own")
    assert set(vars(transformers.GenerationConfig())) - {"_original_object_hash"} - KEYS.keys() == set()


def test_the_defaults_of_transformers_are_neutral(tmp_path):
    """A file that contains all defaults has no effect."""
    transformers = pytest.importorskip("transformers", reason="the defaults are transformers' own")
    said = transformers.GenerationConfig._get_default_generation_params()
    said = {key: value for key, value in said.items() if value is not None}
    off = {"min_length": 0, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
    assert read(tmp_path, **said) == off
    assert read(tmp_path, **{**said, "do_sample": True}) == {**off, **SAMPLED, "top_p": 1.0}


def test_every_refused_key_has_a_hostile_value():
    assert sorted(HOSTILE) == sorted(refused())


@pytest.mark.parametrize("key", refused())
def test_keys_that_change_the_answers_are_refused_by_name(checkpoint, key):
    folder = checkpoint({"generation_config.json": {"do_sample": True, key: HOSTILE[key]}}, ONE)
    with pytest.raises(PrecastError) as raised:
        open_source(str(folder))
    value = f"{HOSTILE[key]!r:.60}"
    assert str(raised.value) == (
        f"{folder / 'generation_config.json'}: {key} is {value}, which {KEYS[key].reason}, but precast does not support"
        " that; remove the key to export the model without it."
    )


@pytest.mark.parametrize("key", refused())
def test_neutral_values_of_refused_keys_are_accepted(tmp_path, key):
    for value in KEYS[key].neutral:
        assert read(tmp_path, **{key: value, "do_sample": True}) == SAMPLED
    if KEYS[key].sampling:  # without do_sample transformers warns and ignores the key
        assert read(tmp_path, **{key: HOSTILE[key]}) == GREEDY


@pytest.mark.parametrize("key", [key for key, known in KEYS.items() if known.treatment is Treatment.HARMLESS])
def test_harmless_keys_have_a_reason_and_no_effect(tmp_path, key):
    assert KEYS[key].reason
    for value in (True, 7, "text", [1], {"a": 1}):
        assert read(tmp_path, **{key: value}) == GREEDY


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, {}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"do_sample": True}, SAMPLED),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0, "top_k": 0}),
        ({"do_sample": True, "top_p": 0.9, "min_p": 0.1}, {**SAMPLED, "top_p": 0.9, "min_p": 0.1}),
        ({"max_new_tokens": 5, "max_length": 9}, {"max_tokens": 5}),
        ({"max_length": 9}, {"max_length": 9}),
        ({"max_length": 20}, {}),
        ({"min_new_tokens": 0, "min_length": 9}, {"min_tokens": 0}),
        ({"stop_strings": "a"}, {"stop": ("a",)}),
        ({"stop_strings": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"suppress_tokens": [], "bad_words_ids": []}, {}),
        ({"suppress_tokens": [3]}, {"suppress_tokens": [3]}),
        ({"begin_suppress_tokens": [4]}, {"begin_suppress_tokens": [4]}),
    ],
)  # fmt: skip
def test_applied_keys(tmp_path, said, expected):
    assert read(tmp_path, **said) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (  # Llama 3.1 Instruct
            {
                "bos_token_id": 128000,
                "do_sample": True,
                "eos_token_id": [128001, 128008, 128009],
                "temperature": 0.6,
                "top_p": 0.9,
                "transformers_version": "4.42.3",
            },
            {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
        ),
        (  # Qwen 2.5 Instruct
            {
                "bos_token_id": 151643,
                "pad_token_id": 151643,
                "do_sample": True,
                "eos_token_id": [151645, 151643],
                "repetition_penalty": 1.05,
                "temperature": 0.7,
                "top_p": 0.8,
                "top_k": 20,
            },
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        ),
        (  # Gemma 3
            {
                "cache_implementation": "hybrid",
                "do_sample": True,
                "eos_token_id": [1, 106],
                "top_k": 64,
                "top_p": 0.95,
            },
            {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
        ),
        (  # Llama 2 chat
            {"_from_model_config": True, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0},
            {"max_length": 4096},
        ),
    ],
)
def test_published_files(tmp_path, said, expected):
    assert read(tmp_path, **said) == expected


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            {"repetition_penalty": "high"},
            'expected repetition_penalty to be a number, found "high"; correct it.',
        ),
        (
            {"no_repeat_ngram_size": True},
            "expected no_repeat_ngram_size to be a number, found true; correct it.",
        ),
        ({"suppress_tokens": 5}, "expected suppress_tokens to be a list, found 5; correct it."),
        (
            {"stop_strings": [1]},
            "expected stop_strings to be a string or a list of strings, found [1]; correct it.",
        ),
        ({"do_sample": 1}, "expected do_sample to be true or false, found 1; correct it."),
    ],
)
def test_values_of_the_wrong_type(tmp_path, said, text):
    with pytest.raises(PrecastError) as raised:
        read(tmp_path, **said)
    assert str(raised.value) == f"{tmp_path / 'generation_config.json'}: {text}"


def test_keys_that_transformers_does_not_know_are_named(checkpoint):
    said = {"chat_format": "x", "max_window_size": 5}
    source = open_source(str(checkpoint({"generation_config.json": said}, ONE)))
    (remark,) = source.remarks
    assert remark == (
        "generation_config.json: ignored these keys, as transformers' generate() does: chat_format, max_window_size"
    )
    assert source.sampling == {}


def test_keys_in_config_json_count_without_generation_config_json(checkpoint):
    config = {"model_type": "llama", "repetition_penalty": 1.5, "num_beams": 1, "eos_token_id": 1}
    source = open_source(str(checkpoint({"config.json": config}, ONE)))
    assert source.sampling == {"repetition_penalty": 1.5}
    assert source.config == {"model_type": "llama", "eos_token_id": 1}
    assert source.remarks == ()


def test_keys_in_config_json_do_not_count_beside_generation_config_json(checkpoint):
    config = {"model_type": "llama", "repetition_penalty": 1.5, "num_beams": 4}
    source = open_source(str(checkpoint({"config.json": config, "generation_config.json": {}}, ONE)))
    assert source.sampling == {}
    assert source.config == {"model_type": "llama"}


def test_a_refusal_names_config_json(checkpoint):
    folder = checkpoint({"config.json": {"model_type": "llama", "num_beams": 4}}, ONE)
    with pytest.raises(PrecastError) as raised:
        open_source(str(folder))
    assert str(raised.value).startswith(
        f"{folder / 'config.json'}: num_beams is 4, which asks for a beam search, but"
    )


def test_token_ids_stay_in_the_config():
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "top_k": 5, "hidden_size": 8}
    assert without_generation(config) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_size": 8,
    }
