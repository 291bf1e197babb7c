"""Failures affect only the failing sequence; and prefixes. The engine has no model."""

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation import together
from precast.loaders.generation.scheduler import Scheduler
from precast.loaders.generation.sequence import TokenSequence


def run(scheduler: Scheduler, *sequences: TokenSequence) -> None:
    """Submit sequences and run steps until nothing is left to do."""
    for sequence in sequences:
        scheduler.submit(sequence)
    while scheduler.step():
        pass


def answer(sequence: TokenSequence) -> list[int]:
    return sequence.tokens[sequence.prompt_tokens :]


# --- failures -----------------------------------------------------------------------------------------------


class Broken:
    """A decoder that fails at its third token."""

    def __init__(self) -> None:
        self._left = 2

    def push(self, token: int) -> str:
        if not self._left:
            raise ValueError("of the decoder")
        self._left -= 1
        return "x"

    def finish(self) -> str:
        return ""


def failing_after(calls: int) -> Callable[[], None]:
    left = iter(range(calls))

    def notify() -> None:
        if next(left, None) is None:
            raise OSError("of the reader")

    return notify


def test_one_failing_sequence_harms_no_other(fake_engine: Any, new_sequence: Any, alone: Any) -> None:
    scheduler = Scheduler(fake_engine(slots=5), caches=1)
    sink = new_sequence([1], notify=failing_after(3))
    decoder = new_sequence([2], decoder=Broken())
    sampler = new_sequence([3], suppress_tokens=tuple(range(40)))
    healthy = [new_sequence([n]) for n in (4, 5)]
    run(scheduler, sink, decoder, sampler, *healthy)
    assert [type(s.error) for s in (sink, decoder, sampler)] == [OSError, ValueError, PrecastError]
    assert (sink.generated, decoder.generated, sampler.generated) == (4, 3, 0)
    assert [(answer(s), s.error) for s in healthy] == [(alone([n]), None) for n in (4, 5)]
    assert scheduler.stats().slots == 0


def test_bad_logits_fail_their_sequence_alone(fake_engine: Any, new_sequence: Any, alone: Any) -> None:
    engine = fake_engine()
    engine.poisoned = 7
    params = {"temperature": 1.0, "seed": 1, "suppress_tokens": (7,)}
    bad, good = new_sequence([7], **params), new_sequence([8], **params)
    run(Scheduler(engine), bad, good)
    assert str(bad.error) == (
        "Sampling: the logit of token 0 is nan, so the model's output cannot be used; run precast verify to find out"
        " whether this artifact computes correctly on this machine."
    )
    assert (answer(good), good.error) == (alone([8], **params), None)


@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_a_failure_of_the_engine_fails_the_sequences_of_its_cache(
    fake_engine: Any, new_sequence: Any, alone: Any, call: str
) -> None:
    engine = fake_engine(slots=2)
    scheduler = Scheduler(engine)
    sequences = [new_sequence([n]) for n in range(3)]  # two in the first cache, one in the second
    for sequence in sequences:
        scheduler.submit(sequence)
    while any(s.generated == 0 for s in sequences):
        scheduler.step()

    def fail(name: str) -> None:
        if name == call:
            raise PrecastError("weights.safetensors: the file was written to.")

    engine.before = fail
    late = new_sequence([9])
    scheduler.submit(late)
    while late.error is None and all(s.error is None for s in sequences):
        scheduler.step()
    failed = [s for s in (*sequences, late) if s.error is not None]
    assert 1 <= len(failed) <= 2
    assert all(str(s.error) == "weights.safetensors: the file was written to." and s.ended for s in failed)
    engine.before = lambda name: None
    run(scheduler, new_sequence([1]))
    for n, sequence in zip((0, 1, 2, 9), (*sequences, late), strict=True):
        assert sequence.error is not None or answer(sequence) == alone([n])
    assert scheduler.stats().slots == 0


def test_a_cache_that_cannot_be_made_fails_its_sequence(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    engine = fake_engine(slots=1)
    scheduler = Scheduler(engine)
    first, second, third = (new_sequence([n]) for n in range(3))
    scheduler.submit(first)
    scheduler.step()

    def fail(name: str) -> None:
        if name == "cache":
            engine.before = lambda name: None
            raise MemoryError

    engine.before = fail
    run(scheduler, second, third)
    assert isinstance(second.error, MemoryError)
    assert [answer(s) for s in (first, third)] == [alone([0]), alone([2])]


def test_ctrl_c_reaches_the_caller_and_fails_what_it_interrupted(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    engine = fake_engine(slots=2)
    scheduler = Scheduler(engine, caches=1)
    running, waiting = [new_sequence([n]) for n in range(2)], new_sequence([2])
    for sequence in (*running, waiting):
        scheduler.submit(sequence)
    for _ in range(3):
        scheduler.step()

    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    engine.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    assert {str(s.error) for s in running} == {
        "generation: interrupted while the model computed, so the answer is incomplete; ask again."
    }
    engine.before = lambda name: None
    run(scheduler)
    assert (answer(waiting), waiting.error) == (alone([2]), None)


def test_ctrl_c_while_a_cache_is_made_leaves_its_sequence_in_the_queue(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    engine = fake_engine()
    scheduler, sequences = Scheduler(engine), [new_sequence([n]) for n in range(2)]
    for sequence in sequences:
        scheduler.submit(sequence)

    def interrupt(name: str) -> None:
        engine.before = lambda name: None
        raise KeyboardInterrupt

    engine.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    assert scheduler.stats().waiting == 2
    run(scheduler)
    assert [answer(s) for s in sequences] == [alone([0]), alone([1])]


def test_ctrl_c_while_a_cancelled_sequence_ends_does_not_keep_its_slot(
    fake_engine: Any, fake_prefixes: Any, new_sequence: Any
) -> None:
    prefixes = fake_prefixes()
    scheduler, sequence = Scheduler(fake_engine(), prefixes=prefixes), new_sequence([1])
    scheduler.submit(sequence)
    scheduler.step()

    def interrupt(*_: Any, **__: Any) -> None:
        del prefixes.capture
        raise KeyboardInterrupt

    prefixes.capture = interrupt
    with pytest.raises(KeyboardInterrupt):
        scheduler.cancel(sequence)
    scheduler.step()
    assert (sequence.ended, scheduler.stats().slots, prefixes.known) == (True, 0, [[1]])


def test_results_dropped_within_a_step_end_after_it(fake_engine: Any, new_sequence: Any, alone: Any) -> None:
    """The garbage collector may close a result's generator in the thread that runs the step."""
    engine = fake_engine()
    scheduler, sequence = Scheduler(engine), new_sequence([3])
    held = [together.results(scheduler, [partial(new_sequence, [n], limit=3 + 20 * n) for n in range(2)], 2)]
    next(held[0])
    engine.before = lambda name: held.clear()
    scheduler.submit(sequence)
    thread = threading.Thread(target=lambda: scheduler.advance(lambda: sequence.ended), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert (answer(sequence), scheduler.stats().running) == (alone([3]), 0)


def test_an_idle_scheduler_keeps_no_sequence_in_memory(fake_engine: Any, new_sequence: Any) -> None:
    scheduler, sequence = Scheduler(fake_engine()), new_sequence([1])
    run(scheduler, sequence)
    scheduler.close(sequence)
    found = weakref.ref(sequence)
    del sequence
    assert found() is None


def test_failures_keep_no_cache_in_memory(fake_engine: Any, new_sequence: Any) -> None:
    engine, made = fake_engine(), list[Any]()
    new_cache = engine.new_cache
    engine.new_cache = lambda: made.append(weakref.ref(cache := new_cache())) or cache

    def fail(name: str) -> None:
        if name == "decode":
            raise RuntimeError

    scheduler, sequences = Scheduler(engine), [new_sequence([1], decoder=Broken()), new_sequence([1])]
    gc.disable()
    run(scheduler, sequences[0])
    engine.before = fail
    run(scheduler, sequences[1])
    gc.enable()
    assert [type(s.error) for s in sequences] == [ValueError, RuntimeError]
    assert [cache() for cache in made] == [None, None]


# --- prefixes -----------------------------------------------------------------------------------------------


def test_a_known_prefix_is_not_read_again(
    fake_engine: Any, fake_prefixes: Any, new_sequence: Any, alone: Any
) -> None:
    engine, prefixes = fake_engine(), fake_prefixes()
    scheduler = Scheduler(engine, prefixes=prefixes)
    common = list(range(20))
    first = new_sequence(common)
    run(scheduler, first)
    assert prefixes.known == [common + answer(first)[:-1]]
    engine.lengths.clear()
    longer, same = new_sequence([*common, 3, 4]), new_sequence(common)
    run(scheduler, longer, same)
    assert engine.lengths == [2, 1]
    assert (longer.cached_tokens, same.cached_tokens, scheduler.stats().cached_tokens) == (20, 19, 39)
    assert [answer(s) for s in (longer, same)] == [alone([*common, 3, 4]), alone(common)]


def test_a_prompt_is_known_to_those_that_wait_behind_it(
    fake_engine: Any, fake_prefixes: Any, new_sequence: Any
) -> None:
    engine = fake_engine()
    common = list(range(20))
    run(Scheduler(engine, prefixes=fake_prefixes()), *(new_sequence([*common, n]) for n in range(3)))
    assert engine.lengths == [8, 8, 5, 1, 1]


def test_each_chunk_is_captured_where_the_next_overwrites_it(
    fake_engine: Any, fake_prefixes: Any, new_sequence: Any
) -> None:
    prefixes = fake_prefixes()
    prefixes.every_chunk = True
    sequence = new_sequence(list(range(20)))
    run(Scheduler(fake_engine(), prefixes=prefixes), sequence)
    assert prefixes.known == [list(range(8)), list(range(16)), list(range(20)) + answer(sequence)[:-1]]


def test_what_a_cancelled_sequence_computed_is_known(
    fake_engine: Any, fake_prefixes: Any, new_sequence: Any
) -> None:
    prefixes = fake_prefixes()
    scheduler, sequence = Scheduler(fake_engine(), prefixes=prefixes), new_sequence(list(range(20)))
    scheduler.submit(sequence)
    scheduler.step()
    scheduler.cancel(sequence)
    assert prefixes.known == [list(range(8))]


def test_a_failing_store_of_prefixes_fails_its_sequence(
    fake_engine: Any, fake_prefixes: Any, new_sequence: Any, alone: Any
) -> None:
    prefixes = fake_prefixes()
    scheduler = Scheduler(fake_engine(), prefixes=prefixes)
    prefixes.restore = lambda *_: 1 / 0
    bad = new_sequence([1])
    run(scheduler, bad)
    assert (type(bad.error), scheduler.stats().slots) == (ZeroDivisionError, 0)
    del prefixes.restore
    good = new_sequence([1])
    run(scheduler, good)
    assert answer(good) == alone([1])
