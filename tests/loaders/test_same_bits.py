"""Answers with the same bits for any batch, draft, prefix and number of threads, on targets with precast's kernels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.loaders.generation import drafts
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.generation.stream import Completion
from precast.loaders.load import load

VOCAB = 320
GREEDY = SamplingParams(ignore_eos=True, max_tokens=20, logprobs=2, prompt_lookup=False)
SAMPLED = SamplingParams(
    ignore_eos=True, max_tokens=20, logprobs=2, prompt_lookup=False, temperature=0.8, seed=7
)


@pytest.fixture(scope="module", params=["float32", "int8", "int4"])
def model(request: Any, export_tiny: Callable[..., Path]) -> Model:
    return load(export_tiny(targets=("cpu",), weights=request.param))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every lookup become a draft."""
    monkeypatch.setattr(drafts.Drafts, "_worth", lambda self, most: most)


def bits(completion: Completion) -> Any:
    """Return tokens and log-probabilities, which depend on every bit of the logits."""
    return completion.token_ids, completion.logprobs


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, VOCAB, length).tolist()


lengths = st.lists(st.integers(1, 40), min_size=2, max_size=8)
SETTINGS = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(lengths=lengths, seed=st.integers(0, 1000))
@SETTINGS
def test_the_batch_does_not_change_a_bit(model: Model, lengths: list[int], seed: int) -> None:
    prompts = [prompt(seed, n) for n in lengths]
    params = [GREEDY if n % 2 else SAMPLED for n in lengths]
    alone = [bits(model.generate(*pair)) for pair in zip(prompts, params, strict=True)]
    assert [bits(c) for c in model.generate_many(prompts, params)] == alone


@given(lengths=lengths, seed=st.integers(0, 1000))
@SETTINGS
def test_drafts_do_not_change_a_bit(model: Model, eager: None, lengths: list[int], seed: int) -> None:
    """A prompt that repeats itself makes drafts; `eager` tries them all, right or wrong."""
    ids = (prompt(seed, 1 + max(lengths) // 2) * 3)[:44]
    for params in (GREEDY, SAMPLED):
        expected = bits(model.generate(ids, params))
        assert bits(model.generate(ids, replace(params, prompt_lookup=True))) == expected
