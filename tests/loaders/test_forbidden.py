"""Forbidden tokens against a plain reference, and against transformers' processors where torch is installed."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.sampling import Sampler, SamplingParams

V = 6  # a small vocabulary makes sequences repeat
TOKEN = st.integers(0, V - 1)
TOKENS = st.lists(TOKEN, max_size=4)
PARAMS = st.builds(
    SamplingParams,
    min_tokens=st.integers(0, 4),
    min_length=st.integers(0, 9),
    no_repeat_ngram_size=st.integers(0, 4),
    suppress_tokens=TOKENS,
    begin_suppress_tokens=TOKENS,
    bad_words_ids=st.lists(st.lists(TOKEN, min_size=1, max_size=3), max_size=4),
    ignore_eos=st.booleans(),
)
NONE_LEFT = (
    "Sampling: suppress_tokens, bad_words_ids, no_repeat_ngram_size and min_tokens leave no token to choose;"
    " relax one of them."
)
PROMPT = st.lists(TOKEN, min_size=1, max_size=8)
ENDS = st.sets(TOKEN, max_size=2)


def attempt(call):
    """Return a call's result and its error message."""
    try:
        return call(), None
    except PrecastError as error:
        return None, str(error)


def reference(params: SamplingParams, prompt: list[int], answer: list[int], ends: set[int]) -> set[int]:
    """Return every token that is forbidden as the next one, computed by the simplest code."""
    text, ends = [*prompt, *answer], set() if params.ignore_eos else ends
    least = len(prompt) + params.min_tokens if params.min_tokens else params.min_length
    found = set(params.suppress_tokens)
    if not answer:
        found |= set(params.begin_suppress_tokens)
    if len(text) < least:
        found |= ends
    for *start, last in params.bad_words_ids:
        if (start or last not in ends) and text[len(text) - len(start) :] == start:
            found.add(last)
    n = params.no_repeat_ngram_size
    grams = [text[i : i + n] for i in range(len(text) - n + 1)] if n else []
    return found | {token for token in range(V) if n and [*text[len(text) - n + 1 :], token] in grams}


def forbidden(params: SamplingParams, prompt: list[int], answer: list[int], ends: set[int]) -> set[int]:
    """Return the tokens that a sampler never chooses as the next one."""
    sampler = Sampler(params, prompt, V, ends)
    for token in answer:
        sampler.observe(token)
    scores, refused = attempt(lambda: sampler._adjusted(np.zeros(V, np.float32)))
    assert refused in (None, NONE_LEFT)
    return set(range(V)) if refused else set(np.flatnonzero(np.isneginf(scores)).tolist())


@settings(deadline=None, max_examples=500)
@given(params=PARAMS, prompt=PROMPT, answer=st.lists(TOKEN, max_size=6), ends=ENDS)
def test_forbidden_tokens_match_the_reference(params, prompt, answer, ends) -> None:
    assert forbidden(params, prompt, answer, ends) == reference(params, prompt, answer, ends)


def processors(torch, params: SamplingParams, prompt: list[int], ends: set[int]):
    """Return transformers' processors for the same settings, in transformers' order."""
    import transformers

    said = transformers.GenerationConfig(
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        bad_words_ids=[list(word) for word in params.bad_words_ids] or None,
        min_length=None if params.min_tokens else params.min_length,
        min_new_tokens=params.min_tokens or None,
        suppress_tokens=list(params.suppress_tokens) or None,
        begin_suppress_tokens=list(params.begin_suppress_tokens) or None,
        repetition_penalty=params.repetition_penalty,
    )
    said._eos_token_tensor = None if params.ignore_eos or not ends else torch.tensor(sorted(ends))
    model = type("Model", (transformers.GenerationMixin,), {})()
    model.config = transformers.PretrainedConfig()
    return model._get_logits_processor(said, input_ids_seq_length=len(prompt), device="cpu")


@settings(deadline=None, max_examples=300)
@given(
    params=PARAMS,
    prompt=PROMPT,
    answer=st.lists(TOKEN, max_size=6),
    ends=ENDS,
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=V, max_size=V),
)
def test_scores_are_those_of_transformers(torch, params, prompt, answer, ends, logits) -> None:
    only_ends = [word for word in params.bad_words_ids if not (len(word) == 1 and word[0] in ends)]
    if params.bad_words_ids and not only_ends:
        return  # transformers refuses a list that is empty after filtering
    row = np.array(logits, np.float32)
    expected = torch.from_numpy(row.copy())[None]
    for step in processors(torch, params, prompt, ends):
        expected = step(torch.tensor([[*prompt, *answer]]), expected)
    found = row.copy()
    found[list(forbidden(params, prompt, answer, ends))] = -np.inf
    np.testing.assert_array_equal(found, expected[0].numpy())


def test_parameters_that_forbid_nothing_are_greedy() -> None:
    assert Sampler(SamplingParams(max_tokens=5, max_length=9, seed=1, ignore_eos=True), [1], V).is_greedy
    for said in (
        {"min_tokens": 1},
        {"min_length": 1},
        {"no_repeat_ngram_size": 9},
        {"suppress_tokens": [1]},
        {"begin_suppress_tokens": [1]},
        {"bad_words_ids": [[1]]},
    ):
        assert not Sampler(SamplingParams(**said), [1], V).is_greedy


def test_the_error_if_no_token_is_left() -> None:
    sampler = Sampler(SamplingParams(suppress_tokens=[0, 1, 99]), [0], 3)
    assert sampler.sample(np.zeros(3, np.float32)) == 2
    with pytest.raises(PrecastError) as raised:
        sampler.sample(np.array([1.0, 1.0, -np.inf], np.float32))
    assert str(raised.value) == NONE_LEFT


@pytest.mark.parametrize(
    ("said", "prompt", "room", "limit"),
    [
        ({}, 5, 20, 20),
        ({"max_tokens": 7}, 5, 20, 7),
        ({"max_tokens": 70}, 5, 20, 20),
        ({"max_length": 7}, 5, 20, 2),
        ({"max_length": 70}, 5, 20, 20),
        ({"max_length": 3, "max_tokens": 7}, 5, 20, 7),
    ],
)
def test_limits(said, prompt, room, limit) -> None:
    assert SamplingParams(**said).limit(prompt, room) == limit


# --- numbers ------------------------------------------------------------------------------------------------

INTEGERS = st.one_of(st.integers(-2, 9), st.sampled_from([2**63 - 1, 2**63, 2**80, 2**128, 10**400]))
NUMBERS = st.one_of(
    st.floats(),
    st.floats(0, 1),
    st.sampled_from(
        [0, 1, -0.0, 5e-324, 1e-300, 1e-45, 1.1754943e-38, 1.2e-38, 3.4e38, 3.5e38, 1e39, 1e308, 10**400]
    ),
    st.sampled_from([np.float16(0.5), np.float32(1e-45), np.float64(1e-300), np.int8(1), np.float16(np.inf)]),
    st.sampled_from([True, False, np.bool_(True), None, "1", [], 1j]),
)
MIXED = st.one_of(INTEGERS, NUMBERS)
ANY = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), NUMBERS),
        **dict.fromkeys(("presence_penalty", "frequency_penalty"), NUMBERS),
        "logit_bias": st.dictionaries(st.integers(-1, V - 1), NUMBERS, max_size=3),
        **dict.fromkeys(("max_tokens", "max_length", "min_tokens", "min_length", "seed"), MIXED),
        **dict.fromkeys(("top_k", "no_repeat_ngram_size"), MIXED),
        **dict.fromkeys(
            ("suppress_tokens", "begin_suppress_tokens"), st.one_of(MIXED, st.lists(MIXED, max_size=3))
        ),
        "bad_words_ids": st.one_of(
            MIXED, st.lists(st.one_of(MIXED, st.lists(MIXED, max_size=3)), max_size=3)
        ),
    },
)
ROW = st.lists(
    st.sampled_from([0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -math.inf]), min_size=V, max_size=V
).filter(lambda row: max(row) > -math.inf)


LARGEST = st.sampled_from([0, 1, 2, 5, 2**63 - 1])
EXTREMES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            ("temperature", "repetition_penalty"), st.sampled_from([1.2e-38, 1e-6, 1, 1.3, 3.4e38])
        ),
        **dict.fromkeys(("top_p", "min_p"), st.sampled_from([0, 1.2e-38, 0.5, 0.9999999, 1])),
        **dict.fromkeys(("top_k", "no_repeat_ngram_size", "min_tokens", "min_length"), LARGEST),
        "seed": st.sampled_from([0, 2**64, 2**128 - 1]),
        "logprobs": st.sampled_from([0, 3, 2**63 - 1]),
        **dict.fromkeys(("presence_penalty", "frequency_penalty"), st.sampled_from([-2, -1.2e-38, 2])),
        "logit_bias": st.dictionaries(TOKEN, st.sampled_from([-100, 0.1, 100]), max_size=3),
        "suppress_tokens": st.lists(LARGEST, max_size=3),
        "bad_words_ids": st.lists(st.lists(LARGEST, min_size=1, max_size=3), max_size=3),
    },
)


@settings(deadline=None, max_examples=1000)
@given(said=st.one_of(ANY, EXTREMES), prompt=PROMPT, ends=ENDS, rows=st.lists(ROW, min_size=1, max_size=4))
def test_accepted_parameters_choose_a_token(said, prompt, ends, rows) -> None:
    """Accepted settings never crash the sampler, warn, or choose an impossible token."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, refused = attempt(lambda: SamplingParams(**said))
        if refused is not None:
            assert refused.startswith("Sampling parameters: ")
            assert len(refused) < 300
            assert "\n" not in refused
            return
        assert all(type(getattr(params, name)) in (int, float, type(None), tuple) for name in said)
        sampler = Sampler(params, prompt, V, ends)
        for row in rows:
            token, refused = attempt(lambda row=row: sampler.sample(np.array(row, np.float32)))
            assert refused in (None, NONE_LEFT)
            assert refused or (0 <= token < V and row[token] > -math.inf)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("temperature", 1e-300, " must be a finite number of at least 0 that float32 can represent: 0, or from"),
        ("repetition_penalty", 1e39, " must be a finite number of at least 0 that float32 can represent"),
        ("repetition_penalty", 10**400, " must be a finite number of at least 0 that float32 can represent"),
        ("top_p", 5e-324, " must be a finite number between 0 and 1 that float32 can represent: 0, or from 1.2e-38"),
        ("min_p", 1e-46, " must be a finite number between 0 and 1 that float32 can represent: 0, or from 1.2e-38"),
        ("top_k", 2**80, "top_k must be an integer from 0 to 2^63 - 1, found 1208925819614629174706176."),
        ("seed", 2**128, "seed must be an integer from 0 to 2^128 - 1, found 340282366920938463463374607431768211456."),
        ("suppress_tokens", [1, -1], "a token id of suppress_tokens must be an integer from 0 to 2^63 - 1, found -1."),
        ("suppress_tokens", 5, "suppress_tokens must be a list of token ids, found 5."),
        ("bad_words_ids", [5], "bad_words_ids must be a list of non-empty lists of token ids, found [5]."),
        ("bad_words_ids", [[]], "bad_words_ids must be a list of non-empty lists of token ids, found [[]]."),
        ("bad_words_ids", [[True]], "a token id of bad_words_ids must be an integer from 0 to 2^63 - 1, found True."),
        ("temprature", 1.0, "found the unknown parameter 'temprature'; use one of max_tokens, max_length, min_tokens,"),
        ("self", 1, "found the unknown parameter 'self'; use one of max_tokens, max_length, min_tokens,"),
    ],
)  # fmt: skip
def test_the_error_for_a_number_out_of_range(field, value, text) -> None:
    with pytest.raises(PrecastError) as raised:
        SamplingParams(**{field: value})
    assert str(raised.value).startswith(f"Sampling parameters: {field if text[0] == ' ' else ''}{text}")


def test_parameters_must_be_named() -> None:
    with pytest.raises(PrecastError) as raised:
        SamplingParams(0.7)
    assert str(raised.value) == (
        "Sampling parameters: expected keyword arguments such as temperature=0.7, found the positional argument 0.7."
    )


def test_the_constructor_s_signature_lists_the_fields() -> None:
    import dataclasses
    import inspect

    found = inspect.signature(SamplingParams).parameters
    assert list(found) == [field.name for field in dataclasses.fields(SamplingParams)]
    assert str(found["max_tokens"]) == "max_tokens: int | None = None"
    assert {parameter.kind for parameter in found.values()} == {inspect.Parameter.KEYWORD_ONLY}
