"""Many generations at once: answers are those of each prompt alone; order, failures, threads and event loops."""

import asyncio
import copy
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.generation.scheduler import Scheduler
from precast.loaders.generation.stream import Completion, Stream

VOCAB = 320
FREE = SamplingParams(ignore_eos=True, max_tokens=12)
SAMPLED = SamplingParams(ignore_eos=True, max_tokens=9, temperature=1.0, seed=3)


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, VOCAB, 1 + 5 * n % 50).tolist() for n in range(count)]


@pytest.fixture(scope="module")
def alone(tiny_model: Model) -> Callable[..., Completion]:
    """Return a function that generates an answer alone, and remembers it."""
    known: dict[Any, Completion] = {}

    def generate(ids: list[int], params: SamplingParams = FREE) -> Completion:
        key = (tuple(ids), params)
        if key not in known:
            known[key] = tiny_model.generate(ids, params)
        return known[key]

    return generate


def same(found: Completion, expected: Completion) -> bool:
    return dataclasses.replace(found, timing=expected.timing) == expected


# --- many prompts -------------------------------------------------------------------------------------------


def test_completions_come_in_the_order_of_the_prompts(tiny_model: Model, alone: Any) -> None:
    params = [FREE if n % 3 else SAMPLED for n in range(10)]
    found = tiny_model.generate_many(prompts(10), params)
    assert [c.prompt_token_ids for c in found] == [tuple(ids) for ids in prompts(10)]
    for completion, ids, chosen in zip(found, prompts(10), params, strict=True):
        assert same(completion, alone(ids, chosen))
    assert tiny_model.scheduler.stats().slots == 0


def test_no_prompts_give_no_completions(tiny_model: Model) -> None:
    assert tiny_model.generate_many([]) == []


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    limits=st.lists(st.integers(1, 12), min_size=8, max_size=8),
    seed=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_answers_as_each_prompt_alone(
    tiny_model: Model, alone: Any, lengths: list[int], limits: list[int], seed: int
) -> None:
    ids = [np.random.default_rng([seed, n]).integers(0, VOCAB, n).tolist() for n in lengths]
    params = [dataclasses.replace(FREE, max_tokens=n) for n in limits[: len(ids)]]
    for found, prompt, chosen in zip(tiny_model.generate_many(ids, params), ids, params, strict=True):
        assert found.token_ids == alone(prompt).token_ids[: chosen.max_tokens]


def test_results_come_as_they_complete(tiny_model: Model, alone: Any) -> None:
    params = [dataclasses.replace(FREE, max_tokens=n) for n in (12, 1, 5)]
    found = list(tiny_model.generate_each(prompts(3), params))
    assert [index for index, _ in found] == [1, 2, 0]
    for index, completion in found:
        assert isinstance(completion, Completion)
        assert completion.token_ids == alone(prompts(3)[index]).token_ids[: params[index].max_tokens]


def test_prompts_are_taken_when_a_slot_is_free(tiny_model: Model) -> None:
    taken: list[int] = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield [7, len(taken)]

    results = tiny_model.generate_each(endless(), dataclasses.replace(FREE, max_tokens=2))
    first = [index for index, _ in itertools.islice(results, 4)]
    assert sorted(first) == [0, 1, 2, 3]
    assert len(taken) <= 4 + tiny_model.engine.slots
    results.close()  # type: ignore[attr-defined]
    assert tiny_model.scheduler.stats().slots == 0


def test_a_failing_prompt_leaves_the_others_alone(tiny_model: Model, alone: Any) -> None:
    bad = dataclasses.replace(FREE, suppress_tokens=tuple(range(VOCAB)))
    found = dict(tiny_model.generate_each([[1], [], [2], [3]], [FREE, FREE, bad, FREE]))
    assert str(found[1]) == "prompt: expected at least one token, found none; give the model some text."
    assert str(found[2]) == (
        "Sampling: suppress_tokens, bad_words_ids, no_repeat_ngram_size and min_tokens leave no token to choose; relax"
        " one of them."
    )
    assert same(found[0], alone([1]))  # type: ignore[arg-type]
    assert same(found[3], alone([3]))  # type: ignore[arg-type]


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(PrecastError) as raised:
        work()
    return str(raised.value)


def test_a_prompt_that_cannot_be_continued_is_named_before_any_work(tiny_model: Model) -> None:
    before = tiny_model.scheduler.stats().steps
    assert refusal(lambda: tiny_model.generate_many([[1], [2, VOCAB]])) == (
        "prompts[1]: expected token ids from 0 to 319, found 320 at index 1."
    )
    assert refusal(lambda: tiny_model.generate_many([[1], [2]], [FREE])) == (
        "params: expected 2 sets of parameters (one for each prompt), found 1; give one set for all prompts, or one for"
        " each."
    )
    assert refusal(lambda: tiny_model.generate_many("the cat")) == (
        "prompts: expected a list of prompts, found a single prompt; pass it to generate instead."
    )
    assert refusal(lambda: tiny_model.generate_many([1, 2])) == (  # type: ignore[list-item]
        "prompts[0]: expected text or token ids, found int."
    )
    assert tiny_model.scheduler.stats().steps == before


def test_a_failure_while_generating_names_its_prompt_and_ends_the_others(tiny_model: Model) -> None:
    bad = dataclasses.replace(FREE, suppress_tokens=tuple(range(VOCAB)))
    assert refusal(lambda: tiny_model.generate_many([[1], [2]], [FREE, bad])) == (
        "prompts[1]: Sampling: suppress_tokens, bad_words_ids, no_repeat_ngram_size and min_tokens leave no token to"
        " choose; relax one of them."
    )
    assert tiny_model.scheduler.stats().slots == 0


# --- streams ------------------------------------------------------------------------------------------------


def test_sixteen_threads_stream_at_once(tiny_model: Model, alone: Any) -> None:
    expected = [alone(ids) for ids in prompts(16)]
    streams = [tiny_model.stream(ids, FREE) for ids in prompts(16)]
    threads = [threading.Thread(target=stream.finish) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(same(s.completion, e) for s, e in zip(streams, expected, strict=True))
    assert tiny_model.scheduler.stats().slots == 0


def test_streams_share_their_steps(tiny_model: Model) -> None:
    before = tiny_model.scheduler.stats().steps
    streams = [tiny_model.stream([n], FREE) for n in range(3)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.finish()
    assert tiny_model.scheduler.stats().steps - before <= 3 + 12 + 2


async def read(stream: Stream, most: int) -> str:
    text = ""
    for _ in range(most):
        text += await anext(stream, "")
    return text


def test_twenty_tasks_with_cancellations(tiny_model: Model, alone: Any) -> None:
    """Every third task is cancelled at a random moment; all other tasks get complete answers."""
    expected = [alone(ids) for ids in prompts(20)]
    streams = [tiny_model.stream(ids, FREE) for ids in prompts(20)]

    async def use() -> list[Any]:
        tasks = [asyncio.create_task(read(stream, 20)) for stream in streams]
        for n, task in enumerate(tasks):
            if n % 3 == 0:
                await asyncio.sleep(0.002)
                task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    for n, (found, stream) in enumerate(zip(asyncio.run(use()), streams, strict=True)):
        if isinstance(found, asyncio.CancelledError):
            assert n % 3 == 0
            assert expected[n].token_ids[: len(stream.completion.token_ids)] == stream.completion.token_ids
        else:
            assert (found, stream.completion.token_ids) == (expected[n].text, expected[n].token_ids)
    assert tiny_model.scheduler.stats().slots == 0


def test_twenty_requests_to_a_server(slots_model: Model) -> None:
    """One thread runs the steps of a scheduler with one KV cache; tasks read, cancel, and run out of time."""
    server = copy.copy(slots_model)
    server.scheduler = Scheduler(slots_model.engine, caches=1, prefixes=slots_model.prefixes)
    lengths = np.random.default_rng(20).integers(1, 30, 20).tolist()
    ids = [[7] * (n % 5) + prompt for n, prompt in enumerate(prompts(20))]
    limits = [dataclasses.replace(FREE, max_tokens=length) for length in lengths]
    expected = [slots_model.generate(*request).token_ids for request in zip(ids, limits, strict=True)]
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            server.scheduler.step() or time.sleep(0.001)

    async def answer(n: int) -> Completion:
        timeout_s = {1: 1e-6, 2: 0.01}.get(n % 5)
        async with server.stream(ids[n], dataclasses.replace(limits[n], timeout_s=timeout_s)) as stream:
            async for _ in stream:
                if n % 5 == 3 and len(stream.completion.token_ids) > lengths[n] // 2:
                    break
            return stream.completion

    async def use() -> list[Completion]:
        return await asyncio.wait_for(asyncio.gather(*map(answer, range(20))), 120)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    found = asyncio.run(use())
    is_over.set()
    thread.join(60)
    for n, (completion, tokens) in enumerate(zip(found, expected, strict=True)):
        assert completion.token_ids == tokens[: len(completion.token_ids)]
        assert n % 5 in (1, 2, 3) or (completion.token_ids, completion.finish_reason) == (tokens, "length")
    assert (server.scheduler.stats().waiting, server.scheduler.stats().slots) == (0, 0)


def test_pieces_that_are_ready_need_no_thread(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (tiny_model.stream([n], FREE) for n in (1, 2))
    next(second)
    first.finish()  # advances the second, too
    ready = len(second._sequence.unread)
    assert ready > 5

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(asyncio.BaseEventLoop, "run_in_executor", refuse)
    assert asyncio.run(read(second, 1))
    assert len(second._sequence.unread) < ready
    second.close()


def test_a_failure_of_the_engine_reaches_every_reader_and_frees_the_slots(
    tiny_model: Model, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [tiny_model.stream([n], FREE) for n in range(2)]
    for stream in streams:
        next(stream)

    def broken(*_: Any) -> None:
        raise PrecastError("weights.safetensors: the file was written to.")

    monkeypatch.setattr(tiny_model.engine, "decode", broken)
    for _ in range(2):
        for stream in streams:
            assert refusal(stream.finish) == "weights.safetensors: the file was written to."
    assert tiny_model.scheduler.stats().slots == 0
    monkeypatch.undo()
    assert same(tiny_model.generate([1], FREE), alone([1]))


# --- what a request asks for --------------------------------------------------------------------------------


def test_time_runs_out(tiny_model: Model) -> None:
    found = tiny_model.generate([1, 2], dataclasses.replace(FREE, timeout_s=1e-9))
    assert (found.finish_reason, found.text, found.token_ids) == ("timeout", "", ())


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "1", 10**9 + 1])
def test_time_limits_that_are_refused(value: Any) -> None:
    assert refusal(lambda: SamplingParams(timeout_s=value)) == (
        f"Sampling parameters: timeout_s must be a number above 0 and at most 1000000000, found {value!r}."
    )


def test_the_echo_of_the_prompt_comes_first(tiny_model: Model, alone: Any) -> None:
    ids = tiny_model.tokenizer.encode("the quick brown fox")
    stream = tiny_model.stream(ids, dataclasses.replace(FREE, echo=True))
    assert next(stream) == "the quick brown fox"
    assert stream.finish().text == "the quick brown fox" + alone(ids).text
    assert stream.completion.token_ids == alone(ids).token_ids


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
def test_log_probabilities_of_prompt_and_answer(tiny_model: Model, reference: Any, length: int) -> None:
    ids = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    found = tiny_model.generate(ids, dataclasses.replace(FREE, logprobs=2, prompt_logprobs=0))
    logits = reference([*ids, *found.token_ids]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    records = [*found.prompt_logprobs, *found.logprobs]
    assert records[0] is None
    assert [r.token_id for r in records[1:] if r] == [*ids[1:], *found.token_ids]
    for place, record in enumerate(records[1:]):
        assert record is not None
        assert record.logprob == pytest.approx(expected[place, record.token_id], abs=1e-3)
    assert {len(r.top) for r in found.logprobs} == {2}
    assert found.logprobs[0].top[0].token_id == found.token_ids[0]


def test_without_a_request_there_are_no_log_probabilities(alone: Any) -> None:
    assert (alone([1]).logprobs, alone([1]).prompt_logprobs) == ((), ())
