"""Whole programs on a CPU: the keys, values and logits of a position have the same bits for any split of the prompt."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.exporter.sources.open import open_source
from precast.loaders.generation.engine import DecodeRow, Engine
from precast.loaders.load import load

REFERENCE = Path(__file__).parent / "reference"
# For each model, a reference checkpoint or the tiny model: the formats of weights and KV cache.
CASES = {
    "tiny int4": ("", "int4", "bfloat16"),
    "tiny int8": ("", "int8", "int8"),
    "tiny bfloat16": ("", "bfloat16", "bfloat16"),
    "soft caps, windows and a scaled embedding": ("gemma2-tied-three-heads", "int8", "bfloat16"),
    "learned positions and LayerNorm": ("gpt2-three-heads", "float32", "float32"),
    "a window and a mixture of experts": ("mixtral-tied-window-one-expert", "bfloat16", "int8"),
    "several RoPE tables": ("gemma3-cap", "float32", "bfloat16"),
    "scaled logits": ("granite-biases-linear", "int8", "float32"),
    "norms of heads and renormalised experts": ("qwen3_moe-renormalised", "float32", "float32"),
    "norms after the products": ("olmo2-three-heads", "float32", "float32"),
}
SHORT = ("tiny int4", "soft caps, windows and a scaled embedding", "a window and a mixture of experts")


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in CASES]
)
def engine(
    request: pytest.FixtureRequest,
    export_tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Engine:
    checkpoint, weights, kv_cache = CASES[request.param]
    source: Any = None
    if checkpoint:
        monkeypatch.syspath_prepend(str(REFERENCE))
        script = importlib.import_module("make_architectures")
        script.write_checkpoint(tmp_path / checkpoint, script.read_records()[checkpoint])
        source = open_source(str(tmp_path / checkpoint))
    root = export_tiny(source, weights=weights, kv_cache=kv_cache, slots=3, targets=("cpu",))
    return load(root).engine


def one_by_one(engine: Engine, ids: list[int], slot: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Decode the tokens after the first one by one; return the logits of every position, and the slot's cache."""
    cache = engine.new_cache()
    logits = [engine.logits(engine.prefill_chunk(ids[:1], cache, start=0, slot=slot))[0].copy()]
    for position in range(1, len(ids)):
        logits.append(
            engine.logits(engine.decode([DecodeRow(slot, ids[position], position)], cache))[0].copy()
        )
    return np.stack(logits), contents(engine, cache, slot, len(ids))


def contents(engine: Engine, cache: Any, slot: int, filled: int) -> list[np.ndarray]:
    """Return the bit patterns in the filled places of a slot, for each array of the cache."""
    views = engine.slot_views(cache, slot)
    assert views
    return [view[:, :, :filled].copy() for view in views.values()]


def in_pieces(
    engine: Engine, ids: list[int], slot: int, rng: np.random.Generator
) -> tuple[dict[int, np.ndarray], list[np.ndarray]]:
    """Compute the tokens by random chunks, scores and steps, while other slots decode; return the logits."""
    cache, logits, position = engine.new_cache(), dict[int, np.ndarray](), 0
    others = [s for s in range(engine.slots) if s != slot]
    for other in others:
        engine.prefill_chunk(ids[:3], cache, start=0, slot=other)
    ahead = 3
    while position < len(ids):
        left = len(ids) - position
        match rng.integers(3) if position else 0:
            case 0:
                n = int(rng.integers(1, min(left, engine.buckets[-1]) + 1))
                step = engine.prefill_chunk(ids[position : position + n], cache, start=position, slot=slot)
                logits[position + n - 1] = engine.logits(step)[0].copy()
            case 1:
                n = int(rng.integers(1, min(left, engine.score_tokens) + 1))
                step = engine.score(ids[position : position + n], cache, start=position, slot=slot)
                logits |= dict(enumerate(engine.logits(step)[:n].copy(), position))
            case _:
                n = 1
                rows = [DecodeRow(slot, ids[position], position)]
                if ahead < len(ids):
                    rows += [DecodeRow(other, ids[ahead], ahead) for other in others]
                    ahead += 1
                order = rng.permutation(len(rows))
                step = engine.decode([rows[i] for i in order], cache)
                logits[position] = engine.logits(step)[int(np.argmin(order))].copy()
        position += n
    return logits, contents(engine, cache, slot, len(ids))


def test_positions_have_the_same_bits_however_they_are_read(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 60, engine.context - 2).tolist()
    expected, rows = one_by_one(engine, ids, slot=1)
    for slot in (0, 1, 2, 1, 0, 2):
        logits, found = in_pieces(engine, ids, slot, rng)
        for position, answer in logits.items():
            np.testing.assert_array_equal(answer, expected[position], err_msg=f"position {position}")
        for ours, theirs in zip(found, rows, strict=True):
            np.testing.assert_array_equal(ours, theirs)
