"""The scheduler's order, its KV caches, the ends of sequences, and threads, on an engine without a model."""

import itertools
import threading
import time
from typing import Any

import pytest

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


# --- order --------------------------------------------------------------------------------------------------


def test_sequences_together_answer_as_alone(fake_engine: Any, new_sequence: Any, alone: Any) -> None:
    engine = fake_engine()
    prompts = [list(range(n)) for n in (1, 4, 5, 8, 9, 30)]
    sequences = [new_sequence(ids) for ids in prompts]
    run(Scheduler(engine, caches=1), *sequences)
    assert [answer(s) for s in sequences] == [alone(ids) for ids in prompts]
    assert {s.reason for s in sequences} == {"length"}
    assert max(len(slots) for name, slots in engine.calls if name == "decode") == 3


def test_sequences_share_each_decode_step(fake_engine: Any, new_sequence: Any) -> None:
    """Together, three answers of 8 tokens take 7 steps after the prompts; the last answer starts one step later."""
    engine = fake_engine()
    run(Scheduler(engine), *(new_sequence([n], limit=8) for n in range(3)))
    names = [name for name, _ in engine.calls]
    assert (names.count("cache"), names.count("prefill"), names.count("decode")) == (1, 3, 8)


def test_at_most_one_chunk_is_read_between_two_tokens(fake_engine: Any, new_sequence: Any) -> None:
    engine = fake_engine(context=200)
    scheduler = Scheduler(engine)
    first = new_sequence([1], limit=60)
    scheduler.submit(first)
    scheduler.step()
    run(scheduler, new_sequence([2] * 100), new_sequence([3] * 90))
    names = [name for name, slots in engine.calls[1:] if name == "prefill" or 0 in slots][:60]
    assert names[:4] == ["prefill", "prefill", "decode", "prefill"]
    assert not any(pair == ("prefill", "prefill") for pair in itertools.pairwise(names[1:]))


def test_prompts_are_read_in_the_order_of_arrival(fake_engine: Any, new_sequence: Any) -> None:
    """A short prompt does not overtake a long one; prompts are computed one at a time."""
    scheduler = Scheduler(fake_engine(slots=8))
    order: list[str] = []
    lengths = {"long": 40, "short": 1, "middle": 12}
    sequences = {
        name: new_sequence([1] * n, notify=lambda name=name: order.append(name), limit=3)
        for name, n in lengths.items()
    }
    run(scheduler, *sequences.values())
    assert list(dict.fromkeys(order)) == ["long", "short", "middle"]


def test_chunks_are_large_alone_and_small_while_others_decode(fake_engine: Any, new_sequence: Any) -> None:
    engine = fake_engine(buckets=(16, 128, 512), context=4096)
    scheduler = Scheduler(engine)
    run(scheduler, new_sequence([1] * 1000, limit=40))
    assert engine.lengths == [512, 488]
    engine.lengths.clear()
    scheduler.submit(new_sequence([2], limit=40))
    scheduler.step()
    run(scheduler, new_sequence([3] * 300))
    assert engine.lengths == [1, 128, 128, 44]


def test_with_a_bound_sequences_wait_for_a_slot_in_order(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    engine = fake_engine(slots=2)
    scheduler = Scheduler(engine, caches=1)
    sequences = [new_sequence([n], limit=3 + n) for n in range(7)]
    ended: list[int] = []
    for sequence in sequences:
        scheduler.submit(sequence)
    while scheduler.step():
        ended += [i for i, s in enumerate(sequences) if s.ended and i not in ended]
        stats = scheduler.stats()
        assert (stats.running <= 2, stats.slots in (0, 2)) == (True, True)
    assert sorted(ended) == ended == list(range(7))
    assert [answer(s) for s in sequences] == [alone([n], limit=3 + n) for n in range(7)]
    assert [name for name, _ in engine.calls].count("cache") == 1


def test_without_a_bound_a_further_cache_serves_further_sequences(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    engine = fake_engine(slots=2)
    scheduler = Scheduler(engine)
    sequences = [new_sequence([n]) for n in range(5)]
    run(scheduler, *sequences)
    assert [answer(s) for s in sequences] == [alone([n]) for n in range(5)]
    assert [name for name, _ in engine.calls].count("cache") == 3


def test_a_sequence_whose_reader_lags_sits_out(fake_engine: Any, new_sequence: Any, alone: Any) -> None:
    scheduler = Scheduler(fake_engine())
    slow, fast = new_sequence([1], limit=20, most_unread=4), new_sequence([2], limit=20)
    run(scheduler, slow, fast)
    assert (len(slow.unread), slow.ended, fast.ended) == (4, False, True)
    for _ in range(3):
        slow.unread.popleft()
    while scheduler.step():
        pass
    assert len(slow.unread) == 4
    slow.unread.clear()
    while not slow.ended:
        slow.unread.clear()
        assert scheduler.step()
    assert answer(slow) == alone([1], limit=20)


# --- ends ---------------------------------------------------------------------------------------------------


def test_the_end_token_and_a_stop_string_end_a_sequence(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    expected = alone([5], limit=12)
    end, stop = expected[4], "".join(chr(ord("A") + t) for t in expected[2:4])
    by_end, by_stop = new_sequence([5], limit=12, ends=[end]), new_sequence([5], limit=12, stop=(stop,))
    run(Scheduler(fake_engine()), by_end, by_stop)
    assert (answer(by_end), by_end.reason) == (expected[:5], "stop")
    assert (answer(by_stop), by_stop.reason) == (expected[:4], "stop")
    assert "".join(p.text for p in by_stop.unread) == "".join(chr(ord("A") + t) for t in expected[:2])


def test_a_sequence_that_is_cancelled_frees_its_slot_at_once(fake_engine: Any, new_sequence: Any) -> None:
    scheduler = Scheduler(fake_engine(slots=2), caches=1)
    reading, decoding, waiting = new_sequence([1] * 30), new_sequence([2]), new_sequence([3], limit=2)
    for sequence in (decoding, reading, waiting):
        scheduler.submit(sequence)
    scheduler.step()
    scheduler.step()
    scheduler.step()
    assert (0 < reading.filled < 30, scheduler.stats().running) == (True, 2)
    scheduler.cancel(reading)
    assert (reading.ended, reading.reason, scheduler.stats().running) == (True, "unfinished", 1)
    scheduler.close(decoding)
    assert (decoding.ended, scheduler.stats().slots) == (True, 0)
    while scheduler.step():
        pass
    assert (len(answer(waiting)), waiting.reason) == (2, "length")


def test_a_waiting_sequence_can_be_cancelled(fake_engine: Any, new_sequence: Any) -> None:
    scheduler = Scheduler(fake_engine(slots=1), caches=1)
    first, second = new_sequence([1]), new_sequence([2])
    scheduler.submit(first)
    scheduler.submit(second)
    scheduler.step()
    scheduler.cancel(second)
    assert (second.ended, scheduler.stats().waiting) == (True, 0)
    run(scheduler)
    assert (first.generated, second.generated) == (8, 0)


def test_a_sequence_cancelled_before_it_arrives_takes_no_slot(fake_engine: Any, new_sequence: Any) -> None:
    engine = fake_engine()
    scheduler, sequence = Scheduler(engine), new_sequence([1])
    scheduler.cancel(sequence)
    run(scheduler, sequence)
    assert (sequence.ended, engine.calls) == (True, [])


@pytest.mark.parametrize("state", ["waiting", "reading", "decoding"])
def test_time_runs_out(
    fake_engine: Any, new_sequence: Any, alone: Any, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(fake_engine(slots=1), caches=1)
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    if state == "waiting":
        scheduler.submit(new_sequence([9], limit=40))
        scheduler.step()
    sequence = new_sequence([1] * (20 if state == "reading" else 3), limit=40, timeout_s=5, stop=("ZZ",))
    scheduler.submit(sequence)
    for _ in range(2):
        scheduler.step()
    count = sequence.generated
    assert (count > 0, sequence.filled > 0) == (state == "decoding", state != "waiting")
    now[0] += 4.9
    scheduler.step()
    assert not sequence.ended
    now[0] += 0.2
    scheduler.step()
    assert (sequence.ended, sequence.reason, sequence.error) == (True, "timeout", None)
    assert (
        answer(sequence) == alone(sequence.tokens[: sequence.prompt_tokens], limit=40)[: sequence.generated]
    )


def test_text_held_back_is_shown_when_the_time_runs_out(
    fake_engine: Any, new_sequence: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = chr(ord("A") + alone([1])[0])
    sequence = new_sequence([1], timeout_s=5, stop=(first + "never",))
    scheduler, now = Scheduler(fake_engine()), [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    scheduler.submit(sequence)
    scheduler.step()
    assert [p.text for p in sequence.unread] == [""]
    now[0] += 6
    scheduler.step()
    assert [tuple(p) for p in sequence.unread] == [(alone([1])[0], ""), (None, first)]


# --- threads ------------------------------------------------------------------------------------------------


def test_the_reader_of_one_sequence_advances_all(fake_engine: Any, new_sequence: Any) -> None:
    scheduler = Scheduler(fake_engine())
    first, second = new_sequence([1]), new_sequence([2], limit=4)
    scheduler.submit(first)
    scheduler.submit(second)
    scheduler.advance(lambda: first.ended)
    assert (second.ended, second.generated) == (True, 4)


def test_many_threads_read_and_close(fake_engine: Any, new_sequence: Any, alone: Any) -> None:
    engine = fake_engine(slots=4)
    engine.before = lambda name: time.sleep(0.0005)
    scheduler = Scheduler(engine, caches=2)
    found: dict[int, list[int]] = {}

    def read(n: int) -> None:
        sequence = new_sequence([n, n], limit=25, most_unread=3)
        tokens = found[n] = []
        scheduler.submit(sequence)
        while True:
            scheduler.advance(sequence.has_news)
            if sequence.ended and not sequence.unread:
                return
            tokens.append(sequence.unread.popleft().token)
            if n % 3 == 0 and len(tokens) == n:
                scheduler.close(sequence)
                return

    threads = [threading.Thread(target=read, args=(n,)) for n in range(1, 33)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for n, tokens in found.items():
        expected = alone([n, n], limit=25)
        assert tokens == (expected[:n] if n % 3 == 0 else expected)
    assert scheduler.stats().slots == scheduler.stats().running == 0


def test_a_thread_waits_while_the_only_sequence_pauses_for_its_reader(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    scheduler, slow = Scheduler(fake_engine(slots=1), caches=1), new_sequence([1], most_unread=1)
    scheduler.submit(slow)
    waiter = threading.Thread(target=scheduler.advance, args=(lambda: slow.ended,))
    waiter.start()
    time.sleep(0.02)
    assert (slow.generated, waiter.is_alive()) == (1, True)
    found: list[int] = []
    while not slow.ended or slow.unread:
        if slow.unread:
            found.append(slow.unread.popleft().token)
    waiter.join(60)
    assert found == alone([1])


# --- an idle KV cache ---------------------------------------------------------------------------------------


def caches(engine: Any) -> int:
    return sum(name == "cache" for name, _ in engine.calls)


def test_an_idle_cache_serves_the_next_sequence(
    fake_engine: Any, fake_prefixes: Any, new_sequence: Any, alone: Any
) -> None:
    engine = fake_engine()
    scheduler = Scheduler(engine, prefixes=fake_prefixes(spare_bytes=100))
    for prompt in ([1], [2, 3], [4]):
        sequence = new_sequence(prompt)
        run(scheduler, sequence)
        assert answer(sequence) == alone(prompt)
        assert scheduler.stats().slots == 0
    assert caches(engine) == 1


def test_a_cache_that_takes_much_memory_is_freed(
    fake_engine: Any, fake_prefixes: Any, new_sequence: Any
) -> None:
    """For the limit, a slot counts with the largest number of positions filled in it since the cache was created."""
    engine = fake_engine()
    scheduler = Scheduler(engine, prefixes=fake_prefixes(spare_bytes=30))
    run(scheduler, *(new_sequence([n], limit=10) for n in range(3)))  # 10 positions in each of 3 slots
    run(scheduler, new_sequence([7], limit=5))
    assert caches(engine) == 1
    run(scheduler, new_sequence([8], limit=11))
    run(scheduler, new_sequence([9], limit=5))
    assert caches(engine) == 2


def test_a_cache_is_freed_after_a_failure_or_without_prefixes(
    fake_engine: Any, fake_prefixes: Any, new_sequence: Any
) -> None:
    for prefixes, failing in ((None, False), (fake_prefixes(spare_bytes=100), True)):
        engine = fake_engine()
        scheduler = Scheduler(engine, prefixes=prefixes)
        if failing:
            engine.before = lambda name: 1 / 0 if name == "decode" else None
        run(scheduler, new_sequence([1]))
        engine.before = lambda name: None
        run(scheduler, new_sequence([1]))
        assert caches(engine) == 2
