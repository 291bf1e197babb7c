"""Quantised checkpoints in safetensors: GPTQ, AWQ, FP8 and compressed-tensors.

The tests pack the weights number by number, as the documents of the formats describe.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantised_checkpoints import FP8, awq, fp8, gptq, packed
from safetensors.numpy import load_file, save_file

from precast.exporter.export import export
from precast.exporter.options import ExportOptions
from precast.exporter.sources.huggingface.parts import RawTensor
from precast.exporter.sources.huggingface.quantisation import quantisation_of
from precast.exporter.sources.huggingface.quantised import dequantised
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

BASE = "model.layers.0.mlp.up_proj"


def opened(checkpoint, quantization: Mapping[str, Any] | None, stored: Mapping[str, np.ndarray]):
    config = {
        "model_type": "llama",
        **({} if quantization is None else {"quantization_config": quantization}),
    }
    tensors = {f"{BASE}.{name}": array for name, array in stored.items()}
    return open_source(str(checkpoint({"config.json": config}, tensors)))


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


GPTQ4, AWQ4 = {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "bits": 4}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
V2 = {"checkpoint_format": "gptq_v2"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 32]}
WIDE_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GROUPS = {"config_groups": {"group_0": {"weights": {"num_bits": 8, "block_structure": [16, 32]}}}}
CASES = {
    "gptq, 4 bits": (GPTQ4, gptq(rng(), 24, 64, 2, 4)),
    "gptq, 8 bits": ({**GPTQ4, "bits": 8}, gptq(rng(), 20, 64, 4, 8)),
    "gptq, 2 bits": ({**GPTQ4, "bits": 2}, gptq(rng(), 16, 64, 1, 2)),
    "gptq, in the order of activations": ({**GPTQ4, "desc_act": True}, gptq(rng(), 24, 64, 4, 4, order=True)),
    "gptq, version 2": (GPTQ4 | V2, gptq(rng(), 24, 64, 2, 4, offset=0)),
    "gptq, outputs that do not fill a word": (GPTQ4, gptq(rng(), 20, 64, 2, 4)),
    "awq": (AWQ4, awq(rng(), 24, 64, 2)),
    "awq, one group": ({**AWQ4, "version": "GEMM"}, awq(rng(), 16, 40, 1)),
    "compressed-tensors, 4 bits": (CT, packed(rng(), 24, 64, 2, 4, symmetric=True)),
    "compressed-tensors, zero points": (CT, packed(rng(), 20, 64, 2, 4, symmetric=False)),
    "compressed-tensors, 8 bits": (CT, packed(rng(), 24, 64, 1, 8, symmetric=True)),
    "compressed-tensors, part of a word": (CT, packed(rng(), 5, 13, 1, 4, symmetric=False)),
    "compressed-tensors, in the order of activations": (
        CT,
        packed(rng(), 24, 64, 4, 4, symmetric=True, order=True),
    ),
    "compressed-tensors, fp8 by rows": (CT, fp8(rng(), 24, 40, (1, 40), "weight_scale")),
    "compressed-tensors, fp8 in blocks": ({**CT, **GROUPS}, fp8(rng(), 40, 48, (16, 32), "weight_scale")),
    "fp8 in blocks": (BLOCKS, fp8(rng(), 40, 48, (16, 32))),
    "fp8 with one scale": ({"quant_method": "fp8"}, fp8(rng(), 24, 40, None)),
}


@pytest.mark.parametrize(("quantization", "case"), CASES.values(), ids=CASES)
def test_weights_are_dequantised(checkpoint, quantization, case) -> None:
    """float32 represents every product exactly, except products with float32 scales, which are rounded once."""
    stored, expected = case
    source = opened(checkpoint, quantization, {**stored, "input_scale": np.ones(1, np.float32)})
    assert source.tensors.keys() == {f"{BASE}.weight"}
    tensor = source.tensors[f"{BASE}.weight"]
    assert tensor.shape == expected.shape
    found = tensor.read()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert "quantization_config" not in source.config
    assert source.remarks[0] == f"the checkpoint's weights are quantised ({quantization['quant_method']})"


@pytest.mark.parametrize(("size", "reads"), [(48, True), (32, True), (64, False), (-1, True)])
def test_the_last_group_may_be_shorter(checkpoint, size: int, reads: bool) -> None:
    """Without an index, the config's group size determines the groups: 64 inputs may be 48 and 16, or 32 twice."""
    stored, _ = CASES["gptq, 4 bits"][1]
    plain = {name: array for name, array in stored.items() if name != "g_idx"}
    index = {"g_idx": (np.arange(64) // (size if size > 0 else 32)).astype(np.int32)}
    config = {**GPTQ4, "group_size": size}
    if not reads:
        with pytest.raises(PrecastError) as raised:
            opened(checkpoint, config, plain)
        assert str(raised.value) == (
            f"{BASE}: expected scales for groups of 64 inputs, found 2 groups for 64 inputs; fetch the checkpoint"
            " again."
        )
        return
    found = opened(checkpoint, config, plain).tensors[f"{BASE}.weight"].read()
    np.testing.assert_array_equal(found, read_raw(config, plain | index))


def read_raw(config: Mapping[str, Any], stored: Mapping[str, np.ndarray]) -> np.ndarray:
    """Decode the tensors of a GPTQ weight directly, without a checkpoint file."""
    types = {"int32": "I32", "float16": "F16"}
    raw = {
        f"w.{name}": RawTensor(where="", shape=a.shape, dtype=types[a.dtype.name], read=a.copy)
        for name, a in stored.items()
    }
    quantisation = quantisation_of("gptq", config)
    assert quantisation is not None
    return dequantised(raw, quantisation)["w.weight"].read()


def test_int8_with_a_zero_point(checkpoint) -> None:
    weight = rng().integers(-128, 128, (8, 12)).astype(np.int8)
    scale, zero = np.full((8, 1), 0.25, np.float16), np.arange(-4, 4, dtype=np.int8)[:, None]
    stored = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    found = (
        opened(checkpoint, {"quant_method": "compressed-tensors"}, stored).tensors[f"{BASE}.weight"].read()
    )
    np.testing.assert_array_equal(found, (weight.astype(np.float32) - zero) * np.float32(0.25))


def symmetric(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of GPTQ with 8 as every zero; GPTQ stores 7."""
    return {**stored, "qzeros": np.full_like(stored["qzeros"], 0x77777777)}


# 96 inputs in groups of 64 and 32: two groups of equal size would be of 48.
LAST_SHORTER = {name: array for name, array in gptq(rng(), 24, 96, 2, 4)[0].items() if name != "g_idx"}
MORE_GROUPS_THAN_INPUTS = {"scales": np.ones((66, 24), np.float16), "qzeros": np.ones((66, 3), np.int32)}
INT8 = {"weight": rng().integers(-128, 128, (40, 48)).astype(np.int8)}


@pytest.mark.parametrize(
    ("quantization", "stored", "kind"),
    [
        (GPTQ4, symmetric(CASES["gptq, 4 bits"][1][0]), "q4_0"),
        (CT, CASES["compressed-tensors, 4 bits"][1][0], "q4_0"),
        ({**GPTQ4, "bits": 2}, CASES["gptq, 2 bits"][1][0], "q4_0"),
        (GPTQ4, CASES["gptq, 4 bits"][1][0], "q5_0"),
        (GPTQ4 | V2, CASES["gptq, version 2"][1][0], "q5_0"),
        (
            GPTQ4 | {"group_size": 64},
            LAST_SHORTER | {"g_idx": (np.arange(96) // 64).astype(np.int32)},
            "q5_0",
        ),
        (GPTQ4, CASES["gptq, 4 bits"][1][0] | MORE_GROUPS_THAN_INPUTS, None),
        (GPTQ4 | {"group_size": 64}, LAST_SHORTER, "q5_0"),
        (AWQ4, CASES["awq"][1][0], "q5_0"),
        (AWQ4, CASES["awq, one group"][1][0], "q5_0"),
        (CT, CASES["compressed-tensors, zero points"][1][0], "q5_0"),
        (CT, CASES["compressed-tensors, part of a word"][1][0], "q5_0"),
        (CT, CASES["compressed-tensors, 8 bits"][1][0], "q8_0"),
        ({**GPTQ4, "bits": 8}, CASES["gptq, 8 bits"][1][0], None),
        (CT, INT8 | {"weight_scale": np.arange(1, 41, dtype=np.float16)[:, None]}, "q8_0"),
        (CT | GROUPS, INT8 | {"weight_scale": np.arange(1, 7, dtype=np.float16).reshape(3, 2)}, "q8_0"),
        (CT, INT8 | {"weight_scale": np.full((40, 1), 1e-9, np.float32)}, None),
        (CT, INT8 | {"weight_scale": np.ones((40, 3), np.float16)}, None),
        (CT, CASES["compressed-tensors, fp8 by rows"][1][0], "e4m3"),
        ({"quant_method": "fp8"}, CASES["fp8 with one scale"][1][0], "e4m3"),
        (WIDE_BLOCKS, fp8(rng(), 150, 300, (128, 128))[0], "e4m3"),
        (BLOCKS, CASES["fp8 in blocks"][1][0], None),
        (GPTQ4, symmetric(CASES["gptq, in the order of activations"][1][0]), None),
        (
            GPTQ4,
            symmetric(CASES["gptq, 4 bits"][1][0]) | {"scales": np.full((2, 24), 1e-9, np.float32)},
            None,
        ),
    ],
)
def test_numbers_that_a_block_format_represents_are_taken_over(
    checkpoint, decode_blocks, quantization, stored, kind
) -> None:
    tensor = opened(checkpoint, quantization, stored).tensors[f"{BASE}.weight"]
    assert tensor.block_format == kind
    assert (tensor.blocks is None) == (kind is None)
    if tensor.blocks is not None:
        blocks = tensor.blocks()
        assert blocks.format == kind
        np.testing.assert_array_equal(decode_blocks(blocks), tensor.read())


@pytest.mark.parametrize("exponent", [-9, -6, 0, 8, 127, -100])
def test_every_number_in_fp8(checkpoint, decode_blocks, exponent: int) -> None:
    """All finite numbers, with subnormals, and scales of any magnitude whose products are finite."""
    numbers = np.arange(256, dtype=np.uint8)
    numbers[numbers & 127 == 127] = 0
    weight = numbers.reshape(1, 256).repeat(17, 0).view(FP8)
    scale = (np.linspace(1, 2, 17) * 2.0 ** min(exponent, 118)).astype(np.float32)[:, None]
    tensor = opened(checkpoint, CT, {"weight": weight, "weight_scale": scale}).tensors[f"{BASE}.weight"]
    found = decode_blocks(tensor.blocks())
    np.testing.assert_array_equal(found, weight.astype(np.float32) * scale)
    np.testing.assert_array_equal(found, tensor.read())


def test_nan_in_fp8_is_refused(checkpoint) -> None:
    weight = np.zeros((16, 32), FP8)
    weight[3, 5] = np.nan
    stored = {"weight": weight, "weight_scale": np.ones((1, 1), np.float32)}
    tensor = opened(checkpoint, CT, stored).tensors[f"{BASE}.weight"]
    with pytest.raises(PrecastError) as raised:
        tensor.blocks()
    assert str(raised.value) == f"{BASE}: expected numbers in weight, found NaN; fetch the checkpoint again."


@pytest.mark.parametrize("sparsity", [{}, {"format": "dense"}])
def test_dense_weights_and_scales_of_activations(checkpoint, sparsity) -> None:
    stored, expected = CASES["compressed-tensors, 4 bits"][1]
    one = np.ones(1, np.float32)
    extra = {"k_scale": one, "v_scale": one, "output_scale": one, "input_zero_point": one.astype(np.int8)}
    source = opened(checkpoint, CT | {"sparsity_config": sparsity}, stored | extra)
    assert source.tensors.keys() == {f"{BASE}.weight"}
    np.testing.assert_array_equal(source.tensors[f"{BASE}.weight"].read(), expected.astype(np.float32))


def test_plain_tensors_stay(checkpoint) -> None:
    stored, _ = CASES["gptq, 4 bits"][1]
    norm = np.arange(4, dtype=np.float16)
    source = opened(checkpoint, GPTQ4, {**stored, "norm": norm})
    assert source.tensors[f"{BASE}.norm"].dtype == "float16"
    np.testing.assert_array_equal(source.tensors[f"{BASE}.norm"].read(), norm.astype(np.float32))


@pytest.mark.parametrize(("symmetric", "strategy"), [(True, "group"), (False, "group"), (True, "channel")])
def test_the_librarys_own_weights(checkpoint, symmetric: bool, strategy: str) -> None:
    """compressed-tensors computes in the type of the scales, so the scales are float32 here."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Library
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    groups = 2 if strategy == "group" else 1
    weights = QuantizationArgs(
        num_bits=4, symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    generator = torch.Generator().manual_seed(3)
    state = {
        "weight": torch.randn(24, 64, generator=generator),
        "weight_scale": torch.rand(24, groups, generator=generator) / 4 + 0.1,
    }
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, (24, groups), generator=generator, dtype=torch.int8)
    stored = Library.compress(state, scheme)
    expected = Library.decompress(stored, scheme)["weight"].numpy()
    arrays = {name: array.numpy() for name, array in stored.items()}
    found = opened(checkpoint, CT, arrays).tensors[f"{BASE}.weight"].read()
    np.testing.assert_array_equal(found, expected)


def test_an_export_is_that_of_the_dequantised_checkpoint(tiny_checkpoint, tmp_path: Path) -> None:
    plain = tiny_checkpoint()
    quantised = tmp_path / "quantised"
    shutil.copytree(plain, quantised)
    tensors, random = load_file(plain / "model.safetensors"), rng()
    stored, dequantised = {}, {}
    for name, array in tensors.items():
        if name.startswith("model.layers.") and array.ndim == 2:
            parts, weight = gptq(random, *array.shape, 1, 4)
            stored |= {f"{name.removesuffix('.weight')}.{part}": a for part, a in parts.items()}
            dequantised[name] = weight.astype(np.float32)
        else:
            stored[name] = dequantised[name] = array
    save_file(stored, quantised / "model.safetensors")
    save_file(dequantised, plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": GPTQ4}))
    options = ExportOptions(buckets=(8,), context=32, weights="bfloat16", targets=("cpu",))
    for folder in (plain, quantised):
        export(open_source(str(folder)), tmp_path / "out" / folder.name, options)
    one, other = (tmp_path / "out" / f.name / "weights.safetensors" for f in (plain, quantised))
    assert one.read_bytes() == other.read_bytes()


# --- refusals -----------------------------------------------------------------------------------------------


def changed(name: str, **arrays: np.ndarray | None) -> dict[str, np.ndarray]:
    stored = {**CASES[name][1][0], **arrays}
    return {key: array for key, array in stored.items() if array is not None}


I32 = np.int32
BROKEN = {
    "no scales": (
        GPTQ4,
        changed("gptq, 4 bits", scales=None),
        "layers.0.mlp.up_proj: the quantised weight lacks its tensor 'scales'; fetch the checkpoint again.",
    ),
    "no zeros": (
        AWQ4,
        changed("awq", qzeros=None),
        "the quantised weight lacks its tensor 'qzeros'",
    ),
    "no shape": (
        CT,
        changed("compressed-tensors, 4 bits", weight_shape=None),
        "the quantised weight lacks its tensor 'weight_shape'",
    ),
    "float numbers": (
        GPTQ4,
        changed("gptq, 4 bits", qweight=np.ones((8, 24), np.float16)),
        ".qweight to be I32 with 2 axes, found F16 [8, 24]",
    ),
    "scales of other outputs": (
        GPTQ4,
        changed("gptq, 4 bits", scales=np.ones((2, 23), np.float16)),
        "expected scales [groups, 24] and qzeros [groups, 3] for 4 bits, found [2, 23] and [2, 3]",
    ),
    "no groups": (
        GPTQ4,
        changed("gptq, 4 bits", scales=np.ones((0, 24), np.float16), qzeros=np.ones((0, 3), I32)),
        "expected scales [groups, 24] and qzeros [groups, 3] for 4 bits, found [0, 24] and [0, 3]",
    ),
    "a short index": (
        GPTQ4,
        changed("gptq, 4 bits", g_idx=np.zeros(63, I32)),
        "expected g_idx to have 64 elements, found [63]",
    ),
    "awq zeros of other outputs": (
        AWQ4,
        changed("awq", qzeros=np.ones((2, 4), I32)),
        "expected scales [groups, 24] and qzeros [groups, 3], found [2, 24] and [2, 4]",
    ),
    "another shape": (
        CT,
        changed("compressed-tensors, 4 bits", weight_shape=np.array([24, 65], np.int64)),
        "weight_packed [24, 8] cannot store a weight of shape [24, 65] in 1, 2, 4 or 8 bits",
    ),
    "a shape of three axes": (
        CT,
        changed("compressed-tensors, 4 bits", weight_shape=np.array([2, 12, 64], np.int64)),
        "weight_packed [24, 8] cannot store a weight of shape [2, 12, 64] in 1, 2, 4 or 8 bits",
    ),
    "packed scales of other outputs": (
        CT,
        changed("compressed-tensors, 4 bits", weight_scale=np.ones((23, 2), np.float16)),
        "expected weight_scale [24, groups], found [23, 2]",
    ),
    "packed zeros of other groups": (
        CT,
        changed("compressed-tensors, zero points", weight_zero_point=np.ones((3, 3), I32)),
        "expected weight_zero_point [3, 2], found [3, 3]",
    ),
    "blocks of another size": (
        {**BLOCKS, "weight_block_size": [8, 8]},
        changed("fp8 in blocks"),
        "expected weight_scale_inv with a scale for each row or block of [40, 48], found [3, 2]",
    ),
    "signed zeros of another shape": (
        CT,
        changed("compressed-tensors, 4 bits", weight_zero_point=np.zeros((24, 3), np.int8)),
        "expected weight_zero_point [24, 2], found [24, 3]",
    ),
    "groups that do not divide the inputs": (
        AWQ4,
        changed("awq", scales=np.ones((3, 24), np.float16), qzeros=np.ones((3, 3), I32)),
        "expected scales for groups of equal size, found 3 groups for 64 inputs",
    ),
    "scales of one axis": (
        CT,
        {"weight": np.zeros((24, 24), FP8), "weight_scale": np.ones(24, np.float32)},
        "expected weight_scale with a scale for each row or block of [24, 24], found [24]",
    ),
    "bytes with two numbers": (
        BLOCKS,
        {"weight": np.zeros((16, 32), np.int8), "weight_scale_inv": np.ones((1, 1), np.float32)},
        ".weight to be F8_E4M3 with 2 axes, found I8 [16, 32]",
    ),
    "a number of another type": (
        GPTQ4,
        changed("gptq, 4 bits", odd=np.ones(3, I32)),
        ".odd to be F32, F16 or BF16, or to belong to a quantised weight, found I32",
    ),
}


@pytest.mark.parametrize(("quantization", "stored", "text"), BROKEN.values(), ids=BROKEN)
def test_broken_checkpoints_are_refused(checkpoint, quantization, stored, text: str) -> None:
    with pytest.raises(PrecastError) as raised:
        opened(checkpoint, quantization, stored)
    assert text in str(raised.value)
    assert str(raised.value).endswith("; fetch the checkpoint again.")


@pytest.mark.parametrize("index", [-1, 2, 2**31 - 1])
def test_an_index_outside_the_groups_is_refused(checkpoint, index: int) -> None:
    stored = changed("gptq, 4 bits", g_idx=np.full(64, index, I32))
    tensor = opened(checkpoint, GPTQ4, stored).tensors[f"{BASE}.weight"]
    with pytest.raises(PrecastError) as raised:
        tensor.read()
    assert str(raised.value) == (
        f"{BASE}: expected g_idx from 0 to 1, found {index} to {index}; fetch the checkpoint again."
    )


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "gptq", "bits": True},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 3}}},
        {"quant_method": "gptq", "bits": 4, "dynamic": {".*down.*": {"format": "marlin"}}},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:*down": {"bits": 8}}},
        {"quant_method": "gptq", "bits": 4, "dynamic": {".*": 8}},
        {"quant_method": "gptq", "bits": 4, "dynamic": [".*"]},
        {"quant_method": "awq", "bits": 4, "dynamic": {".*down.*": {"bits": 8}}},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": ["gptq"]},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "awq", "bits": 8},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        {"quant_method": "compressed-tensors", "sparsity_config": ["dense"]},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {"quant_method": "compressed-tensors", "format": ["pack-quantized"]},
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R4": {}}}},
        {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:llm_compressor"},
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round", "data_type": "mx_fp"},
        {"quant_method": "auto-round", "bits": 3, "packing_format": "auto_round"},
        {
            "quant_method": "auto-round",
            "bits": 4,
            "packing_format": "auto_round",
            "extra_config": {"lm_head": {"data_type": "mx_fp"}},
        },
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 7}}}},
    ],
)
def test_other_variants_are_refused(checkpoint, quantization) -> None:
    with pytest.raises(PrecastError, match="quantization_config says that the weights are already quantised"):
        opened(checkpoint, quantization, {"norm": np.ones(3, np.float32)})
