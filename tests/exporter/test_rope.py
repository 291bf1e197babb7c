"""RoPE compared with manual calculation and with transformers: frequencies, tables, and configs in every spelling."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.exporter.models.config import ConfigReader
from precast.exporter.models.rope import Rope, no_rope, read_rope, read_rope_by_layer_type
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
PHI3_TYPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def _rope(keys: Mapping[str, Any], head_dim: int = 8, max_positions: int = 64, **options: Any) -> Rope:
    """Read a config that contains only RoPE keys, all of which must be taken."""
    reader = ConfigReader(keys, "config.json")
    rope = read_rope(reader, head_dim, max_positions, **options)
    reader.finish()
    return rope


def _scaled(scaling: Mapping[str, Any], **options: Any) -> Rope:
    return _rope({"rope_scaling": scaling}, **options)


def _refusal(keys: Mapping[str, Any], **options: Any) -> str:
    with pytest.raises(PrecastError) as caught:
        _rope(keys, **options)
    return str(caught.value)


def _check(rope: Rope, frequencies: list[float], magnitude: float = 1.0) -> None:
    """Check the frequencies and the magnitude, which must be the same for every context."""
    assert rope.frequencies.dtype == np.float32
    assert (rope.max_context, rope.long_frequencies, rope.pairs) == (None, None, len(frequencies))
    np.testing.assert_allclose(rope.frequencies, frequencies, rtol=1e-6)
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-12)


# --- by hand ------------------------------------------------------------------------------------------------


def test_default_frequencies() -> None:
    _check(_rope({"rope_theta": 10000.0}), [1.0, 0.1, 0.01, 0.001])
    _check(_rope({}), [1.0, 0.1, 0.01, 0.001])
    _check(_rope({}, head_dim=4, default_theta=1e6), [1.0, 0.001])
    _check(_rope({"base": 100.0}, head_dim=4, theta_key="base"), [1.0, 0.1])


def test_linear_frequencies() -> None:
    _check(_scaled({"type": "linear", "factor": 2.0}), [0.5, 0.05, 0.005, 0.0005])


def test_llama3_frequencies() -> None:
    """Wavelengths are 2π·(1, 10, 100, 1000) over 32 positions: kept below 8, divided above 32."""
    divided = [1.0, 0.1 / 8, 0.01 / 8, 0.001 / 8]
    _check(_scaled({**LLAMA3, "original_max_position_embeddings": 32}), divided)
    # With 128 positions the second wavelength, 62.8, lies between 32 and 128 and is blended.
    smooth = (128 / (20 * math.pi) - 1) / 3
    blended = (1 - smooth) * 0.1 / 8 + smooth * 0.1
    _check(_scaled({**LLAMA3, "original_max_position_embeddings": 128}), [1.0, blended, *divided[2:]])


USUAL = 0.1 * math.log(4) + 1


def _bound(rotations: float) -> float:
    """Return the index of the pair, possibly fractional, that makes this number of rotations in 1024 positions.

    Each pair rotates 10 times as often as the next pair.
    """
    return math.log10(1024 / (2 * math.pi * rotations))


def test_yarn_frequencies() -> None:
    """By default the range of interpolation is from 32 rotations (pair 0.7) to one (pair 2.2)."""
    _check(_scaled(YARN), [1.0, 0.1 * 0.75, 0.01 * 0.5, 0.001 * 0.25], USUAL)
    narrow = {**YARN, "beta_fast": 16, "beta_slow": 2}  # from 1.008 to 1.911
    _check(_scaled(narrow), [1.0, 0.1, 0.01 / 4, 0.001 / 4], USUAL)


def test_yarn_frequencies_between_fractions_of_pairs() -> None:
    low, high = _bound(32), _bound(1)
    second, third = (1 - 0.75 * (pair - low) / (high - low) for pair in (1, 2))
    _check(_scaled({**YARN, "truncate": False}), [1.0, 0.1 * second, 0.01 * third, 0.001 / 4], USUAL)
    _check(_scaled({**YARN, "truncate": True}), [1.0, 0.1 * 0.75, 0.01 * 0.5, 0.001 * 0.25], USUAL)


def test_yarn_frequencies_with_an_empty_range() -> None:
    """In 6 positions no pair completes a rotation, so the range is from 0 to 0: all pairs but the first are divided."""
    short = {**YARN, "original_max_position_embeddings": 6}
    _check(_scaled(short), [1.0, 0.1 / 4, 0.01 / 4, 0.001 / 4], USUAL)


def test_the_range_of_yarn_ends_at_the_last_dimension() -> None:
    """In 1e9 positions pair 1.03 rotates 1.5e7 times and pair 8.2 would rotate once: the range ends at dimension 7."""
    long = {**YARN, "original_max_position_embeddings": 10**9, "beta_fast": 1.5e7}
    _check(_scaled(long), [1.0, 0.1, 0.01 * (1 - 0.75 / 6), 0.001 * (1 - 0.75 * 2 / 6)], USUAL)


@pytest.mark.parametrize(
    ("parameters", "magnitude"),
    [
        ({}, USUAL),
        ({"factor": 16}, 0.1 * math.log(16) + 1),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.5}, 1.5),
        ({"attention_factor": 1}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.7, "mscale_all_dim": 0.5}, (0.07 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"mscale": 0.7}, USUAL),
        ({"mscale_all_dim": 0.7}, USUAL),
        ({"mscale": 0.7, "mscale_all_dim": 0.5, "attention_factor": 1.25}, 1.25),
    ],
)
def test_yarn_magnitudes(parameters: Mapping[str, Any], magnitude: float) -> None:
    assert _scaled({**YARN, **parameters}).magnitude == pytest.approx(magnitude, rel=1e-12)


def test_yarn_and_longrope_scale_the_models_context_by_default() -> None:
    without = {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}
    found = _scaled(without, max_positions=1024)
    np.testing.assert_array_equal(found.frequencies, _scaled(YARN).frequencies)
    longrope = {k: v for k, v in LONGROPE.items() if k != "original_max_position_embeddings"}
    found = _scaled(longrope, head_dim=4, max_positions=40)
    assert (found.max_context, found.magnitude) == (40, 1.0)


def test_longrope_frequencies_are_those_of_the_context() -> None:
    rope = _rope({"rope_theta": 100.0, "rope_scaling": LONGROPE}, head_dim=4)
    assert rope.pairs == 2
    for context, expected in {1: [1.0, 0.05], 16: [1.0, 0.05], 17: [0.25, 0.02], 64: [0.25, 0.02]}.items():
        found = rope.at_context(context)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    cos, sin = rope.tables(17)
    np.testing.assert_allclose(cos[16], math.sqrt(1.5) * np.cos([4.0, 0.32]), rtol=1e-6)
    np.testing.assert_allclose(sin[16], math.sqrt(1.5) * np.sin([4.0, 0.32]), rtol=1e-6)
    np.testing.assert_allclose(rope.tables(16)[1][15, 1], math.sqrt(1.5) * math.sin(0.75), rtol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "max_positions", "magnitude"),
    [
        ({}, 64, math.sqrt(1.5)),
        ({}, 16, 1.0),
        ({}, 8, 1.0),
        ({"factor": 16.0}, 64, math.sqrt(2)),
        ({"factor": 1.0}, 64, 1.0),
        ({"attention_factor": 1.25}, 64, 1.25),
        ({"attention_factor": 1.25, "factor": 16.0}, 64, 1.25),
    ],
)
def test_longrope_magnitudes(parameters: Mapping[str, Any], max_positions: int, magnitude: float) -> None:
    found = _scaled({**LONGROPE, **parameters}, head_dim=4, max_positions=max_positions)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-12)


def test_dynamic_scaling_has_no_effect_within_the_models_context() -> None:
    plain, found = _rope({}), _scaled(DYNAMIC)
    for a, b in zip(found.tables(64), plain.tables(64), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(PrecastError) as caught:
        found.tables(65)
    assert str(caught.value) == (
        "--context: expected at most 64, found 65; beyond that, the frequencies of this model's RoPE would change"
        " with every token."
    )


@pytest.mark.parametrize(
    "keys", [{"partial_rotary_factor": 0.5}, {"rope_scaling": {"partial_rotary_factor": 0.5}}]
)
def test_a_part_of_the_head(keys: Mapping[str, Any]) -> None:
    _check(_rope(keys, partial=True), [1.0, 0.01])
    _check(_rope(keys, partial=True, head_dim=12), [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)])
    # Half of 10 is odd: the fifth dimension rotates with the sixth.
    _check(_rope(keys, partial=True, head_dim=10), [1.0, 10000**-0.4, 10000**-0.8])


def test_a_part_of_the_head_is_rounded_down() -> None:
    assert _rope({"partial_rotary_factor": 0.4}, partial=True, head_dim=96).pairs == 19
    assert _rope({"partial_rotary_factor": 0.75}, partial=True, head_dim=128).pairs == 48
    assert _rope({"partial_rotary_factor": 0.68}, partial=True, head_dim=10).pairs == 3
    assert _rope({"partial_rotary_factor": 1}, partial=True, head_dim=128).pairs == 64


def test_a_scaling_of_a_part_of_the_head() -> None:
    parameters = {**LONGROPE, "partial_rotary_factor": 0.5}
    rope = _rope({"rope_parameters": parameters}, partial=True)
    np.testing.assert_allclose(rope.frequencies, [1.0, 0.005], rtol=1e-6)
    _check(_rope({"rope_parameters": LINEAR, "partial_rotary_factor": 0.5}, partial=True), [0.5, 0.005])


# --- tables -------------------------------------------------------------------------------------------------


def test_tables() -> None:
    cos, sin = _rope({"rope_theta": 100.0}, head_dim=4).tables(3)
    angles = [[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]]
    assert (cos.shape, sin.shape, cos.dtype, sin.dtype) == ((3, 2), (3, 2), np.float32, np.float32)
    np.testing.assert_allclose(cos, np.cos(angles), rtol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=1e-6)


def test_a_magnitude_multiplies_both_tables() -> None:
    plain = _rope({})
    loud = Rope(frequencies=plain.frequencies, magnitude=1.25)
    for found, expected in zip(loud.tables(9), plain.tables(9), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, 1.25 * expected, rtol=1e-6)


def test_layers_without_rope_are_not_rotated() -> None:
    rope = no_rope(8)
    cos, sin = rope.tables(3)
    assert (rope.pairs, cos.dtype, sin.dtype) == (4, np.float32, np.float32)
    np.testing.assert_array_equal(cos, np.ones((3, 4)))
    np.testing.assert_array_equal(sin, np.zeros((3, 4)))


@pytest.mark.parametrize("rope", [no_rope(0), Rope(frequencies=np.zeros(0))])
def test_models_without_rope_have_empty_tables(rope: Rope) -> None:
    cos, sin = rope.tables(5)
    assert (rope.pairs, cos.shape, sin.shape) == (0, (5, 0), (5, 0))
    assert cos.dtype == sin.dtype == np.float32


def test_angles_at_large_positions() -> None:
    """The first pair's angles are whole numbers, which float32 represents exactly."""
    rope = _rope({"rope_theta": 500000.0}, head_dim=128)
    cos, sin = rope.tables(131072)
    places = np.arange(131072 - 64, 131072)
    np.testing.assert_allclose(cos[places, 0], np.cos(places.astype(float)), rtol=0, atol=2e-7)
    np.testing.assert_allclose(sin[places, 0], np.sin(places.astype(float)), rtol=0, atol=2e-7)
    # Other angles are rounded to float32, whose spacing here is at most 1 / 128.
    angles = places[:, None] * rope.frequencies.astype(float)
    np.testing.assert_allclose(cos[places], np.cos(angles), rtol=0, atol=1 / 256 + 1e-6)


@settings(deadline=None, max_examples=30)
@given(theta=st.floats(2.0, 1e8), half=st.integers(1, 128), context=st.integers(1, 70))
def test_tables_rotate_by_position(theta: float, half: int, context: int) -> None:
    rope = _rope({"rope_theta": theta}, head_dim=2 * half)
    cos, sin = (table.astype(np.float64) for table in rope.tables(context))
    assert cos.shape == sin.shape == (context, half)
    np.testing.assert_allclose(cos**2 + sin**2, 1.0, rtol=0, atol=1e-6)
    rotated = (cos + 1j * sin)[:-1] * np.exp(1j * rope.frequencies.astype(np.float64))
    np.testing.assert_allclose((cos + 1j * sin)[1:], rotated, rtol=0, atol=1e-5)
    assert (np.diff(rope.frequencies) < 0).all()
    assert rope.frequencies[0] == 1.0


# --- spellings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3, YARN, DYNAMIC, {**LONGROPE, "factor": 3.0}])
def test_both_spellings_mean_the_same(scaling: Mapping[str, Any]) -> None:
    named = {k: v for k, v in scaling.items() if k != "rope_type"}
    oldest = {"type": scaling["rope_type"], **named}
    spellings = (
        {"rope_theta": 100.0, "rope_scaling": scaling},
        {"rope_theta": 100.0, "rope_scaling": oldest},
        {"rope_theta": 100.0, "rope_scaling": {**scaling, **oldest}},
        {"rope_theta": 100.0, "rope_scaling": scaling, "rope_parameters": {"rope_theta": 100.0, **scaling}},
        {"rope_theta": 100.0, "rope_scaling": {**scaling, "attention_factor": None}, "rope_parameters": None},
        {"rope_parameters": {"rope_theta": 100.0, **scaling}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 100.0, **scaling}},
    )
    first, *others = (_rope(keys, head_dim=4) for keys in spellings)
    for context in (16, 64):
        for other in others:
            for found, expected in zip(other.tables(context), first.tables(context), strict=True):
                np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(first.frequencies, _rope({"rope_scaling": scaling}, head_dim=4).frequencies)


def test_each_spelling_may_omit_keys_of_the_other() -> None:
    newer = {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}
    older = {"rope_type": "yarn", "original_max_position_embeddings": 1024, "factor": 4.0}
    keys = {"partial_rotary_factor": 0.5, "rope_parameters": newer, "rope_scaling": older}
    found = _rope(keys, partial=True)
    # With 4 dimensions the second pair has frequency 0.01 and lies in the middle of the range 0 to 2.
    _check(found, [1.0, 0.01 * (1 - 0.75 / 2)], USUAL)


@pytest.mark.parametrize("scaling", [{**LLAMA3, "original_max_position_embeddings": 32}, YARN, LONGROPE])
def test_the_original_context_may_be_at_the_top_level(scaling: Mapping[str, Any]) -> None:
    key = "original_max_position_embeddings"
    inside = _scaled(scaling, head_dim=4)
    above = {"rope_scaling": {k: v for k, v in scaling.items() if k != key}, key: scaling[key]}
    both = {"rope_scaling": scaling, key: scaling[key]}
    for found in (
        _rope(above, head_dim=4),
        _rope(both, head_dim=4),
        _rope({**above, key: None}, head_dim=4, original_positions=scaling[key]),
        _rope(above, head_dim=4, original_positions=4096),
    ):
        np.testing.assert_array_equal(found.frequencies, inside.frequencies)
        assert (found.max_context, found.magnitude) == (inside.max_context, inside.magnitude)


def test_an_original_context_without_an_effect() -> None:
    """The key is accepted with every RoPE type if the model's config class has it; otherwise, it is refused."""
    key = "original_max_position_embeddings"
    _check(_rope({key: 4096}, original_positions=4096), [1.0, 0.1, 0.01, 0.001])
    _check(_rope({}, original_positions=4096), [1.0, 0.1, 0.01, 0.001])
    for keys in ({key: 4096}, {key: 4096, "rope_scaling": LINEAR}, {key: 64, "rope_scaling": DYNAMIC}):
        assert f"config.json: '{key}' may change" in _refusal(keys)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_rope_types_under_a_models_own_names(name: str) -> None:
    found = _scaled({**LONGROPE, "rope_type": name}, head_dim=4, types=PHI3_TYPES)
    expected = _scaled(LONGROPE, head_dim=4)
    np.testing.assert_array_equal(found.frequencies, expected.frequencies)
    assert (found.max_context, found.magnitude) == (expected.max_context, expected.magnitude)
    assert "expected the RoPE type to be one of default, longrope, su, yarn, found 'linear'." in _refusal(
        {"rope_scaling": LINEAR}, types=PHI3_TYPES
    )


# --- layer types, each with its own -------------------------------------------------------------------------

THETAS = {"full_attention": 1e6, "sliding_attention": 1e4}


def _layered(keys: Mapping[str, Any], head_dim: int = 4, max_positions: int = 64) -> dict[str, Rope]:
    reader = ConfigReader(keys, "config.json")
    ropes = read_rope_by_layer_type(reader, head_dim, max_positions, default_thetas=THETAS)
    reader.finish()
    return ropes


@pytest.mark.parametrize(
    ("keys", "full", "sliding"),
    [
        ({}, [1.0, 0.001], [1.0, 0.01]),
        ({"rope_theta": 100.0}, [1.0, 0.1], [1.0, 0.01]),
        ({"rope_local_base_freq": 100.0}, [1.0, 0.001], [1.0, 0.1]),
        ({"rope_theta": 1e4, "rope_scaling": LINEAR}, [0.5, 0.005], [1.0, 0.01]),
        ({"rope_scaling": {**LINEAR, "rope_theta": 1e4}}, [0.5, 0.005], [1.0, 0.01]),
        ({"rope_parameters": None, "rope_scaling": None}, [1.0, 0.001], [1.0, 0.01]),
        ({"rope_parameters": {"chunked_attention": None}}, [1.0, 0.001], [1.0, 0.01]),
        ({"rope_parameters": {"full_attention": LINEAR}}, [0.5, 0.0005], [1.0, 0.01]),
        (
            {"rope_parameters": {"full_attention": None, "sliding_attention": {**LINEAR, "rope_theta": 100}}},
            [1.0, 0.001],
            [0.5, 0.05],
        ),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                }
            },
            [1 / 8, 0.01 / 8],
            [1.0, 0.1],
        ),
        # A table's own base takes precedence over the one outside.
        (
            {
                "rope_theta": 7.0,
                "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
            },
            [1.0, 0.01],
            [1.0, 0.01],
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": LINEAR, "rope_parameters": {"full_attention": LINEAR}},
            [0.5, 0.005],
            [1.0, 0.01],
        ),
    ],
)
def test_layer_types(keys: Mapping[str, Any], full: list[float], sliding: list[float]) -> None:
    found = _layered(keys)
    assert list(found) == ["full_attention", "sliding_attention"]
    _check(found["full_attention"], full)
    _check(found["sliding_attention"], sliding)
