"""Variants of quantised checkpoints: other packings, settings by module, and modules that are not quantised."""

from typing import Any

import numpy as np
import pytest
from quantised_checkpoints import awq, fp8, gptq, nf4, packed

from precast.exporter.models.tensors import split_rows
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

BASE = "model.layers.0.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
BNB: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def unordered(case: tuple[dict, np.ndarray]) -> tuple[dict, np.ndarray]:
    """Return a case of compressed-tensors with the index that the library writes if it has determined no order."""
    stored, expected = case
    return {**stored, "weight_g_idx": np.full(expected.shape[1], -1, np.int32)}, expected


def without_index(case: tuple[dict, np.ndarray]) -> tuple[dict, np.ndarray]:
    """Return a case of GPTQ without the index, as AutoRound writes it."""
    return {name: array for name, array in case[0].items() if name != "g_idx"}, case[1]


INT8 = rng().integers(-127, 128, (24, 40)).astype(np.int8)
LARGEST = rng().uniform(0.1, 2, 24).astype(np.float32)
SCALED = INT8 * (LARGEST * np.float32(1 / 127)).astype(np.float64)[:, None]
CASES = {
    "gptq: other bits in some modules": (
        GPTQ | {"dynamic": {"+:.*up_proj": {"bits": 8, "group_size": 64}}},
        gptq(rng(), 24, 128, 2, 8),
    ),
    # Four groups of 32 inputs, the last one shorter; the shapes alone suggest groups of 30.
    "auto-round: a short last group beside other modules": (
        ROUND | {"packing_format": "auto_round:auto_gptq", "extra_config": {"lm_head": {"bits": 16}}},
        without_index(gptq(rng(), 24, 120, 4, 4, size=32)),
    ),
    "gptq: 8 bits in the order of activations": (
        GPTQ | {"bits": 8, "desc_act": True, "group_size": 16},
        gptq(rng(), 24, 64, 4, 8, order=True),
    ),
    "auto-round: auto_gptq": (ROUND | {"packing_format": "auto_round:auto_gptq"}, gptq(rng(), 24, 64, 2, 4)),
    "auto-round: its own": (ROUND | {"packing_format": "auto_round"}, gptq(rng(), 24, 64, 2, 4, offset=0)),
    "auto-round: gptqmodel": (
        ROUND | {"packing_format": "auto_round:gptqmodel"},
        gptq(rng(), 24, 64, 2, 4, offset=0),
    ),
    "auto-round: auto_awq": (ROUND | {"packing_format": "auto_round:auto_awq"}, awq(rng(), 24, 64, 2)),
    "awq: stated as symmetric": (
        {"quant_method": "awq", "bits": 4, "zero_point": False},
        awq(rng(), 24, 64, 2),
    ),
    "compressed-tensors: asymmetric by channels": (CT, packed(rng(), 24, 64, 1, 4, symmetric=False)),
    "compressed-tensors: no order determined": (CT, unordered(packed(rng(), 24, 64, 2, 4, symmetric=True))),
    "fp8: static, one scale": (FP8, fp8(rng(), 24, 40, None, "weight_scale")),
    "fp8: blocks that the config does not state": (FP8, fp8(rng(), 150, 300, (128, 128))),
    "bitsandbytes: nf4": (BNB, nf4(rng(), 24, 40)),
    "bitsandbytes: nf4, an odd number of weights": (BNB, nf4(rng(), 5, 13)),
    "bitsandbytes: nf4, double quantisation": (BNB, nf4(rng(), 150, 300, nested=True)),
    "bitsandbytes: fp4": (BNB | {"bnb_4bit_quant_type": "fp4"}, nf4(rng(), 24, 40, kind="fp4")),
    "bitsandbytes: 8 bits": (
        {"load_in_8bit": True},
        ({"weight": INT8, "SCB": LARGEST, "weight_format": np.zeros((), np.uint8)}, SCALED),
    ),
}


def opened(checkpoint, quantization, stored, **plain: np.ndarray):
    """Open a checkpoint with one quantised weight, and with plain tensors beside it."""
    config = {"model_type": "llama", "quantization_config": quantization}
    tensors = {f"{BASE}.{name}": array for name, array in stored.items()} | plain
    return open_source(str(checkpoint({"config.json": config}, tensors)))


@pytest.mark.parametrize(("quantization", "case"), CASES.values(), ids=CASES)
def test_variants_are_dequantised(checkpoint, decode_blocks, quantization, case) -> None:
    stored, expected = case
    source = opened(checkpoint, quantization, {**stored, "input_scale": np.ones(1, np.float32)})
    tensor = source.tensors[f"{BASE}.weight"]
    assert source.tensors.keys() == {f"{BASE}.weight"}
    assert tensor.shape == expected.shape
    np.testing.assert_array_equal(tensor.read(), expected.astype(np.float32))
    if tensor.blocks is not None:
        np.testing.assert_array_equal(decode_blocks(tensor.blocks()), tensor.read())


@pytest.mark.parametrize(
    ("quantization", "case"),
    [
        (CT | {"ignore": ["lm_head", r"re:.*self_attn\..*"]}, packed(rng(), 24, 64, 2, 4, symmetric=True)),
        (BNB | {"llm_int8_skip_modules": ["lm_head"]}, nf4(rng(), 24, 40)),
        (FP8 | {"modules_to_not_convert": ["lm_head"]}, fp8(rng(), 24, 40, None)),
        (GPTQ | {"dynamic": {"-:lm_head": {}}}, gptq(rng(), 24, 64, 2, 4)),
    ],
    ids=["compressed-tensors", "bitsandbytes", "fp8", "gptq"],
)
def test_modules_that_are_not_quantised_keep_their_values(checkpoint, quantization, case) -> None:
    """The names of the tensors show which modules are quantised, so patterns in the config need no reading."""
    head = np.arange(12, dtype=np.float16).reshape(3, 4)
    source = opened(checkpoint, quantization, case[0], **{"lm_head.weight": head})
    assert source.tensors["lm_head.weight"].dtype == "float16"
    np.testing.assert_array_equal(source.tensors["lm_head.weight"].read(), head)
    np.testing.assert_array_equal(source.tensors[f"{BASE}.weight"].read(), case[1].astype(np.float32))


def test_fused_projections_in_blocks_are_split(checkpoint, decode_blocks) -> None:
    """The parts of a fused weight begin and end within blocks of scales."""
    stored, expected = fp8(rng(), 150, 300, (128, 128))
    tensor = opened(checkpoint, FP8, stored).tensors[f"{BASE}.weight"]
    parts = split_rows(tensor, {"q": 100, "k": 25, "v": 25})
    start = 0
    for rows, part in zip((100, 25, 25), parts.values(), strict=True):
        assert part.block_format == "e4m3"
        own = expected[start : start + rows].astype(np.float32)
        np.testing.assert_array_equal(part.read(), own)
        np.testing.assert_array_equal(decode_blocks(part.blocks()), own)
        start += rows


STORED, _ = nf4(rng(), 24, 40)
NESTED, _ = nf4(rng(), 24, 40, nested=True)
STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("quantization", "stored", "text"),
    [
        (BNB, STORED | {"weight.absmax": np.ones(14, np.float32)}, "expected 480 bytes in blocks of 64 weights, found"),
        (BNB, STORED | {"weight": np.ones((479, 1), np.uint8)}, "found 479 bytes and 15 blocks"),
        (BNB, {k: v for k, v in STORED.items() if k != STATE}, "expected quant_state to contain the shape"),
        (BNB, STORED | {STATE: np.frombuffer(b"{", np.uint8)}, "expected quant_state to contain the shape"),
        (BNB, STORED | {"weight": np.ones((480, 1), np.float16)}, "to be U8, found F16 [480, 1]"),
        (BNB, NESTED | {"weight.nested_absmax": np.ones(2, np.float32)}, "expected nested_absmax, nested_blocksize"),
        (BNB, {"weight": INT8, "SCB": LARGEST[1:]}, "expected SCB [24] and rows in order, found [23]"),
        (BNB, {"weight": INT8, "SCB": LARGEST, "weight_format": np.ones((), np.uint8)}, "rows in order"),
        (FP8, fp8(rng(), 256, 256, (64, 64))[0], "with a scale for each row or block of [256, 256], found [4, 4]"),
    ],
)  # fmt: skip
def test_broken_variants_are_refused(checkpoint, quantization, stored, text) -> None:
    with pytest.raises(PrecastError) as raised:
        opened(checkpoint, quantization, stored)
    assert text in str(raised.value)
    assert str(raised.value).endswith("; fetch the checkpoint again.")


@pytest.mark.parametrize("nested", [False, True])
def test_the_library_s_own_nf4(checkpoint, nested: bool) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(3))
    numbers, state = library.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    stored = {f"weight.{name}": array.numpy() for name, array in state.as_dict(packed=True).items()}
    found = opened(checkpoint, BNB, {"weight": numbers.numpy(), **stored}).tensors[f"{BASE}.weight"].read()
    np.testing.assert_array_equal(found, library.dequantize_4bit(numbers, state).numpy())
