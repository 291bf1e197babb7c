"""RoPE tables compared with those of transformers, where torch is installed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.exporter.models.config import ConfigReader
from precast.exporter.models.rope import Rope, read_rope, read_rope_by_layer_type

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PHI3_TYPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def _rope(keys: Mapping[str, Any], head_dim: int = 8, max_positions: int = 64, **options: Any) -> Rope:
    """Read a config of RoPE keys only, all of which must be taken."""
    reader = ConfigReader(keys, "config.json")
    rope = read_rope(reader, head_dim, max_positions, **options)
    reader.finish()
    return rope


THETAS = {"full_attention": 1e6, "sliding_attention": 1e4}


def _layered(keys: Mapping[str, Any], head_dim: int = 4, max_positions: int = 64) -> dict[str, Rope]:
    reader = ConfigReader(keys, "config.json")
    ropes = read_rope_by_layer_type(reader, head_dim, max_positions, default_thetas=THETAS)
    reader.finish()
    return ropes


POSITIONS = 48


def _divisors(head_dim: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(head_dim)
    return {
        "short_factor": (1 + rng.random(head_dim // 2)).tolist(),
        "long_factor": (1 + 40 * rng.random(head_dim // 2)).tolist(),
    }


def _published(head_dim: int) -> dict[str, dict[str, Any]]:
    """Return RoPE scalings for models that were trained with POSITIONS and have a context of 2 · POSITIONS."""
    original = {"original_max_position_embeddings": POSITIONS}
    long = {"rope_type": "longrope", **_divisors(head_dim)}
    return {
        "default": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 4.0},
        "linear by 3": {"rope_type": "linear", "factor": 3},
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "llama3": {**LLAMA3, **original},
        "llama3 by 32": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
        "yarn": {"rope_type": "yarn", "factor": 2.0, **original},
        "yarn of all": {"rope_type": "yarn", "factor": 2.5},
        "yarn, long": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
        "yarn, betas": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4, "beta_slow": 0.25, **original},
        "yarn, fractions": {"rope_type": "yarn", "factor": 40.0, "truncate": False, **original},
        "yarn, two scales": {
            "rope_type": "yarn",
            "factor": 40,
            "mscale": 0.9,
            "mscale_all_dim": 0.7,
            **original,
        },
        "yarn, one scale": {"rope_type": "yarn", "factor": 40, "mscale": 0.9, **original},
        "yarn, magnitude": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, **original},
        "longrope": {**long, **original},
        "longrope, factor": {**long, **original, "factor": 32.0},
        "longrope, magnitude": {**long, **original, "attention_factor": 1.2},
        "longrope of all": long,
    }


def _spelt(how: str, theta: float, scaling: Mapping[str, Any]) -> dict[str, Any]:
    if how == "newer":
        return {"rope_parameters": {**scaling, "rope_theta": theta}}
    return {"rope_theta": theta, "rope_scaling": None if scaling["rope_type"] == "default" else dict(scaling)}


@pytest.mark.parametrize(
    ("head_dim", "theta", "how"),
    [(6, 10000.0, "newer"), (12, 500000.0, "older"), (64, 1000000, "newer"), (128, 10000, "older")],
)
@pytest.mark.parametrize("name", _published(2))
def test_tables_are_those_of_transformers(
    torch: Any, name: str, head_dim: int, theta: float, how: str
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    keys = _spelt(how, theta, _published(head_dim)[name])
    rope = _rope(keys, head_dim=head_dim, max_positions=2 * POSITIONS)
    config = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=2 * POSITIONS,
        **_spelt(how, theta, _published(head_dim)[name]),
    )
    reference = LlamaRotaryEmbedding(config)
    for context in (POSITIONS, POSITIONS + 1, 2 * POSITIONS):
        cos, sin = reference(torch.zeros(1), torch.arange(context)[None])
        # The libraries' powers, and therefore the ends of interpolation ranges, differ in the last bit.
        np.testing.assert_allclose(rope.at_context(context), reference.inv_freq.numpy(), rtol=1e-6)
        for found, expected in zip(rope.tables(context), (cos, sin), strict=True):
            np.testing.assert_allclose(found, expected[0, :, : head_dim // 2].numpy(), rtol=0, atol=3e-5)
    assert rope.magnitude == pytest.approx(reference.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", _published(2))
def test_configs_that_transformers_saves_have_the_same_meaning(torch: Any, name: str) -> None:
    """transformers fills in the missing keys of a config."""
    from transformers import LlamaConfig

    scaling = _published(12)[name]
    saved = LlamaConfig(
        head_dim=12, max_position_embeddings=2 * POSITIONS, **_spelt("older", 1e6, scaling)
    ).to_dict()
    assert "rope_scaling" not in saved
    again = _rope({"rope_parameters": saved["rope_parameters"]}, head_dim=12, max_positions=2 * POSITIONS)
    once = _rope(_spelt("older", 1e6, scaling), head_dim=12, max_positions=2 * POSITIONS)
    for context in (POSITIONS, 2 * POSITIONS):
        for found, expected in zip(again.tables(context), once.tables(context), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_dynamic_frequencies_of_transformers_depend_on_the_length(torch: Any) -> None:
    """Every factor, even 1, is refused beyond the model's own context length."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 1e4}
    reference = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=8, rope_parameters=scaling, max_position_embeddings=64)
    )
    found = []
    for length in (64, 65, 66):
        reference(torch.zeros(1), torch.arange(length)[None])
        found.append(float(reference.inv_freq[-1]))
    assert found[0] == pytest.approx(0.001)
    assert found[0] > found[1] > found[2]


def test_far_angles_are_rounded_as_in_transformers(torch: Any) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e6,
        "original_max_position_embeddings": 32768,
    }
    reference = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=32, rope_parameters=scaling, max_position_embeddings=131072)
    )
    rope = Rope(frequencies=reference.inv_freq.numpy(), magnitude=reference.attention_scaling)
    places = np.arange(131072 - 256, 131072)
    tables = reference(torch.zeros(1), torch.as_tensor(places)[None])
    for found, expected in zip(rope.tables(131072), tables, strict=True):
        np.testing.assert_allclose(found[places], expected[0, :, :16].numpy(), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    theta=st.floats(10.0, 1e7),
    factor=st.floats(0.5, 64.0),
    half=st.integers(1, 64),
    original=st.integers(2, 65536),
    slow=st.floats(0.125, 8.0),
    wider=st.floats(1.0, 64.0),
    whole=st.booleans(),
)
def test_yarn_with_any_parameters_equals_transformers(
    torch: Any, theta: float, factor: float, half: int, original: int, slow: float, wider: float, whole: bool
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "yarn", "factor": factor, "rope_theta": theta, "truncate": whole}
    parameters |= {"beta_slow": slow, "beta_fast": slow * wider, "original_max_position_embeddings": original}
    config = LlamaConfig(
        head_dim=2 * half, rope_parameters=dict(parameters), max_position_embeddings=4 * original
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    found = _rope({"rope_parameters": parameters}, head_dim=2 * half, max_positions=4 * original)
    np.testing.assert_allclose(found.frequencies, expected.numpy(), rtol=1e-5)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize("name", ["longrope", "su", "yarn", ""])
@pytest.mark.parametrize(("heads", "part"), [(4, 1.0), (2, 0.75), (4, 0.5), (2, 0.4)])
def test_phi3_is_that_of_transformers(torch: Any, name: str, heads: int, part: float) -> None:
    """Partial rotation, the original context length at the top level, and older names."""
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    head_dim = 96 // heads
    rotated = int(head_dim * part)
    if name and rotated % 2:
        pytest.skip("transformers checks for one divisor less than it takes")
    original = {"original_max_position_embeddings": POSITIONS}

    def keys(**more: int) -> dict[str, Any]:
        scaling = {"type": name, **_divisors(rotated), **more} if name else None
        return {"rope_theta": 1e4, "partial_rotary_factor": part, "rope_scaling": scaling, **original}

    # For "su", transformers 5 does not move it there, although older versions did.
    config = Phi3Config(
        hidden_size=96,
        num_attention_heads=heads,
        max_position_embeddings=2 * POSITIONS,
        **keys(**(original if name == "su" else {})),
    )
    reference = Phi3RotaryEmbedding(config)
    options: dict[str, Any] = {"partial": True, "original_positions": 4096, "types": PHI3_TYPES}
    rope = _rope(keys(), head_dim, 2 * POSITIONS, **options)
    assert rope.pairs == len(reference.inv_freq)
    for context in (POSITIONS, POSITIONS + 1):
        tables = reference(torch.zeros(1), torch.arange(context)[None])
        for found, expected in zip(rope.tables(context), tables, strict=True):
            np.testing.assert_allclose(found, expected[0, :, : rope.pairs].numpy(), rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn", "longrope"])
@pytest.mark.parametrize("how", ["newer", "older"])
def test_layer_types_are_those_of_transformers(torch: Any, name: str, how: str) -> None:
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    def keys() -> dict[str, Any]:
        full = _published(12)[name]
        if how == "older":
            return {"rope_theta": 1e5, "rope_local_base_freq": 2e4, "rope_scaling": full}
        sliding = {"rope_type": "default", "rope_theta": 2e4}
        return {
            "rope_parameters": {"full_attention": {**full, "rope_theta": 1e5}, "sliding_attention": sliding}
        }

    config = Gemma3TextConfig(
        head_dim=12, max_position_embeddings=2 * POSITIONS, num_hidden_layers=6, **keys()
    )
    reference = Gemma3RotaryEmbedding(config)
    ropes = _layered(keys(), head_dim=12, max_positions=2 * POSITIONS)
    for kind, rope in ropes.items():
        for context in (POSITIONS, POSITIONS + 1):
            tables = reference(torch.zeros(1), torch.arange(context)[None], layer_type=kind)
            for found, expected in zip(rope.tables(context), tables, strict=True):
                np.testing.assert_allclose(found, expected[0, :, :6].numpy(), rtol=0, atol=3e-5)
