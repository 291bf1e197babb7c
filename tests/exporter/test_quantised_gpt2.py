"""Quantised GPT-2: its own checkpoints store matrices as [in, out], but quantising tools store [out, in]."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantised_checkpoints import gptq, nf4

from precast.exporter.models.registry import read_model
from precast.exporter.sources.base import SourceTensor
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

CONFIG = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 10, "n_positions": 8}
# Outputs and inputs of each matrix. The output projection of attention is square, so only its layout tells its order.
MATRICES = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
H = "transformer.h.0."
# The name under which the export ignores the mask.
MASK = f"{H}self_attn.bias"


def rng() -> np.random.Generator:
    return np.random.default_rng(17)


def others() -> dict[str, np.ndarray]:
    """Return the tensors that are not quantised, among them a mask."""
    shapes = {"wte.weight": (10, 32), "wpe.weight": (8, 32)}
    shapes |= {
        f"{name}.{end}": (32,) for name in ("ln_f", "h.0.ln_1", "h.0.ln_2") for end in ("weight", "bias")
    }
    shapes |= {f"h.0.{name}.bias": (outs,) for name, (outs, _) in MATRICES.items()}
    found = {f"transformer.{n}": rng().standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return found | {f"{H}attn.bias": np.tril(np.ones((1, 1, 8, 8), bool))}


def grouped(random: np.random.Generator, outs: int, inputs: int) -> Any:
    return gptq(random, outs, inputs, inputs // 32, 4)


def checkpoints(make: Callable[..., Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the tensors of a quantised checkpoint, and those of GPT-2's own checkpoint with the same weights."""
    random = rng()
    quantised, plain = others(), others()
    for name, (outs, inputs) in MATRICES.items():
        stored, weight = make(random, outs, inputs)
        quantised |= {f"{H}{name}.{end}": array for end, array in stored.items()}
        plain[f"{H}{name}.weight"] = np.ascontiguousarray(weight.astype(np.float32).T)
    return quantised, plain


def adapted(folder: Path) -> Mapping[str, SourceTensor]:
    source = open_source(str(folder))
    return read_model(source.config, "c").adapt(source).tensors


@pytest.mark.parametrize(("quantization", "make", "kind"), [(GPTQ, grouped, "q5_0"), (BNB, nf4, None)])
def test_matrices_are_those_of_gpt2s_own_checkpoint(
    checkpoint, decode_blocks, tmp_path: Path, quantization, make, kind
) -> None:
    quantised, plain = checkpoints(make)
    own = adapted(checkpoint({"config.json": CONFIG}, plain))
    expected = {name: tensor.read() for name, tensor in own.items() if name != MASK}
    shutil.rmtree(tmp_path / "Tiny Model_v1.5")
    found = adapted(checkpoint({"config.json": CONFIG | {"quantization_config": quantization}}, quantised))
    assert found.keys() == {*expected, MASK}
    for name in expected:
        tensor = found[name]
        np.testing.assert_array_equal(tensor.read(), expected[name], err_msg=name)
        if name.endswith("_proj.weight"):
            assert tensor.block_format == kind
        if tensor.blocks is not None:
            np.testing.assert_array_equal(decode_blocks(tensor.blocks()), expected[name])


def test_matrices_of_other_sizes_are_refused(checkpoint) -> None:
    quantised, _ = checkpoints(grouped)
    config = CONFIG | {"quantization_config": GPTQ, "n_inner": 64}
    with pytest.raises(PrecastError) as raised:
        adapted(checkpoint({"config.json": config}, quantised))
    assert f"tensor '{H}mlp.c_fc.weight' has shape [128, 32], but the config requires [64, 32]" in str(
        raised.value
    )
