"""The table of checkpoint formats in docs/models.md: how much each format of an export changes the weights."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from quantised_checkpoints import AWQ_OUTPUTS, BLOCK, FP8, NF4, nf4_state, words

from precast.exporter.block_formats import BLOCK_FORMATS
from precast.exporter.block_quantise import quantise
from precast.exporter.models.parameters import Parameter
from precast.exporter.quantize import FORMATS
from precast.exporter.sources.base import QuantisedBlocks, SourceTensor
from precast.exporter.sources.open import open_source
from precast.exporter.weights import _encode, _encode_records, _with_source_format

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
BASE = "model.layers.0.mlp.up_proj"
NAME = f"{BASE}.weight"
OUTS, INPUTS, GROUP = 256, 512, 128
WEIGHTS = ("source", "int8", "int4")
Stored = dict[str, np.ndarray]


def matrix() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((OUTS, INPUTS)).astype(np.float32) / 32


def integers(
    bits: int, *, symmetric: bool, size: int = GROUP, order: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return numbers ``[out, in]``, zeros and scales ``[out, groups]``, and the group of each input."""
    index = np.arange(INPUTS) // size
    if order:
        index = np.random.default_rng(6).permutation(index)
    groups = np.stack([matrix()[:, index == group] for group in range(index.max() + 1)], axis=1)
    low, high, most = groups.min(2), groups.max(2), (1 << bits) - 1
    if symmetric:
        scale = (np.maximum(-low, high) / (most // 2)).astype(np.float16)
        zeros = np.full(scale.shape, 1 << bits - 1)
    else:
        scale = ((high - low) / most).astype(np.float16)
        zeros = np.clip(np.rint(-low / scale.astype(np.float32)), 1, most).astype(int)
    each = scale.astype(np.float32)[:, index]
    numbers = np.clip(np.rint(matrix() / each) + zeros[:, index], 1 if symmetric else 0, most).astype(int)
    return numbers, zeros, scale, index


def gptq(bits: int, *, symmetric: bool, order: bool = False) -> tuple[dict, Stored]:
    numbers, zeros, scale, index = integers(bits, symmetric=symmetric, order=order)
    stored = {
        "qweight": np.ascontiguousarray(words(numbers, bits).T),
        "qzeros": words((zeros - 1).T, bits),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": index.astype(np.int32),
    }
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": order}, stored


def awq() -> tuple[dict, Stored]:
    numbers, zeros, scale, _ = integers(4, symmetric=False)
    stored = {"qweight": words(numbers.T, 4, AWQ_OUTPUTS), "qzeros": words(zeros.T, 4, AWQ_OUTPUTS)}
    return {"quant_method": "awq", "bits": 4}, {**stored, "scales": np.ascontiguousarray(scale.T)}


def packed(*, symmetric: bool) -> tuple[dict, Stored]:
    numbers, zeros, scale, _ = integers(4, symmetric=symmetric)
    stored = {
        "weight_packed": words(numbers, 4),
        "weight_shape": np.array([OUTS, INPUTS]),
        "weight_scale": scale,
    }
    if not symmetric:
        stored["weight_zero_point"] = np.ascontiguousarray(words(zeros.T, 4).T)
    return {"quant_method": "compressed-tensors", "format": "pack-quantized"}, stored


def int8() -> tuple[dict, Stored]:
    numbers, zeros, scale, _ = integers(8, symmetric=True, size=INPUTS)
    stored = {"weight": (numbers - zeros).astype(np.int8), "weight_scale": scale.astype(ml_dtypes.bfloat16)}
    return {"quant_method": "compressed-tensors", "format": "int-quantized"}, stored


def fp8(rows: int, columns: int, method: str, ending: str) -> tuple[dict, Stored]:
    blocks = np.abs(matrix()).reshape(OUTS // rows, rows, INPUTS // columns, columns)
    scale = blocks.max((1, 3)) / np.float32(448)
    each = np.repeat(np.repeat(scale, rows, 0), columns, 1)
    return {"quant_method": method}, {"weight": (matrix() / each).astype(FP8), ending: scale}


def nf4() -> tuple[dict, Stored]:
    blocks = matrix().reshape(-1, BLOCK)
    most = np.abs(blocks).max(1)
    codes = np.abs((blocks / most[:, None]).reshape(-1, 1) - NF4).argmin(1)
    stored = {
        "weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "weight.absmax": most,
        "weight.quant_map": NF4,
        "weight.quant_state.bitsandbytes__nf4": nf4_state(OUTS, INPUTS),
    }
    return {"quant_method": "bitsandbytes", "load_in_4bit": True}, stored


def llm_int8() -> tuple[dict, Stored]:
    most = np.abs(matrix()).max(1)
    weight = np.rint(matrix() * (127 / most[:, None])).astype(np.int8)
    return {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"weight": weight, "SCB": most}


def gguf(kind: str) -> SourceTensor:
    form = BLOCK_FORMATS[kind]
    codes, *coefficients = quantise(form, matrix())
    blocks = QuantisedBlocks(format=kind, codes=codes, coefficients=tuple(coefficients))
    values = form.decode(form.pack(codes, *coefficients), OUTS, INPUTS)
    return SourceTensor(
        shape=values.shape, dtype=kind, read=values.copy, block_format=kind, blocks=lambda: blocks
    )


GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
CHECKPOINTS: dict[str, Callable[[], tuple[dict, Stored]]] = {
    "AWQ": awq,
    "GPTQ, 4 bits, symmetric": partial(gptq, 4, symmetric=True),
    "GPTQ, 4 bits, asymmetric": partial(gptq, 4, symmetric=False),
    "GPTQ, 4 bits, `desc_act`": partial(gptq, 4, symmetric=True, order=True),
    "GPTQ, 8 bits, symmetric": partial(gptq, 8, symmetric=True),
    "GPTQ, 8 bits, `desc_act`": partial(gptq, 8, symmetric=True, order=True),
    "compressed-tensors int4, symmetric": partial(packed, symmetric=True),
    "compressed-tensors int4, asymmetric": partial(packed, symmetric=False),
    "compressed-tensors int8": int8,
    "compressed-tensors FP8, by rows": partial(fp8, 1, INPUTS, "compressed-tensors", "weight_scale"),
    "FP8 in 128 × 128 blocks (DeepSeek, Qwen)": partial(fp8, 128, 128, "fp8", "weight_scale_inv"),
    "bitsandbytes NF4": nf4,
    "bitsandbytes int8": llm_int8,
}


def cell(tensor: SourceTensor, weights: str) -> str:
    """Return the cell of the table: the root mean square of the changes, as a share of that of the weights."""
    shape = (OUTS, INPUTS)
    parameter = Parameter(name="model.layers.mlp.up_proj.weight", shape=(1, *shape), sources=(NAME,))
    chosen = _with_source_format(parameter, weights, {NAME: tensor})
    exact = tensor.read()
    if isinstance(chosen, str):
        found = FORMATS[chosen].decode(_encode(NAME, tensor, FORMATS[chosen], shape), *shape)
    else:
        form = BLOCK_FORMATS[chosen[0]]
        found = form.decode(_encode_records(NAME, tensor, form, shape), *shape)
    if np.array_equal(found, exact):
        return "exact, in float32" if chosen == "float32" else "exact"
    share = float(np.sqrt(np.square(found - exact, dtype=np.float64).sum() / np.square(exact).sum()))
    return f"{100 * share:.2g}%"


def rows() -> dict[str, list[str]]:
    """Return the cells of each row of the table in the documents."""
    section = TABLE.read_text(encoding="utf-8").partition("**Quantised checkpoints.**")[2]
    lines = re.findall(r"^\| (.+) \|$", section.partition("**Sequences.**")[0], re.MULTILINE)
    return {name: cells for name, *cells in (line.split(" | ") for line in lines[1:])}


def test_the_table_has_every_format() -> None:
    assert list(rows()) == [*(f"GGUF {kind}" for kind in GGUF), *CHECKPOINTS]


@pytest.mark.parametrize("kind", GGUF)
def test_types_of_gguf(kind: str) -> None:
    assert [cell(gguf(kind.lower()), weights) for weights in WEIGHTS] == rows()[f"GGUF {kind}"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_formats_of_checkpoints(checkpoint: Callable[..., Any], name: str) -> None:
    quantization, stored = CHECKPOINTS[name]()
    config = {"config.json": {"model_type": "llama", "quantization_config": quantization}}
    tensors = {f"{BASE}.{ending}": array for ending, array in stored.items()}
    tensor = open_source(str(checkpoint(config, tensors))).tensors[NAME]
    assert [cell(tensor, weights) for weights in WEIGHTS] == rows()[name]
