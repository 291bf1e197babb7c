"""Generation: its end, its cost, and the independence of generations."""

import dataclasses
import gc
import itertools
import sys
import time

import numpy as np
import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import SamplingDefaults
from precast.loaders.generation.engine import DecodeRow
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load

CONTEXT, VOCAB = 64, 320
PROMPT = [7, 200, 31]
FREE = SamplingParams(ignore_eos=True)


def with_manifest(model: Model, *, eos=None, sampling=None) -> Model:
    """Return the same model with other end tokens or sampling defaults in its manifest."""
    manifest = model.manifest
    if eos is not None:
        tokenizer = dataclasses.replace(manifest.tokenizer, eos_token_ids=tuple(eos))
        manifest = dataclasses.replace(manifest, tokenizer=tokenizer)
    if sampling is not None:
        manifest = dataclasses.replace(manifest, sampling=SamplingDefaults(**sampling))
    return Model(
        engine=model.engine, tokenizer=model.tokenizer, manifest=manifest, target=model.target, compiles=0
    )


@pytest.fixture(scope="module")
def free(tiny_model):
    """Return the greedy answer to PROMPT, up to the end of the context."""
    return tiny_model.generate(PROMPT, FREE)


def test_the_answer_is_the_reference_s(free, reference):
    best = reference([*PROMPT, *free.token_ids]).argmax(-1)
    assert list(free.token_ids) == best[len(PROMPT) - 1 : -1].tolist()
    assert len(set(free.token_ids)) > 5  # otherwise, the tests with this answer prove little


def test_the_fields_of_a_completion(free, tiny_model):
    assert free.prompt_token_ids == tuple(PROMPT)
    assert free.text == tiny_model.tokenizer.decode(free.token_ids)
    assert free.timing.prefill_s > 0
    assert free.timing.decode_s > 0
    assert free.timing.decode_tokens_per_s == pytest.approx((len(free.token_ids) - 1) / free.timing.decode_s)


def test_text_and_its_tokens_are_the_same_prompt(tiny_model):
    text = "the quick brown fox"
    ids = tiny_model.tokenizer.encode(text)
    assert tiny_model.generate(text, FREE).token_ids == tiny_model.generate(ids, FREE).token_ids


@pytest.mark.parametrize("kind", [tuple, np.array, lambda ids: np.array(ids, np.uint16)])
def test_ids_may_be_any_sequence_of_integers(tiny_model, free, kind):
    found = tiny_model.generate(kind(PROMPT), FREE)
    assert found.token_ids == free.token_ids
    assert [type(token) for token in found.prompt_token_ids] == [int] * 3


@pytest.mark.parametrize("params", [{}, {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.3}])
def test_log_probabilities_are_those_of_the_reference(tiny_model, reference, params):
    """They are the model's own for any sampling parameters; those of the prompt come from the same computation."""
    found = tiny_model.generate(
        PROMPT, SamplingParams(ignore_eos=True, max_tokens=20, logprobs=3, prompt_logprobs=2, **params)
    )
    plain = tiny_model.generate(PROMPT, SamplingParams(ignore_eos=True, max_tokens=20, **params))
    assert (found.token_ids, found.text) == (plain.token_ids, plain.text)
    assert plain.logprobs == plain.prompt_logprobs == ()
    logits = reference([*PROMPT, *found.token_ids]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    answer, prompt = found.logprobs, found.prompt_logprobs
    assert prompt[0] is None
    assert [r.token_id for r in (*prompt[1:], *answer)] == [*PROMPT[1:], *found.token_ids]
    for place, record in enumerate((*prompt[1:], *answer)):
        for token in (record, *record.top):
            assert token.logprob == pytest.approx(expected[place, token.token_id], abs=1e-3)
            assert token.text == tiny_model.tokenizer.token_text(token.token_id)
        tops = [token.logprob for token in record.top]
        assert tops == sorted(tops, reverse=True)
        assert len(tops) == (2 if place < len(PROMPT) - 1 else 3)
        assert tops[0] == pytest.approx(expected[place].max(), abs=1e-3)


def test_answers_to_one_prompt_share_its_reading(tiny_model):
    params = SamplingParams(ignore_eos=True, temperature=1.5, seed=4, max_tokens=12)
    prompt = [9, 8, 7, 6, 5, 4, 3, 2]
    found = tiny_model.generate_answers(prompt, 4, params)
    alone = [tiny_model.generate(prompt, dataclasses.replace(params, seed=4 + i)) for i in range(4)]
    assert [f.token_ids for f in found] == [f.token_ids for f in alone]
    assert len({f.token_ids for f in found}) == 4
    # The last token of the prompt gives the logits.
    assert [f.timing.cached_tokens for f in found[1:]] == [len(prompt) - 1] * 3


# --- the end ------------------------------------------------------------------------------------------------


def test_the_end_token_ends_a_generation_and_is_not_in_the_text(tiny_model, free):
    end = next(token for token in free.token_ids if tiny_model.tokenizer.decode([token]).isascii())
    cut = free.token_ids.index(end)
    model = with_manifest(tiny_model, eos=[end])
    found = model.generate(PROMPT, SamplingParams())
    assert found.finish_reason == "stop"
    assert found.token_ids == free.token_ids[: cut + 1]
    assert found.text == tiny_model.tokenizer.decode(free.token_ids[:cut])
    assert model.generate(PROMPT, FREE).token_ids == free.token_ids


def test_any_of_several_end_tokens_ends_a_generation(tiny_model, free):
    ends = set(free.token_ids[2:6])
    cut = next(i for i, token in enumerate(free.token_ids) if token in ends)
    found = with_manifest(tiny_model, eos=sorted(ends)).generate(PROMPT, SamplingParams())
    assert (found.token_ids, found.finish_reason) == (free.token_ids[: cut + 1], "stop")


def test_a_stop_token_ends_a_generation(tiny_model, free):
    stop = free.token_ids[3]
    cut = free.token_ids.index(stop)
    found = tiny_model.generate(PROMPT, dataclasses.replace(FREE, stop_token_ids=[VOCAB - 1, stop]))
    assert (found.token_ids, found.finish_reason) == (free.token_ids[: cut + 1], "stop")
    assert found.text == tiny_model.tokenizer.decode(free.token_ids[:cut])


def test_bad_words_never_occur(tiny_model, free):
    word = next(w for w in map(tiny_model.tokenizer.token_text, free.token_ids) if w.isascii() and w.strip())
    found = tiny_model.generate(PROMPT, dataclasses.replace(FREE, bad_words=[word.strip()]))
    banned = {tuple(tiny_model.tokenizer.encode(text)) for text in (word.strip(), " " + word.strip())}
    assert found.token_ids != free.token_ids
    for ids in banned:
        places = range(len(found.token_ids) - len(ids) + 1)
        assert all(found.token_ids[i : i + len(ids)] != ids for i in places)


def test_an_end_token_as_the_first_token_gives_no_text(tiny_model, free):
    found = with_manifest(tiny_model, eos=free.token_ids[:1]).generate(PROMPT, SamplingParams())
    assert (found.text, found.token_ids, found.finish_reason) == ("", free.token_ids[:1], "stop")
    assert found.timing.decode_tokens_per_s == 0


def test_a_stop_string_across_tokens_ends_a_generation_and_is_not_shown(tiny_model, free):
    """The stop string consists of the end of one token's text and the start of the next one's."""
    pieces = [tiny_model.tokenizer.decode([token]) for token in free.token_ids]
    place = next(
        i
        for i in range(1, len(pieces) - 1)
        if all(p and "\N{REPLACEMENT CHARACTER}" not in p for p in pieces[i : i + 2])
        and pieces[i][-1] + pieces[i + 1][0] not in tiny_model.tokenizer.decode(free.token_ids[: i + 1])
    )
    stop = pieces[place][-1] + pieces[place + 1][0]
    stream = tiny_model.stream(PROMPT, SamplingParams(ignore_eos=True, stop=("never said", stop)))
    shown = list(stream)
    found = stream.completion
    assert found.finish_reason == "stop"
    assert found.token_ids == free.token_ids[: place + 2]
    assert found.text == "".join(shown) == tiny_model.tokenizer.decode(free.token_ids[: place + 1])[:-1]


def test_a_stop_string_that_never_occurs_loses_no_text(tiny_model, free):
    last = free.text[-1]
    found = tiny_model.generate(PROMPT, SamplingParams(ignore_eos=True, stop=(last + "no more",)))
    assert (found.text, found.finish_reason) == (free.text, "length")


@pytest.mark.parametrize("count", [1, 2, 10])
def test_max_tokens_ends_a_generation(tiny_model, free, count):
    found = tiny_model.generate(PROMPT, dataclasses.replace(FREE, max_tokens=count))
    assert found.finish_reason == "length"
    assert found.token_ids == free.token_ids[:count]


@pytest.mark.parametrize("length", [1, 2, 62, 63])
@pytest.mark.parametrize("wanted", [None, 1000])
def test_a_full_context_ends_a_generation(tiny_model, length, wanted):
    found = tiny_model.generate([3] * length, dataclasses.replace(FREE, max_tokens=wanted))
    assert found.finish_reason == "length"
    assert len(found.prompt_token_ids) + len(found.token_ids) == CONTEXT


def test_an_end_token_at_the_last_position_is_a_stop(tiny_model, free):
    """The finish reason is "stop" if an end token fills the context."""
    once = [t for t in free.token_ids if free.token_ids.count(t) == 1]
    end = once[-1]
    cut = free.token_ids.index(end)
    params = SamplingParams(max_tokens=cut + 1)
    assert with_manifest(tiny_model, eos=[end]).generate(PROMPT, params).finish_reason == "stop"


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "prompt: expected at least one token, found none; give the model some text."),
        ([], "prompt: expected at least one token, found none; give the model some text."),
        (np.array([], int), "prompt: expected at least one token, found none; give the model some text."),
        ([1] * CONTEXT, "prompt: 64 tokens leave no room in a context of 64; shorten it to 63 or fewer, or"),
        ([1] * 100_000, "prompt: 100000 tokens leave no room in a context of 64"),
        ("fox " * 500, "tokens leave no room in a context of 64"),
        ([1, VOCAB], "prompt: expected token ids from 0 to 319, found 320 at index 1."),
        ([-1], "prompt: expected token ids from 0 to 319, found -1 at index 0."),
        ([5, 6, 2**31], "prompt: expected token ids from 0 to 319, found 2147483648 at index 2."),
        (
            [10**30],
            "prompt: expected token ids from 0 to 319, found 1000000000000000000000000000000 at index 0",
        ),
        ([1.5], "prompt: expected token ids from 0 to 319, found 1.5 at index 0."),
        ([float("nan")], "prompt: expected token ids from 0 to 319, found nan at index 0."),
        ([True], "prompt: expected token ids from 0 to 319, found True at index 0."),
        ([None], "prompt: expected token ids from 0 to 319, found None at index 0."),
        (["12"], "prompt: expected token ids from 0 to 319, found '12' at index 0."),
        ("half \ud83d", "expected text in UTF-8, found other bytes"),
    ],
)
@pytest.mark.parametrize("how", ["generate", "stream"])
def test_prompts_that_cannot_be_continued(tiny_model, prompt, text, how):
    """`stream` raises at once, before the first piece."""
    with pytest.raises(PrecastError) as raised:
        getattr(tiny_model, how)(prompt)
    assert text in str(raised.value)


def test_chats_are_rendered_and_checked_as_prompts(tiny_model):
    messages = [{"role": "user", "content": "the cat"}]
    ids = tiny_model.chat_prompt(messages)
    assert tiny_model.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tiny_model.chat(messages, FREE).token_ids == tiny_model.generate(ids, FREE).token_ids
    assert tiny_model.chat(messages, FREE).prompt_token_ids == tuple(ids)
    with pytest.raises(PrecastError, match="leave no room in a context of 64"):
        tiny_model.chat([{"role": "user", "content": "the cat " * 100}])


def test_sampling_defaults_that_are_out_of_range_are_refused(tiny_model):
    with pytest.raises(PrecastError) as raised:
        with_manifest(tiny_model, sampling={"temperature": -1.0}).generate(PROMPT)
    assert "temperature must be a finite number of at least 0" in str(raised.value)


def test_the_model_s_own_sampling_defaults_are_used(tiny_model):
    model = with_manifest(tiny_model, sampling={"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.5})
    expected = SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.5)
    assert model.default_sampling() == expected
    assert isinstance(model.default_sampling().top_k, int)
    greedy = with_manifest(tiny_model, sampling={"repetition_penalty": 1.5})
    assert (
        greedy.generate(PROMPT).token_ids
        == tiny_model.generate(PROMPT, SamplingParams(repetition_penalty=1.5)).token_ids
    )


def test_a_prompt_that_reaches_the_largest_length_is_refused(tiny_model):
    params = SamplingParams(max_length=3, ignore_eos=True)
    with pytest.raises(PrecastError) as raised:
        tiny_model.stream(PROMPT, params)
    assert str(raised.value) == (
        "prompt: 3 tokens leave no room in a max_length of 3; raise max_length, or give max_tokens instead."
    )
    params = dataclasses.replace(params, max_length=5)
    assert len(tiny_model.generate(PROMPT, params).token_ids) == 2


# --- seeds and streams --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_tokens(tiny_model, free):
    def sampled(seed):
        params = SamplingParams(temperature=1.5, seed=seed, ignore_eos=True)
        return tiny_model.generate(PROMPT, params).token_ids

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(5)} | {free.token_ids}) == 6


def test_concurrent_streams_are_independent(tiny_model):
    prompts = [PROMPT, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], PROMPT]
    alone = [tiny_model.generate(ids, FREE) for ids in prompts]
    streams = [tiny_model.stream(ids, FREE) for ids in prompts]
    pieces = [[] for _ in streams]
    for round_ in itertools.zip_longest(*streams):
        for shown, piece in zip(pieces, round_, strict=True):
            shown.append(piece or "")
    for stream, shown, expected in zip(streams, pieces, alone, strict=True):
        assert "".join(shown) == expected.text
        assert stream.completion.token_ids == expected.token_ids


def test_leaving_a_stream_early_ends_its_work(tiny_model, free):
    stream = tiny_model.stream(PROMPT, FREE)
    next(iter(stream))
    iter(stream).close()
    assert stream.completion.finish_reason == "unfinished"
    assert tiny_model.generate(PROMPT, FREE).token_ids == free.token_ids


def test_a_model_with_slots_generates_in_the_first(slots_model, free):
    assert slots_model.generate(PROMPT, FREE).token_ids == free.token_ids


# --- cost ---------------------------------------------------------------------------------------------------


def calls_of(work) -> int:
    """Count calls of Python functions and of C functions."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # exclude finalisers of other tests' garbage
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_python_s_work_per_token_does_not_grow_with_the_model(depths):
    def step(model) -> int:
        cache = model.engine.new_cache()
        model.engine.prefill(PROMPT, cache)
        model.engine.decode([DecodeRow(0, 5, 3)], cache)
        return calls_of(lambda: model.engine.decode([DecodeRow(0, 5, 4)], cache))

    def token(model) -> float:
        def generate(count):
            return lambda: model.generate(PROMPT, dataclasses.replace(FREE, max_tokens=count))

        generate(2)()
        return (calls_of(generate(41)) - calls_of(generate(1))) / 40

    models = [load(depths[n]) for n in (2, 12)]
    assert len({step(model) for model in models}) == 1
    # The models generate different tokens, so the number of text pieces differs.
    shallow, deep = map(token, models)
    assert 5 < shallow < 200
    assert deep == pytest.approx(shallow, rel=0.1)


def test_bytes_and_empty_text_are_not_prompts(tiny_model):
    with pytest.raises(PrecastError, match=r"expected text or token ids, found bytes; decode them first"):
        tiny_model.stream(b"ab")
    with pytest.raises(PrecastError, match=r"expected at least one token, found none"):
        tiny_model.stream("")


def test_the_time_of_a_stream_s_reader_is_not_counted(tiny_model):
    stream = tiny_model.stream([7, 200, 31], SamplingParams(max_tokens=12, ignore_eos=True))
    began = time.perf_counter()
    for _ in stream:
        time.sleep(0.05)
    took = time.perf_counter() - began
    timing = stream.completion.timing
    assert timing.prefill_s + timing.decode_s <= took - 0.05


class Unfinished:
    """A decoder whose tokens never complete a character."""

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return "\ufffd"


@pytest.mark.parametrize(("stop", "text", "reason"), [("\ufffd", "", "stop"), ("x", "\ufffd", "length")])
def test_a_stop_string_completed_by_the_tail_is_a_stop(tiny_model, monkeypatch, stop, text, reason):
    monkeypatch.setattr(tiny_model.tokenizer, "stream", lambda shown: Unfinished())
    answer = tiny_model.generate([7, 200, 31], SamplingParams(max_tokens=3, ignore_eos=True, stop=(stop,)))
    assert (answer.text, answer.finish_reason) == (text, reason)
