"""Settings by module: GPTQ's dynamic, AutoRound's extra_config, and the targets of compressed-tensors."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from quantised_checkpoints import fp8, gptq, packed

from precast.exporter.sources.huggingface.quantisation import Settings, quantisation_of
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"}
CT = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
LAYER = "model.layers.0"
UP = f"{LAYER}.mlp.up_proj"
EXCLUDED = (
    f"{UP}: quantization_config excludes this module, but its weight is quantised; export the original checkpoint in"
    " bfloat16, float16 or float32."
)
Stored = Mapping[str, np.ndarray]


def rng() -> np.random.Generator:
    return np.random.default_rng(13)


def opened(checkpoint, quantization: Mapping[str, Any], modules: Mapping[str, Stored]):
    config = {"model_type": "llama", "quantization_config": quantization}
    tensors = {f"{name}.{end}": array for name, stored in modules.items() for end, array in stored.items()}
    return open_source(str(checkpoint({"config.json": config}, tensors)))


# The rules in the documentation of GPTQModel.
DOCUMENTED = {
    r"+:.*\.18\..*gate.*": {"bits": 4, "group_size": 64},
    r".*\.19\..*gate.*": {"bits": 8, "group_size": 64},
    r"-:.*\.20\..*gate.*": {},
    r"-:.*down.*": {},
}


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("model.layers.18.mlp.gate_proj", Settings(bits=4, group=64)),
        ("model.layers.19.mlp.gate_proj", Settings(bits=8, group=64)),
        ("model.layers.20.mlp.gate_proj", None),
        ("model.layers.19.mlp.down_proj", None),
        ("model.layers.20.mlp.up_proj", Settings(bits=4, group=32)),
    ],
)
def test_the_documented_rules_of_gptqmodel(module: str, settings: Settings | None) -> None:
    quantisation = quantisation_of("gptq", GPTQ | {"dynamic": DOCUMENTED})
    assert quantisation is not None
    assert quantisation.settings_of(module) == settings


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        (GPTQ | {"dynamic": {"+:.*up_proj": {"bits": 2}}}, 2),
        (GPTQ | {"dynamic": {r"model\.layers\.0\.": {"bits": 2}}}, 2),
        (GPTQ | {"dynamic": {".*up_proj": {"bits": 2}, "+:.*mlp.*": {"bits": 8}}}, 2),
        (GPTQ | {"dynamic": {"+:.*mlp.*": {"bits": 8}, ".*up_proj": {"bits": 2}}}, 8),
        (GPTQ | {"dynamic": {"+:.*mlp.*": {"sym": True}, ".*up_proj": {"bits": 2}}}, 4),
        (GPTQ | {"dynamic": {"+:up_proj": {"bits": 2}, "-:up_proj": {}}}, 4),
        (GPTQ | {"dynamic": {"+:.*up_proj": {"bits": 2}, "-:.*": {}}}, 2),
        (GPTQ | {"bits": 2, "dynamic": {"+:.*down_proj": {"bits": 4}}}, 2),
        (ROUND | {"extra_config": {UP: {"bits": 2}}}, 2),
        (ROUND | {"extra_config": {"up_proj": {"bits": 2}}}, 4),
        (ROUND | {"extra_config": {"up_proj$": {"bits": 8, "data_type": None}}}, 8),
        (ROUND | {"extra_config": {".*mlp.*": {"bits": 8}, UP: {"bits": 2}}}, 2),
        (ROUND | {"extra_config": {".*up_proj": {}, ".*mlp.*": {"bits": 8}}}, 8),
    ],
)
def test_the_first_matching_rule_gives_the_bits(checkpoint, quantization, bits: int) -> None:
    """The zero points of 8 outputs take one word, with 2 bits and with 4."""
    stored, expected = gptq(rng(), 8, 128, 4, bits)
    source = opened(checkpoint, quantization, {UP: stored})
    np.testing.assert_array_equal(source.tensors[f"{UP}.weight"].read(), expected.astype(np.float32))


@pytest.mark.parametrize(
    "quantization",
    [
        GPTQ | {"dynamic": {"-:.*mlp.*": {}, "+:.*up_proj": {"bits": 4}}},
        ROUND | {"extra_config": {UP: {"bits": 16, "data_type": "float"}}},
    ],
)
def test_quantised_weights_of_excluded_modules_are_refused(checkpoint, quantization) -> None:
    with pytest.raises(PrecastError) as raised:
        opened(checkpoint, quantization, {UP: gptq(rng(), 8, 128, 4, 4)[0]})
    assert str(raised.value) == EXCLUDED


def test_bits_that_the_tensors_contradict_are_refused(checkpoint) -> None:
    with pytest.raises(PrecastError) as raised:
        opened(checkpoint, GPTQ, {UP: gptq(rng(), 32, 128, 4, 2)[0]})
    assert str(raised.value) == (
        f"{UP}: expected scales [groups, 32] and qzeros [groups, 4] for 4 bits, found [4, 32] and [4, 2]; fetch the"
        " checkpoint again."
    )


def scheme(targets: list[str] | None, **weights: object) -> dict[str, object]:
    return {"weights": weights} | ({} if targets is None else {"targets": targets})


FLOAT = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}
INT = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64}


@pytest.mark.parametrize(
    "targets",
    [
        (["re:.*self_attn.*"], ["re:.*mlp.*"]),
        (["Linear"], ["re:.*mlp.*"]),
        (["re:.*self_attn.*"], ["Linear"]),
        (["Linear"], [UP]),
        (["Linear"], ["Linear"]),
        (None, None),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_fp8_blocks_beside_grouped_integers(checkpoint, targets, reverse: bool) -> None:
    """160 inputs are two groups of 64 and one of 32."""
    groups = [scheme(targets[0], **FLOAT), scheme(targets[1], **INT)]
    config = CT | {"config_groups": dict(enumerate(reversed(groups) if reverse else groups))}
    blocks, floats = fp8(rng(), 40, 160, (16, 32), "weight_scale")
    numbers = rng().integers(-127, 128, (24, 160)).astype(np.int8)
    scale = rng().uniform(0.5, 2, (24, 3)).astype(ml_dtypes.bfloat16)
    q = f"{LAYER}.self_attn.q_proj"
    source = opened(checkpoint, config, {q: blocks, UP: {"weight": numbers, "weight_scale": scale}})
    np.testing.assert_array_equal(source.tensors[f"{q}.weight"].read(), floats.astype(np.float32))
    integers = numbers * scale.astype(np.float32)[:, np.arange(160) // 64]
    np.testing.assert_array_equal(source.tensors[f"{UP}.weight"].read(), integers)
    assert source.tensors[f"{UP}.weight"].block_format == "q8_0"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (64, None),
        (32, "expected scales for groups of 32 inputs, found 2 groups for 96 inputs"),
    ],
)
def test_packed_groups_have_the_stated_size(checkpoint, size: int, text: str | None) -> None:
    """Without the stated size, two groups of 96 inputs would have 48 each."""
    stored, expected = packed(rng(), 24, 96, 2, 4, symmetric=True, size=64)
    config = CT | {"config_groups": {"group_0": scheme(["Linear"], num_bits=4, type="int", group_size=size)}}
    if text is None:
        found = opened(checkpoint, config, {UP: stored}).tensors[f"{UP}.weight"].read()
        np.testing.assert_array_equal(found, expected.astype(np.float32))
        return
    with pytest.raises(PrecastError) as raised:
        opened(checkpoint, config, {UP: stored})
    assert str(raised.value) == f"{UP}: {text}; fetch the checkpoint again."


def test_packed_bits_are_those_of_the_target(checkpoint) -> None:
    """One word contains 13 numbers of 1 bit, and would contain 13 of 2 bits."""
    stored, expected = packed(rng(), 24, 13, 1, 1, symmetric=True)
    groups = {
        "group_0": scheme(["Linear"], num_bits=2, type="int"),
        "group_1": scheme(["re:.*up_proj$"], num_bits=1, type="int"),
    }
    found = opened(checkpoint, CT | {"config_groups": groups}, {UP: stored}).tensors[f"{UP}.weight"].read()
    np.testing.assert_array_equal(found, expected.astype(np.float32))


PATTERNS = ("re:.*up.*", "re:.*mlp.*")


@pytest.mark.parametrize("order", [PATTERNS, PATTERNS[::-1]])
@pytest.mark.parametrize(
    "wrong", [{"num_bits": 8, "group_size": 32}, {"num_bits": 4, "group_size": 64}, {"num_bits": 2}]
)
def test_packed_integers_follow_the_matching_target_that_fits(checkpoint, order, wrong) -> None:
    stored, expected = packed(rng(), 24, 96, 3, 4, symmetric=True)
    right = {"num_bits": 4, "group_size": 32}
    groups = {
        f"group_{n}": scheme([target], type="int", **(wrong if target == PATTERNS[0] else right))
        for n, target in enumerate(order)
    }
    found = opened(checkpoint, CT | {"config_groups": groups}, {UP: stored}).tensors[f"{UP}.weight"].read()
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_blocks_follow_the_matching_target_that_fits(checkpoint) -> None:
    stored, expected = fp8(rng(), 40, 160, (16, 32), "weight_scale")
    groups = {
        "a": scheme(["re:.*up.*"], **FLOAT | {"block_structure": [32, 32]}),
        "b": scheme(["re:.*mlp.*"], **FLOAT),
    }
    found = opened(checkpoint, CT | {"config_groups": groups}, {UP: stored}).tensors[f"{UP}.weight"].read()
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_the_first_matching_target_is_in_the_message_if_none_fits(checkpoint) -> None:
    groups = {str(bits): scheme(["re:.*up.*"], num_bits=bits, type="int") for bits in (8, 2)}
    with pytest.raises(PrecastError) as raised:
        opened(
            checkpoint, CT | {"config_groups": groups}, {UP: packed(rng(), 24, 96, 3, 4, symmetric=True)[0]}
        )
    assert str(raised.value) == (
        f"{UP}: weight_packed [24, 12] cannot store a weight of shape [24, 96] in 8 bits; fetch the checkpoint again."
    )


@pytest.mark.parametrize(
    ("module", "group"),
    [("model.embed_tokens", 16), ("lm_head", 32), (UP, 64), (f"{LAYER}.mlp.down_proj", 128)],
)
def test_names_come_before_patterns_and_classes(module: str, group: int) -> None:
    groups = {
        "a": scheme(["Linear"], group_size=128),
        "b": scheme(["Embedding"], group_size=16),
        "c": scheme([r"re:.*up_proj", "re:.*head"], group_size=64),
        "d": scheme(["lm_head"], group_size=32),
    }
    quantisation = quantisation_of("compressed-tensors", CT | {"config_groups": groups})
    assert quantisation is not None
    assert quantisation.settings_of(module) == Settings(group=group, block=(1, group))
