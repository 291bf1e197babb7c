"""Artifacts with every format of weights and KV cache, compared with the uncached pass over the stored weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.exporter.block_formats import BLOCK_FORMATS
from precast.exporter.block_quantise import quantise
from precast.exporter.models.registry import read_model
from precast.exporter.programs import TABLES, StoredModel, stored_model
from precast.exporter.quantize import SOURCE, WEIGHTS
from precast.exporter.reference.golden import INT4_TIE, REDUCED_TIE, tie_of
from precast.exporter.sources.base import QuantisedBlocks, Source, SourceTensor
from precast.loaders.artifact.weights import map_weights
from precast.loaders.generation.engine import DecodeRow
from precast.loaders.load import load

PROMPT = [i * 7 % 60 for i in range(1, 22)]  # longer than the largest bucket
STEPS = 12
# Tolerances by type of the KV cache, as shares of the range of the logits: for float32 sums in another order, and for
# keys and values with 8 or 7 significant bits.
LOST = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.03}
# Additional tolerances by format of the weights, because products round activations to 16 or 8 bits.
ROUNDED = {"int8": 1e-3, "int4": 0.03}
KINDS = [
    *((weights, "bfloat16") for weights in WEIGHTS if weights != SOURCE),
    ("int8", "float32"),
    ("float32", "int8"),
    ("int4", "int8"),
]


def forced(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Prefill the prompt, then decode the tokens `ids`, whatever the model predicts; return the logits of each step."""
    engine, cache = model.engine, model.engine.new_cache()
    step = engine.prefill(ids[: len(PROMPT)], cache)
    rows = [engine.logits(step)[0].copy()]
    for position in range(len(PROMPT), len(ids)):
        step = engine.decode([DecodeRow(0, ids[position], position)], cache)
        rows.append(engine.logits(step)[0].copy())
    return np.stack(rows)


def uncached(model: StoredModel, root: Path, ids: Sequence[int]) -> np.ndarray:
    """Return the logits of the reference for the same tokens, with the artifact's weights."""
    import jax
    import jax.numpy as jnp

    arrays = map_weights(root / "weights.safetensors")
    weights = [jnp.asarray(arrays[name]) for name, _ in model.arrays()]
    tables = [jnp.asarray(arrays[name]) for name in TABLES]
    run = jax.jit(lambda tokens, tables, weights: model.bind(weights).forward(tokens, *tables))
    with jax.default_matmul_precision("highest"):
        return np.asarray(run(np.int32([ids]), tables, weights))[0, len(PROMPT) - 1 :]


@pytest.mark.parametrize(("weights", "cache"), KINDS)
def test_logits_are_the_references(
    export_tiny: Callable[..., Path], tiny_source: Callable[..., Any], weights: str, cache: str
) -> None:
    root = export_tiny(weights=weights, kv_cache=cache, targets=("cpu",))
    source = tiny_source()
    stored = stored_model(read_model(source.config, source.name), weights)
    ids = PROMPT + [i * 11 % 60 for i in range(STEPS)]
    found, expected = forced(load(root), ids), uncached(stored, root, ids)
    lost = LOST[cache] + ROUNDED.get(weights, 0.0)
    assert np.abs(found - expected).max() <= lost * np.ptp(expected)


@pytest.mark.parametrize(
    "weights",
    [
        "int4",
        pytest.param("int8", marks=pytest.mark.long),
        pytest.param("bfloat16", marks=pytest.mark.long),
    ],
)
def test_the_portable_target_computes_the_same(export_tiny: Callable[..., Path], weights: str) -> None:
    root = export_tiny(weights=weights)
    compiled = load(root, target="portable", allow_compile=True, log=lambda _: None)
    ids = PROMPT + [i * 11 % 60 for i in range(STEPS)]
    found, expected = forced(load(root), ids), forced(compiled, ids)
    assert np.abs(found - expected).max() <= LOST["bfloat16"] * np.ptp(expected)


def in_blocks(source: Source, kinds: Sequence[str], *, vocabulary: bool) -> Source:
    """Return the source with the matrices of its layers, and possibly the embedding, in these block formats in turn."""
    turn = cycle(kinds)

    def rounded(tensor: SourceTensor) -> SourceTensor:
        kind = BLOCK_FORMATS[next(turn)]
        codes, *coefficients = quantise(kind, tensor.read())
        blocks = QuantisedBlocks(format=kind.name, codes=codes, coefficients=tuple(coefficients))
        decoded = kind.decode(kind.pack(codes, *coefficients), *tensor.shape)
        return replace(
            tensor, read=decoded.copy, block_format=kind.name, blocks=lambda: blocks, dtype=kind.name
        )

    changed = {
        name: rounded(tensor)
        if len(tensor.shape) == 2 and (vocabulary or name.startswith("model.layers."))
        else tensor
        for name, tensor in source.tensors.items()
    }
    return replace(source, tensors=changed)


def check_answers(export_tiny: Callable[..., Path], source: Source, root: Path) -> None:
    """Check that the answers are those of the same weights in float32, within the rounding of activations."""
    ids = PROMPT + [i * 11 % 60 for i in range(STEPS)]
    found, portable, exact = (
        forced(model, ids)
        for model in (
            load(root),
            load(root, target="portable", allow_compile=True, log=lambda _: None),
            load(export_tiny(source, weights="float32", targets=("cpu",))),
        )
    )
    spread = np.ptp(exact)
    assert np.abs(found - portable).max() <= (LOST["bfloat16"] + ROUNDED["int4"]) * spread
    assert np.abs(portable - exact).max() <= LOST["bfloat16"] * spread
    assert np.abs(found - exact).max() <= (LOST["bfloat16"] + ROUNDED["int4"]) * spread


def test_weights_without_minima_are_stored_without_them(
    export_tiny: Callable[..., Path], tiny_source: Callable[..., Any]
) -> None:
    source = in_blocks(tiny_source(), ["q4_0"], vocabulary=False)
    root = export_tiny(source, weights="int4")
    names = {name for name in map_weights(root / "weights.safetensors") if name.startswith("model.layers.")}
    assert "model.layers.mlp.up_proj.weight.scale" in names
    assert not any(name.endswith(".minimum") for name in names)
    check_answers(export_tiny, source, root)


def test_a_source_in_block_formats_keeps_them(
    export_tiny: Callable[..., Path], tiny_source: Callable[..., Any]
) -> None:
    source = in_blocks(tiny_source(), list(BLOCK_FORMATS), vocabulary=True)
    root = export_tiny(source, weights="source")
    codes = {
        int(code)
        for name, array in map_weights(root / "weights.safetensors").items()
        if name.endswith(".table")
        for code in array[:, 0]
    }
    assert codes == {kind.code for kind in BLOCK_FORMATS.values()}
    manifest = load(root).manifest
    assert manifest.model.weights == "source"
    assert tie_of(manifest) == INT4_TIE
    check_answers(export_tiny, source, root)


def test_a_source_in_float32_has_the_narrow_tie(export_tiny: Callable[..., Path]) -> None:
    """Its activations are not rounded to 8 bits."""
    manifest = load(export_tiny(weights="source", targets=("cpu",))).manifest
    assert tie_of(manifest) == REDUCED_TIE


def test_the_manifest_describes_the_kv_cache(export_tiny: Callable[..., Path]) -> None:
    manifest = load(export_tiny(weights="int4", kv_cache="int8", targets=("cpu",))).manifest
    assert manifest.model.weights == "int4"
    assert [(a.name, a.dtype, a.axes) for a in manifest.cache] == [
        ("cache.keys", "int8", "LBKSH"),
        ("cache.values", "int8", "LBKSH"),
        ("cache.key_scale", "float32", "LBKS"),
        ("cache.value_scale", "float32", "LBKS"),
    ]
    assert manifest.fidelity is not None
    assert manifest.fidelity.tokens > 0
    found = {
        v.name: v.dtype for v in manifest.targets[0].of_kind("decode")[0].arguments if v.role == "weight"
    }
    assert found["model.layers.mlp.up_proj.weight"] == "uint8"
    assert found["model.layers.mlp.up_proj.weight.minimum"] == "float16"
    assert found["model.embed_tokens.weight"] == "int8"
    assert found["model.norm.weight"] == "float32"


@pytest.mark.parametrize(
    ("weights", "cache", "kept"),
    [
        ("float32", None, "float32"),
        ("int8", None, "bfloat16"),
        ("bfloat16", None, "bfloat16"),
        ("int8", "int8", "int8"),
    ],
)
def test_the_default_kv_cache_depends_on_the_weights(
    export_tiny: Callable[..., Path], weights: str, cache: str | None, kept: str
) -> None:
    manifest = load(export_tiny(weights=weights, kv_cache=cache, targets=("cpu",))).manifest
    assert {a.dtype for a in manifest.cache if a.axes == "LBKSH"} == {kept}
    assert (manifest.fidelity is None) == (weights == "float32")


def test_several_slots_decode_as_one(export_tiny: Callable[..., Path]) -> None:
    """Three sequences of different lengths decode together, beside an idle slot; each continues as it would alone."""
    one, four = (load(export_tiny(weights="int8", slots=n, targets=("cpu",))).engine for n in (1, 4))
    prompts = {0: PROMPT[:5], 1: PROMPT, 3: PROMPT[:9]}
    together = four.new_cache()
    alone = {}
    for slot, prompt in prompts.items():
        four.prefill(prompt, together, slot=slot)
        cache = one.new_cache()
        one.prefill(prompt, cache)
        alone[slot] = one.logits(one.decode([DecodeRow(0, 7, len(prompt))], cache))[0].copy()
    rows = [DecodeRow(slot, 7, len(prompt)) for slot, prompt in prompts.items()]
    found = four.logits(four.decode(rows, together))
    for logits, expected in zip(found, alone.values(), strict=True):
        np.testing.assert_allclose(logits, expected, atol=2e-4 * np.ptp(expected))
