"""Equalised inputs: the same model in every architecture, and less lost when its matrices are rounded."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from precast.exporter import equalise, gptq
from precast.exporter.block_formats import BLOCK_FORMATS
from precast.exporter.calibration import CalibrationText, open_model, read_calibration_text
from precast.exporter.equalise import Link, equalised, links
from precast.exporter.options import ExportOptions
from precast.exporter.plan import ExportPlan, make_plan
from precast.exporter.sources.base import SourceTensor
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

REFERENCE = Path(__file__).parents[1] / "reference"
WORDS = "the quick brown fox jumps over the lazy dog; def fibonacci(n): return n; the cat sat on the mat. "
TEXT = CalibrationText(name="words", content=WORDS * 60)
WINDOWS, TOKENS = 2, 24
# For each architecture a checkpoint of `tests/reference`, and the modules whose outputs its links divide.
_LLAMA = {"self_attn.v_proj", "input_layernorm", "post_attention_layernorm", "mlp.up_proj"}
_GEMMA = _LLAMA - {"post_attention_layernorm"} | {"pre_feedforward_layernorm"}
EXPECTED = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": {"self_attn.v_proj", "mlp.up_proj"},
    "gpt2": {"self_attn.v_proj", "input_layernorm"},
    "mixtral": {"self_attn.v_proj", "input_layernorm"},
    "qwen3_moe": {"self_attn.v_proj", "input_layernorm"},
}


@pytest.fixture(scope="module")
def script() -> Any:
    """The script of the architectures' checkpoints; it imports another script by its bare name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REFERENCE))
        return importlib.import_module("make_architectures")


@pytest.fixture
def random_windows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let calibration read random tokens, because not every checkpoint has a tokenizer for a text; use all factors."""
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 90, (WINDOWS, TOKENS)).tolist()
    monkeypatch.setattr(equalise, "cut_windows", lambda model, text: windows)
    monkeypatch.setattr(equalise, "_POWERS", (1.0,))
    return windows


def planned(source: Any, **options: Any) -> ExportPlan:
    return make_plan(source, ExportOptions(**{"buckets": (8,), "context": 64, "weights": "int4", **options}))


def logits(plan: ExportPlan, window: list[int]) -> np.ndarray:
    return np.stack(list(open_model(plan).logits(window, 0)))


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_model_computes_the_same(
    script: Any, tmp_path: Path, random_windows: list[list[int]], kind: str
) -> None:
    record = next(r for r in script.read_records().values() if r["config"]["model_type"] == kind)
    script.write_checkpoint(tmp_path / "checkpoint", record)
    plan = planned(open_source(str(tmp_path / "checkpoint")), context=32)
    changed = equalised(plan, TEXT)
    found = links(plan.stored.parameters, plan.spec.config)
    assert {link.before for link in found} == EXPECTED[kind]
    for link in found:
        name = f"model.layers.0.{link.before}.weight"
        before, after = (p.weight_plan.tensors[name].read() for p in (plan, changed))
        assert not np.allclose(before, after, rtol=0.05), name
    expected = logits(plan, random_windows[0])
    np.testing.assert_allclose(logits(changed, random_windows[0]), expected, atol=2e-3)


@pytest.mark.parametrize("stored", ["q4_k", "q5_k", "q8_0", "q4_1"])
def test_a_matrix_with_unequal_inputs_loses_less(stored: str) -> None:
    """The inputs' magnitudes vary, and so do the columns'."""
    rng = np.random.default_rng(1)
    spread = np.exp(rng.normal(0, 1, 64)).astype(np.float32)
    x = rng.standard_normal((300, 64), np.float32) * spread
    matrix = rng.standard_normal((48, 64), np.float32) * np.exp(rng.normal(0, 0.5, 64)).astype(np.float32)
    importance = 1 / np.diag(gptq.compensation(jnp.asarray(x.T @ x))) ** 2
    link = Link(before="norm", behind=("matrix",))
    factors = equalise._factors(link, importance, [matrix])
    assert lost(stored, x / factors, matrix * factors) < 0.7 * lost(stored, x, matrix)


def lost(name: str, x: np.ndarray, matrix: np.ndarray) -> float:
    """Return the squared error of the outputs of a matrix that is rounded with these inputs."""
    stored = BLOCK_FORMATS[name]
    triangle = gptq.compensation(jnp.asarray(x.T @ x))
    decoded = stored.decode(stored.pack(*gptq.quantise(matrix.copy(), triangle, stored)), *matrix.shape)
    return float(np.square(x @ (decoded - matrix).T).sum())


def test_only_formats_that_an_export_may_keep_are_left_alone() -> None:
    def tensors(block_format: str | None) -> dict[str, SourceTensor]:
        stored = SourceTensor(
            shape=(4, 4), dtype="any", read=lambda: np.ones((4, 4)), block_format=block_format
        )
        return {"0.up.weight": stored, "0.down.weight": stored}

    link = Link(before="up", behind=("down",))
    found = {f: equalise._is_scalable(tensors(f), "0.", link) for f in (None, "e4m3", "q5_0", "q4_1", "q8_0")}
    assert found == {None: True, "e4m3": True, "q5_0": True, "q4_1": False, "q8_0": False}


def test_heads_that_share_values_share_factors() -> None:
    link = Link(before="v", behind=("o",), heads=2, repeats=3)
    rng = np.random.default_rng(2)
    factors = equalise._factors(link, rng.random(24).astype(np.float32), [rng.standard_normal((5, 24))])
    assert factors.shape == (8,)


def test_extreme_inputs_get_bounded_factors() -> None:
    """Some inputs are always zero, some columns too, and one input is huge."""
    importance = np.array([0, 1, 1e9, 1, 0, 1, 1, 1], np.float32)
    matrix = np.ones((3, 8), np.float32)
    matrix[:, 4:6] = 0
    link = Link(before="norm", behind=("a", "b"))
    for matrices in ([matrix, matrix], [np.zeros_like(matrix)] * 2):
        factors = equalise._factors(link, importance, matrices)
        assert np.isfinite(factors).all()
        assert factors.max() / factors.min() <= 1e2 * 1.01


def test_factors_that_take_weights_off_a_grid_are_not_used() -> None:
    """A matrix that the format holds exactly stays so; one with unequal columns on no grid is scaled."""
    rng = np.random.default_rng(4)
    importance = np.exp(rng.normal(0, 1, 64)).astype(np.float32)
    link, stored = Link(before="norm", behind=("matrix",)), BLOCK_FORMATS["q4_1"]
    grid = (rng.integers(0, 16, (64, 64)) - 8).astype(np.float32) / 8
    grid[:, ::32], grid[:, 1::32] = -1, 7 / 8  # both ends of each group's range
    assert equalise._best(link, importance, [grid], stored) is None
    free = rng.standard_normal((64, 64), np.float32) * np.exp(rng.normal(0, 0.5, 64)).astype(np.float32)
    assert equalise._best(link, importance, [free], stored) is not None


def test_quantised_sources_keep_their_values(
    tiny_source: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link with one matrix in a block format is left alone; the others are scaled."""
    monkeypatch.setattr(equalise, "_POWERS", (1.0,))
    source = tiny_source()
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = {**source.tensors, name: dataclasses.replace(source.tensors[name], block_format="q4_1")}
    plan = planned(dataclasses.replace(source, tensors=tensors), weights="int8")
    changed = equalised(plan, TEXT).weight_plan.tensors
    kept = {name for name, tensor in plan.weight_plan.tensors.items() if changed[name] is tensor}
    assert kept == {name, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    up = (
        changed["model.layers.1.mlp.up_proj.weight"].read()
        / source.tensors["model.layers.1.mlp.up_proj.weight"].read()
    )
    np.testing.assert_allclose(up, np.broadcast_to(up[:1], up.shape), rtol=1e-5)  # its columns alone


def test_a_source_of_blocks_alone_is_not_even_read(
    tiny_source: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_source()
    tensors = {
        name: dataclasses.replace(tensor, block_format="q4_1" if tensor.shape[1:] else None)
        for name, tensor in source.tensors.items()
    }
    monkeypatch.setattr(equalise, "open_model", None)
    plan = planned(dataclasses.replace(source, tensors=tensors), weights="int8")
    assert equalised(plan, TEXT) is plan


def test_a_short_text_is_refused(tiny_source: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("too short")
    with pytest.raises(PrecastError, match="expected at least 64 tokens of text to calibrate with"):
        equalised(planned(tiny_source()), read_calibration_text(path))
