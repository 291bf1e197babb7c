"""Sampling against a plain NumPy reference, and against transformers' processors where torch is installed."""

import math
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.logprobs import PromptLogprobs, token_logprob
from precast.loaders.generation.sampling import Sampler, SamplingParams, kept_weights

Case = tuple[np.ndarray, list[int], list[int], SamplingParams]


def reference(logits: np.ndarray, prompt: list[int], answer: list[int], params: SamplingParams) -> np.ndarray:
    """Return the probabilities, float64 [V], computed by the simplest code."""
    scores = [float(x) for x in logits]
    for token, bias in dict(params.logit_bias).items():
        scores[token] += bias
    for token in {*prompt, *answer}:
        factor = float(np.float32(params.repetition_penalty))
        scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
    for token in set(answer):
        scores[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    scores = [score / params.temperature for score in scores]
    if params.top_k:
        kth = sorted(scores, reverse=True)[min(params.top_k, len(scores)) - 1]
        scores = [score if score >= kth else -math.inf for score in scores]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    if params.top_p < 1:
        total, above = math.fsum(weights), 0.0
        for token in sorted(range(len(weights)), key=lambda t: (-weights[t], t)):
            mass = weights[token] / total
            if 0 < above >= params.top_p:
                weights[token] = 0.0
            above += mass
    weights = [weight if weight >= params.min_p * max(weights) else 0.0 for weight in weights]
    return np.array(weights) / math.fsum(weights)


def probabilities(
    logits: np.ndarray, prompt: list[int], answer: list[int], params: SamplingParams
) -> np.ndarray:
    """Return the sampler's distribution, [V]."""
    sampler = Sampler(params, prompt, logits.size)
    for token in answer:
        sampler.observe(token)
    ids, weights = kept_weights(sampler._adjusted(logits), params)
    dense = np.zeros(logits.size)
    dense[slice(None) if ids is None else ids] = weights
    return dense / dense.sum()


# Logits are multiples of 1/4, so differences are exact in float32, and equal logits are common. Thresholds are uneven
# numbers, so that no sum of probabilities equals a threshold.
LOGITS = st.lists(
    st.one_of(st.integers(-40, 40).map(lambda n: n / 4), st.just(-math.inf)), min_size=1, max_size=40
).filter(lambda values: max(values) > -math.inf)
QUARTERS = st.integers(-8, 8).map(lambda n: n / 4)
PARAMS = {
    "temperature": st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    "top_k": st.integers(0, 12),
    "top_p": st.sampled_from([1.0, 0.97131, 0.7313, 0.31337, 0.01]),
    "min_p": st.sampled_from([0.0, 0.0313, 0.3137]),
    "repetition_penalty": st.sampled_from([1.0, 2.0, 0.5]),
    "presence_penalty": st.one_of(st.just(0.0), QUARTERS),
    "frequency_penalty": st.one_of(st.just(0.0), QUARTERS),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    logits = np.array(draw(LOGITS), dtype=np.float32)
    tokens = st.integers(0, logits.size - 1)
    prompt, answer = draw(st.lists(tokens, max_size=6)), draw(st.lists(tokens, max_size=6))
    bias = draw(st.dictionaries(tokens, st.integers(-400, 400).map(lambda n: n / 4), max_size=4))
    return logits, prompt, answer, draw(st.builds(SamplingParams, logit_bias=st.just(bias), **PARAMS))


@settings(deadline=None, max_examples=500)
@given(case=cases())
def test_probabilities_are_the_reference(case: Case) -> None:
    expected, found = reference(*case), probabilities(*case)
    # Dropped tokens are exactly zero. Values below the smallest normal float32 may round either way.
    normal = float(np.finfo(np.float32).tiny)
    assert np.all(found[expected >= 2 * normal] > 0)
    assert np.all(expected[found > 0] > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-30)


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_probabilities_are_those_of_transformers(torch: Any, case: Case) -> None:
    from transformers.generation import logits_process as process

    logits, prompt, answer, params = case
    history = [*prompt, *answer]
    # Only precast has OpenAI's penalties.
    params = replace(params, presence_penalty=0.0, frequency_penalty=0.0)
    chain = [process.TemperatureLogitsWarper(params.temperature)]
    if history:
        chain.insert(0, process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.logit_bias:
        biases = {(token,): bias for token, bias in params.logit_bias}
        chain.insert(0, process.SequenceBiasLogitsProcessor(biases))
    if params.top_k:
        chain.append(process.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(process.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(process.MinPLogitsWarper(params.min_p))
    scores, ids = torch.from_numpy(logits.copy())[None], torch.tensor([history], dtype=torch.int64)
    for step in chain:
        scores = step(ids, scores)
    expected = torch.softmax(scores.double(), dim=-1)[0].numpy()
    # Among tied tokens, precast's top-p drops the highest ids, and torch drops arbitrary ones, so compare sorted
    # values.
    found = probabilities(logits, prompt, answer, params)
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-4, atol=1e-30)
    for same in (logits == level for level in set(logits.tolist()) if not params.is_penalised):
        np.testing.assert_allclose(found[same].max(), expected[same].max(), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 0.999])
def test_nucleus_of_a_large_vocabulary(spread: float, top_p: float) -> None:
    """The histogram must find the same boundary as a full sort."""
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal(20_000) * spread).astype(np.float32)
    found = probabilities(logits, [], [], SamplingParams(temperature=1.0, top_p=top_p))
    weights = np.exp(logits - logits.max()).astype(np.float64)
    order = np.argsort(-weights, kind="stable")
    above = np.cumsum(weights[order]) - weights[order]
    kept = order[above < top_p * weights.sum()]
    # Another order of sums may round differently and move the boundary by one token.
    assert abs(np.count_nonzero(found) - kept.size) <= 1
    assert len(set(np.flatnonzero(found)) ^ set(kept)) <= 1


PLAIN = SamplingParams(temperature=1.0)


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        SamplingParams(temperature=0.7, top_k=20),
        SamplingParams(temperature=1.5, top_p=0.8, min_p=0.02),
        SamplingParams(temperature=1.0, top_k=3, repetition_penalty=1.3),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Apply Pearson's chi-square test to 20,000 draws with a fixed seed."""
    logits = np.random.default_rng(1).standard_normal(1500).astype(np.float32) * 2
    prompt = [3, 5, 8]
    expected = probabilities(logits, prompt, [], params)
    sampler = Sampler(replace(params, seed=11), prompt, logits.size)
    sampler.observe = lambda token_id: None  # keep the distribution fixed
    draws = 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=logits.size)
    assert counts[expected == 0].sum() == 0
    order = np.argsort(-expected)
    large = order[expected[order] * draws >= 10]
    rest = np.setdiff1d(order, large)
    observed = np.append(counts[large], counts[rest].sum())
    wanted = np.append(expected[large], expected[rest].sum()) * draws
    observed, wanted = observed[wanted >= 1], wanted[wanted >= 1]
    chi2, freedom = ((observed - wanted) ** 2 / wanted).sum(), wanted.size - 1
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * max(freedom, 1))


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = np.random.default_rng(2).standard_normal((50, 1000)).astype(np.float32)

    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.95, seed=seed), [], 1000)
        return [sampler.sample(row) for row in logits]

    assert run(5) == run(5)
    assert run(5) != run(6)
    assert run(None) != run(None)


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    sampler = Sampler(SamplingParams(), [], 4)
    assert sampler.is_greedy
    assert sampler.sample(np.array([0, 2, 2, 1], np.float32)) == 1


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, [0, 1, 2]), (0.0, [0])])
def test_the_nucleus_of_a_tie_is_the_lowest_ids(top_p: float, kept: list[int]) -> None:
    found = probabilities(np.zeros(8, np.float32), [], [], SamplingParams(temperature=1, top_p=top_p))
    assert np.flatnonzero(found).tolist() == kept


def test_the_penalty_applies_to_prompt_and_answer() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0, 99], 4)  # the model never predicts 99
    assert not sampler.is_greedy
    logits = np.array([3.0, 2.0, 1.6, -1.0], np.float32)
    given = logits.copy()
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 0]
    assert np.array_equal(logits, given)  # the caller's array is unchanged


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = np.array([3.0, 2.5, 1.0, -1.0], np.float32)
    sampler = Sampler(SamplingParams(presence_penalty=0.25, frequency_penalty=0.5), [0, 0, 1], 4)
    assert not sampler.is_greedy
    # After 0 once: 2.25. After 1 once: 1.75. After 0 twice: 1.75, tied with 1.
    assert [sampler.sample(logits) for _ in range(4)] == [0, 1, 0, 0]
    sampler.observe(7)  # beyond the vocabulary


def test_a_bias_bans_and_forces() -> None:
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    assert Sampler(SamplingParams(logit_bias={0: -100, 2: 0.5}), [], 3).sample(logits) == 1
    assert Sampler(SamplingParams(logit_bias={"2": 100}), [], 3).sample(logits) == 2


@settings(deadline=None, max_examples=200)
@given(case=cases(), top=st.integers(0, 50))
def test_logprobs_are_the_model_s_own(case: Case, top: int) -> None:
    logits, prompt, answer, params = case
    sampler = Sampler(
        replace(params, logprobs=top, seed=1), prompt, logits.size, text_of=lambda token: f"<{token}>"
    )
    plain = Sampler(replace(params, seed=1), prompt, logits.size)
    for token in answer:
        sampler.observe(token)
        plain.observe(token)
    assert not sampler.is_greedy
    token = sampler.sample(logits)
    assert token == plain.sample(logits)
    (found,) = sampler.logprobs
    assert plain.logprobs == []
    # The log of the softmax by the simplest code, without bias, penalties and temperature.
    total = math.log(math.fsum(math.exp(float(x)) for x in logits))
    order = sorted(range(logits.size), key=lambda i: (-logits[i], i))[:top]
    assert (found.token_id, found.text) == (token, f"<{token}>")
    assert [(t.token_id, t.text, t.top) for t in found.top] == [(i, f"<{i}>", ()) for i in order]
    for record in (found, *found.top):
        assert record.logprob <= 0
        assert record.logprob == pytest.approx(float(logits[record.token_id]) - total, abs=1e-5)


def test_logprobs_are_those_of_torch(torch: Any) -> None:
    logits = np.random.default_rng(5).standard_normal(50_000).astype(np.float32) * 9
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1)
    found = token_logprob(logits, 77, 20, str)
    values, ids = wanted.topk(20)
    assert [record.token_id for record in found.top] == ids.tolist()
    assert [record.logprob for record in found.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert found.logprob == pytest.approx(float(wanted[77]), abs=1e-5)


@settings(deadline=None, max_examples=100)
@given(
    prompt=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 5), max_size=12),
    top=st.integers(0, 3),
)
def test_prompt_logprobs_are_independent_of_the_chunks(prompt: list[int], cuts: list[int], top: int) -> None:
    logits = np.random.default_rng(len(prompt)).standard_normal((len(prompt), 8)).astype(np.float32)
    found = PromptLogprobs(prompt, top, str)
    start = 0
    for size in [*cuts, len(prompt)]:
        assert found.result() == (
            None,
            *(
                token_logprob(logits[i - 1], prompt[i], top, str)
                for i in range(1, min(start, len(prompt) - 1) + 1)
            ),
        )
        found.add(logits[start : start + size])
        start += size
    assert len(found.result()) == len(prompt)


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = np.full(2000, -np.inf, np.float32)
    logits[[700, 1300]] = 0.0
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), [], 2000)
    assert {sampler.sample(logits) for _ in range(200)} == {700, 1300}
    sampler._rng = type("Edge", (), {"random": staticmethod(lambda: np.nextafter(1.0, 0.0))})()
    assert sampler.sample(logits) == 1300
    sampler._rng = type("Edge", (), {"random": staticmethod(lambda: 0.0)})()
    assert sampler.sample(logits) == 700


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0), [], 3)
    assert sampler.sample(np.array([1.0, 3e38, -3e38], np.float32)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0, np.nan, 1], r"^Sampling: the logit of token 1 is nan, so .* on this machine\.$"),
        ([0, 1, np.inf], r"^Sampling: the logit of token 2 is inf, so .* on this machine\.$"),
        ([-np.inf] * 3, r"^Sampling: every logit is -inf, so there is no token to choose\.$"),
        ([0, 1], r"^Sampling: expected logits of shape \(3,\), found \(2,\)\.$"),
        ([[0, 1, 2]], r"^Sampling: expected logits of shape \(3,\), found \(1, 3\)\.$"),
    ],
)
def test_broken_logits_are_named(logits: list, message: str, temperature: float) -> None:
    with pytest.raises(PrecastError, match=message):
        Sampler(SamplingParams(temperature=temperature), [], 3).sample(np.array(logits, np.float32))


def test_a_penalty_that_overflows_stays_finite() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=1e-30), [0], 2)
    assert sampler.sample(np.array([1e20, 0], np.float32)) == 0
    sampler = Sampler(SamplingParams(repetition_penalty=3e38), [0, 1], 3)
    assert sampler.sample(np.array([-1e20, -1.0, -np.inf], np.float32)) == 1


def test_negative_ids_are_refused() -> None:
    with pytest.raises(PrecastError, match=r"^Sampling: token ids must not be negative, found -1\.$"):
        Sampler(SamplingParams(), [-1], 3)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("max_tokens", 0, "an integer from 1 to 2^63 - 1"),
        ("max_tokens", 1.5, "an integer from 1 to 2^63 - 1"),
        ("max_tokens", True, "an integer from 1 to 2^63 - 1"),
        ("temperature", -0.1, "a finite number of at least 0"),
        ("temperature", math.nan, "a finite number of at least 0"),
        ("temperature", math.inf, "a finite number of at least 0"),
        ("temperature", "1", "a finite number of at least 0"),
        ("top_k", -1, "an integer from 0 to 2^63 - 1"),
        ("top_p", 1.01, "a finite number between 0 and 1"),
        ("top_p", math.nan, "a finite number between 0 and 1"),
        ("min_p", -0.5, "a finite number between 0 and 1"),
        ("presence_penalty", 2.1, "a finite number between -2 and 2"),
        ("presence_penalty", math.nan, "a finite number between -2 and 2"),
        ("frequency_penalty", -2.1, "a finite number between -2 and 2"),
        (
            "frequency_penalty",
            -1e-46,
            "a finite number between -2 and 2 that float32 can represent: 0, or from",
        ),
        ("logprobs", -1, "an integer from 0 to 2^63 - 1"),
        ("prompt_logprobs", True, "an integer from 0 to 2^63 - 1"),
        ("bad_words", "word", "a list of non-empty strings"),
        ("stop_token_ids", 5, "a list of token ids"),
        ("echo", 1, "true or false"),
        ("repetition_penalty", 0.0, "greater than 0"),
        ("repetition_penalty", -1.0, "a finite number of at least 0"),
        ("seed", -1, "an integer from 0 to 2^128 - 1"),
        ("seed", 1.0, "an integer from 0 to 2^128 - 1"),
        ("stop", ("a", ""), "a list of non-empty strings"),
        ("stop", "word", "a list of non-empty strings"),
        ("ignore_eos", 1, "true or false"),
    ],
)
def test_the_error_for_an_invalid_parameter(field: str, value: object, wanted: str) -> None:
    with pytest.raises(
        PrecastError, match=rf"^Sampling parameters: {field} must be {re.escape(wanted)}.*, found .*\.$"
    ):
        SamplingParams(**{field: value})


def test_parameters_are_frozen_and_stop_is_a_tuple() -> None:
    params = SamplingParams(stop=["a", "b"], top_k=np.int64(3), seed=2**80)
    assert params.stop == ("a", "b")
    with pytest.raises(FrozenInstanceError):
        params.top_k = 1


@pytest.mark.parametrize(
    ("bias", "text"),
    [
        ([1, 2], "logit_bias must map token ids to numbers, found [1, 2]."),
        ("1", "logit_bias must map token ids to numbers, found '1'."),
        ({-1: 1}, "a token id of logit_bias must be an integer from 0 to 2^63 - 1, found -1."),
        ({"-1": 1}, "a token id of logit_bias must be an integer from 0 to 2^63 - 1, found '-1'."),
        ({"9" * 5000: 1}, "a token id of logit_bias must be an integer from 0 to 2^63 - 1, found '99999999999"),
        ({1: 100.5}, "a bias of logit_bias must be a finite number between -100 and 100, found 100.5."),
        ({1: math.nan}, "a bias of logit_bias must be a finite number between -100 and 100, found nan."),
        ({1: None}, "a bias of logit_bias must be a finite number between -100 and 100, found None."),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_bias(bias: Any, text: str) -> None:
    with pytest.raises(PrecastError) as raised:
        SamplingParams(logit_bias=bias)
    assert str(raised.value).startswith(f"Sampling parameters: {text}")
    assert len(str(raised.value)) < 200


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(PrecastError) as raised:
        Sampler(SamplingParams(logit_bias={3: 1.0, 2: 1.0}), [], 3)
    assert str(raised.value) == "Sampling parameters: token ids of logit_bias must be from 0 to 2, found 3."


def test_a_bias_is_stored_as_sorted_pairs() -> None:
    params = SamplingParams(logit_bias={"7": 1, np.int64(3): np.float32(-0.5)})
    assert params.logit_bias == ((3, -0.5), (7, 1.0))
    assert replace(params, seed=1).logit_bias == params.logit_bias
    assert hash(params) == hash(SamplingParams(logit_bias=[(3, -0.5), (7, 1)]))


def test_end_tokens() -> None:
    assert SamplingParams(stop_token_ids=[4, 5]).ends({1, 4}) == {1, 4, 5}
    assert SamplingParams(stop_token_ids=[4, 5], ignore_eos=True).ends({1, 4}) == {4, 5}


def test_stop_tokens_wait_for_min_tokens() -> None:
    sampler = Sampler(SamplingParams(stop_token_ids=[1], min_tokens=1), [0], 3, [2])
    logits = np.array([0.0, 2.0, 3.0], np.float32)
    assert [sampler.sample(logits) for _ in range(2)] == [0, 2]


def test_bad_words_are_forbidden_with_and_without_a_space() -> None:
    ids = {"ab": (1, 2), " ab": (3,), "c": (4,), " c": (4,), " ": ()}
    params = SamplingParams(bad_words=["ab", " c", " "], bad_words_ids=[[9]])
    found = params.with_word_ids(lambda text: ids.get(text, ()))
    assert found == SamplingParams(bad_words_ids=[[9], [1, 2], [3], [4]])
    assert found.with_word_ids(lambda text: (0,)) is found


def test_answers_have_seeds_of_their_own() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    assert [p.seed for p in params.for_answers(3)] == [7, 8, 9]
    assert params.for_answers(1) == [params]
    assert [p.seed for p in SamplingParams(seed=2**128 - 1).for_answers(2)] == [2**128 - 1, 0]
    assert SamplingParams(temperature=1.0).for_answers(2) == [SamplingParams(temperature=1.0)] * 2
