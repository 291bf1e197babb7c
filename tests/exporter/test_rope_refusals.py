"""Refusals of RoPE parameters that are missing, unknown, unusable or contradictory."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from precast.exporter.models.config import ConfigReader
from precast.exporter.models.rope import read_rope, read_rope_by_layer_type
from precast.loaders.artifact.errors import PrecastError

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 2.0],
    "long_factor": [4.0, 5.0],
    "original_max_position_embeddings": 16,
}


def _read(keys: Mapping[str, Any], head_dim: int, options: Mapping[str, Any]) -> None:
    reader = ConfigReader(keys, "config.json")
    read_rope(reader, head_dim, 64, **options)
    reader.finish()


def _read_layered(keys: Mapping[str, Any]) -> None:
    reader = ConfigReader(keys, "config.json")
    thetas = {"full_attention": 1e6, "sliding_attention": 1e4}
    read_rope_by_layer_type(reader, 4, 64, default_thetas=thetas)
    reader.finish()


def _refusal(keys: Mapping[str, Any], head_dim: int = 8, **options: Any) -> str:
    with pytest.raises(PrecastError) as caught:
        _read(keys, head_dim, options)
    return str(caught.value)


KNOWN = "expected the RoPE type to be one of default, dynamic, linear, llama3, longrope, yarn"


@pytest.mark.parametrize("table", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "proportional"}, f": {KNOWN}, found 'proportional'."),
        ({"type": "su"}, f": {KNOWN}, found 'su'."),
        ({"rope_type": 3}, f": {KNOWN}, found '3'."),
        (
            {"rope_type": "yarn", "type": "linear"},
            ": expected rope_type and type to be equal, found yarn and linear; remove the wrong key.",
        ),
        ({"rope_theta": 0}, ": 'rope_theta' is 0, expected a number above 0."),
        ({"rope_theta": float("nan")}, ": 'rope_theta' is nan, expected a number above 0."),
        (
            {"partial_rotary_factor": 0.5},
            ": expected partial_rotary_factor to be 1 for this architecture, found 0.5; correct or remove it.",
        ),
        (
            {**DYNAMIC, "factor": None},
            " rope parameters: key 'factor' is missing; use the model's complete config.json.",
        ),
        ({**DYNAMIC, "factor": -1}, " rope parameters: 'factor' is -1, expected a number above 0."),
        ({**LINEAR, "factor": math.inf}, " rope parameters: 'factor' is inf, expected a number above 0."),
        (
            {**YARN, "factor": None},
            " rope parameters: key 'factor' is missing; use the model's complete config.json.",
        ),
        ({**YARN, "factor": "4"}, " rope parameters: 'factor' is '4', expected a number above 0."),
        ({**YARN, "beta_fast": 0}, " rope parameters: 'beta_fast' is 0, expected a number above 0."),
        ({**YARN, "beta_slow": True}, " rope parameters: 'beta_slow' is True, expected a number above 0."),
        (
            {**YARN, "beta_slow": 33},
            " rope parameters: expected beta_fast to be at least beta_slow, found 32.0 and 33.",
        ),
        ({**YARN, "truncate": "no"}, " rope parameters: 'truncate' is 'no', expected true or false."),
        ({**YARN, "mscale": 0}, " rope parameters: 'mscale' is 0, expected a number above 0."),
        (
            {**YARN, "mscale_all_dim": -1.0},
            " rope parameters: 'mscale_all_dim' is -1.0, expected a number above 0.",
        ),
        (
            {**YARN, "attention_factor": 0.0},
            " rope parameters: 'attention_factor' is 0.0, expected a number above 0.",
        ),
        (
            {**YARN, "rope_theta": 1.0},
            " rope parameters: 'rope_theta' is 1.0, expected a number above 1 for yarn.",
        ),
        (
            {**YARN, "original_max_position_embeddings": 1024.0},
            " rope parameters: 'original_max_position_embeddings' is 1024.0, expected a whole number above 0.",
        ),
        (
            {**LONGROPE, "original_max_position_embeddings": 1},
            " rope parameters: 'original_max_position_embeddings' is 1, expected a whole number above 1.",
        ),
        ({**YARN, "short_factor": [1.0]}, " rope parameters: 'short_factor' may change the model's maths"),
        ({**LONGROPE, "short_mscale": 1.1}, " rope parameters: 'short_mscale' may change the model's maths"),
        (
            {**LONGROPE, "short_factor": None},
            " rope parameters: key 'short_factor' is missing; use the model's complete config.json.",
        ),
        (
            {**LONGROPE, "long_factor": None},
            " rope parameters: key 'long_factor' is missing; use the model's complete config.json.",
        ),
        (
            {**LONGROPE, "long_factor": 4.0},
            " rope parameters: 'long_factor' is 4.0, expected a list of numbers above 0.",
        ),
        (
            {**LONGROPE, "long_factor": [4.0, "5"]},
            " rope parameters: 'long_factor' is [4.0, '5'], expected a list of numbers above 0.",
        ),
        (
            {**LONGROPE, "short_factor": [0.0, 1.0]},
            " rope parameters: 'short_factor' is [0.0, 1.0], expected a list of numbers above 0.",
        ),
        (
            {**LONGROPE, "short_factor": [1.0, 2.0, 3.0]},
            " rope parameters: expected 'short_factor' to have 2 numbers (one for each rotated pair), found 3.",
        ),
        (
            {**LONGROPE, "long_factor": []},
            " rope parameters: expected 'long_factor' to have 2 numbers (one for each rotated pair), found 0.",
        ),
        ({**LONGROPE, "factor": 0.0}, " rope parameters: 'factor' is 0.0, expected a number above 0."),
        (
            {**LONGROPE, "attention_factor": "1"},
            " rope parameters: 'attention_factor' is '1', expected a number above 0.",
        ),
        (
            {**LLAMA3, "original_max_position_embeddings": None},
            " rope parameters: key 'original_max_position_embeddings' is missing; use the model's",
        ),
        (
            {**LLAMA3, "high_freq_factor": 1.0},
            " rope parameters: expected high_freq_factor above low_freq_factor, found 1.0 and 1.0.",
        ),
        ({**LLAMA3, "truncate": True}, " rope parameters: 'truncate' may change the model's maths"),
    ],
)
def test_parameters_that_are_refused(table: str, parameters: Mapping[str, Any], message: str) -> None:
    assert _refusal({table: parameters}, head_dim=4).startswith(f"config.json{message}")


@pytest.mark.parametrize(
    ("factor", "found"), [(0.0, "0.0"), (-0.5, "-0.5"), (1.5, "1.5"), (float("nan"), "nan"), (0.1, "0.1")]
)
def test_parts_of_a_head_that_are_refused(factor: float, found: str) -> None:
    assert _refusal({"partial_rotary_factor": factor}, partial=True) == (
        "config.json: expected 'partial_rotary_factor' to be at most 1, and large enough to rotate at least one of a"
        f" head's 8 dimensions, found {found}."
    )


def test_parts_of_a_head_that_disagree() -> None:
    keys = {"partial_rotary_factor": 1.0, "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}
    assert _refusal(keys, partial=True) == (
        "config.json: partial_rotary_factor has two values, 0.5 and 1.0; remove the wrong one."
    )
    assert _refusal(keys) == (
        "config.json: expected partial_rotary_factor to be 1 for this architecture, found 0.5; correct or remove it."
    )


@pytest.mark.parametrize("scaling", [{**LLAMA3, "original_max_position_embeddings": 32}, YARN, LONGROPE])
@pytest.mark.parametrize("outside", [{"original_max_position_embeddings": 48}, {}])
def test_original_positions_that_disagree(scaling: Mapping[str, Any], outside: Mapping[str, int]) -> None:
    """If both are present, transformers uses the value outside the table, which may be the model's default."""
    inside = scaling["original_max_position_embeddings"]
    found = _refusal({"rope_scaling": scaling, **outside}, head_dim=4, original_positions=48)
    assert found == (
        f"config.json rope parameters: original_max_position_embeddings is {inside} in the RoPE parameters, but 48"
        " outside them; correct the value that is wrong."
    )


@pytest.mark.parametrize(
    ("newer", "older", "key"),
    [
        ({"rope_theta": 1e6}, {**LINEAR}, "rope_theta"),
        ({"rope_type": "default"}, LINEAR, "rope_type"),
        ({"rope_type": "yarn", "factor": 4.0}, {"type": "yarn", "factor": 2.0}, "factor"),
        (LONGROPE, {**LONGROPE, "long_factor": [4.0, 6.0]}, "long_factor"),
        ({**YARN, "truncate": False}, YARN, "truncate"),
        ({**LINEAR, "partial_rotary_factor": 0.5}, LINEAR, "partial_rotary_factor"),
    ],
)
def test_two_spellings_that_disagree(newer: Mapping[str, Any], older: Mapping[str, Any], key: str) -> None:
    """transformers silently ignores the newer spelling if both are present."""
    found = _refusal({"rope_parameters": newer, "rope_scaling": older}, head_dim=4, partial=True)
    assert found == (
        f"config.json: rope_parameters and rope_scaling have different values for '{key}'; remove rope_parameters or"
        " rope_scaling."
    )


# --- layer types, each with its own -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            ": expected rope_parameters to contain only the keys full_attention and sliding_attention, found",
        ),
        (
            {"rope_parameters": {"chunked_attention": LINEAR}},
            (
                ": expected rope_parameters to contain only the keys full_attention and sliding_attention, found"
                " 'chunked_attention'."
            ),
        ),
        (
            {"rope_parameters": {"full_attention": 3}},
            " full_attention: 'rope_parameters' is 3, expected a JSON object",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            " sliding_attention rope parameters: key 'factor' is missing; use the model's complete config.json.",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "proportional"}}},
            f" full_attention: {KNOWN}, found 'proportional'.",
        ),
        (
            {"rope_parameters": {"full_attention": {**YARN, "truncate": False}}},
            " full_attention: 'truncate' is False, expected True, because transformers",
        ),
        (
            {"rope_parameters": {"full_attention": {**LINEAR, "partial_rotary_factor": 0.5}}},
            " full_attention: expected partial_rotary_factor to be 1 for this architecture, found 0.5;",
        ),
        (
            {"rope_scaling": {**LINEAR, "factor": 4.0}, "rope_parameters": {"full_attention": LINEAR}},
            " full_attention: rope_parameters and rope_scaling have different values for 'factor'",
        ),
        (
            {"rope_scaling": {**YARN, "truncate": False}},
            " full_attention: 'truncate' is False, expected True, because transformers ignores it for a layer type.",
        ),
        ({"rope_theta": "1e6"}, " full_attention: 'rope_theta' is '1e6', expected a number."),
        (
            {"rope_local_base_freq": 0},
            " sliding_attention: 'rope_local_base_freq' is 0, expected a number above 0.",
        ),
        ({"partial_rotary_factor": 0.5}, ": 'partial_rotary_factor' may change the model's maths"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 1024},
            ": 'original_max_position_embeddings' may change the model's maths",
        ),
        (
            {"rope_scaling": {"full_attention": LINEAR}},
            " full_attention rope parameters: 'full_attention' may change",
        ),
    ],
)
def test_layer_types_that_are_refused(keys: Mapping[str, Any], message: str) -> None:
    with pytest.raises(PrecastError) as caught:
        _read_layered(keys)
    assert str(caught.value).startswith(f"config.json{message}")
