"""Answers with the same bits for any batch, draft and prefix, on targets with precast's kernels."""

import dataclasses
from collections.abc import Callable
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
GREEDY = SamplingParams(ignore_eos=True, max_tokens=14, logprobs=1)
KINDS = (GREEDY, dataclasses.replace(GREEDY, temperature=0.8, seed=7))
WINDOWS = {"model_type": "mistral", "sliding_window": 8}


@pytest.fixture(
    scope="module",
    params=[
        {"weights": "float32"},
        {"weights": "int8"},
        {"weights": "int4", "kv_cache": "int8", "config": WINDOWS},
    ],
    ids=["float32", "int8", "int4 with windows"],
)
def model(request: Any, export_tiny: Callable[..., Path], tiny_source: Callable[..., Any]) -> Model:
    options = dict(request.param)
    source = tiny_source(config=options.pop("config", None))
    return load(export_tiny(source, targets=("cpu",), **options))


@pytest.fixture(scope="module")
def alone(model: Model) -> Callable[[list[int], SamplingParams], Completion]:
    """Return a function that generates an answer without other prompts, drafts and prefixes."""
    plain = Model(
        engine=model.engine,
        tokenizer=model.tokenizer,
        manifest=model.manifest,
        target=model.target,
        compiles=0,
    )
    return lambda ids, params: plain.generate(ids, dataclasses.replace(params, prompt_lookup=False))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify every draft, even one that is probably wrong."""
    monkeypatch.setattr(drafts.Drafts, "_worth", lambda self, most: most)


def bits(completion: Completion) -> Any:
    """Return tokens and log-probabilities, which depend on every bit of the logits."""
    return completion.token_ids, completion.logprobs


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, VOCAB, length).tolist()


def bounded(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


@given(
    cuts=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 15)), min_size=1, max_size=8),
    seed=st.integers(0, 10_000),
)
@bounded(10)
def test_other_prompts_and_prefixes_do_not_change_a_bit(
    model: Model, alone: Any, cuts: list[tuple[int, int]], seed: int
) -> None:
    """Prompts share beginnings of any length, so that later ones start after prefixes of earlier ones."""
    base = prompt(seed, 30)
    prompts = [base[:cut] + prompt(seed + 1, length) for cut, length in cuts]
    params = [KINDS[length % 2] for _, length in cuts]
    found = model.generate_many(prompts, params)
    assert [bits(c) for c in found] == [bits(alone(*pair)) for pair in zip(prompts, params, strict=True)]


@given(length=st.integers(1, 20), seed=st.integers(0, 10_000))
@bounded(10)
def test_drafts_do_not_change_a_bit(model: Model, alone: Any, eager: None, length: int, seed: int) -> None:
    """A repetitive prompt makes drafts, and the next prompt starts after positions that drafts have written."""
    ids = (prompt(seed, length) * 20)[:36]
    for params in KINDS:
        first = model.generate(ids, params)
        assert bits(first) == bits(alone(ids, params))
        further = [*ids, *first.token_ids[:10], 5]
        assert bits(model.generate(further, params)) == bits(alone(further, params))


def test_prompts_and_drafts_of_the_tests_reuse_prefixes_and_are_verified(model: Model, eager: None) -> None:
    before = model.scheduler.stats()
    found = model.generate_many([prompt(1, 30), [*prompt(1, 30), 4]], GREEDY)
    assert max(c.timing.cached_tokens for c in found) >= 23
    model.generate([7, 8, 9] * 10, GREEDY)
    assert model.scheduler.stats().cached_tokens > before.cached_tokens
    assert model.scheduler._times is not None
