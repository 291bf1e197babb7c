"""Readers of a scheduler with fewer slots than sequences: none of them starves. The engine has no model."""

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.scheduler import Scheduler
from precast.loaders.generation.sequence import TokenSequence
from precast.loaders.generation.stream import Completion, Stream

LONGEST_S = 60


class Interrupt(BaseException):
    """An interrupt other than KeyboardInterrupt and SystemExit."""


def finished(work: Callable[[], object]) -> object:
    """Return the result of a function that is run in a thread; fail if it takes too long."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(LONGEST_S)
    assert found, "a reader starved"
    return found[0]


def test_a_reader_that_lags_holds_up_no_sequence_that_waits_for_a_slot(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    scheduler = Scheduler(fake_engine(slots=2), caches=1)
    lagging = [new_sequence([n], limit=30, most_unread=2) for n in range(2)]
    for sequence in lagging:
        scheduler.submit(sequence)
    while scheduler.step():
        pass
    assert [len(s.unread) for s in lagging] == [2, 2]  # no other sequence waits for their slots
    patient = new_sequence([5], limit=3)
    scheduler.submit(patient)
    while scheduler.step():
        pass
    assert (patient.ended, patient.tokens[1:]) == (True, alone([5], limit=3))
    assert lagging[0].ended
    assert [p.token for p in lagging[0].unread] == alone([0], limit=30)


def test_one_thread_may_read_more_streams_than_there_are_slots(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    scheduler = Scheduler(fake_engine(slots=2), caches=1)
    streams = [Stream(scheduler, new_sequence([n], limit=20, most_unread=4)) for n in range(7)]
    found = finished(lambda: list(zip(*streams, strict=True)))
    assert isinstance(found, list)
    assert len(found) == 20
    assert [list(s.completion.token_ids) for s in streams] == [alone([n], limit=20) for n in range(7)]


async def collect(stream: Stream) -> list[int]:
    async for _ in stream:
        await asyncio.sleep(0)
    return list(stream.completion.token_ids)


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_need_no_thread_each(fake_engine: Any, new_sequence: Any, alone: Any, workers: int) -> None:
    scheduler = Scheduler(fake_engine(slots=2), caches=1)
    streams = [Stream(scheduler, new_sequence([n], limit=20, most_unread=4)) for n in range(12)]

    async def use() -> list[list[int]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(workers))
        return await asyncio.gather(*map(collect, streams))

    assert finished(lambda: asyncio.run(use())) == [alone([n], limit=20) for n in range(12)]
    assert scheduler.stats().slots == 0


def test_a_task_gets_its_pieces_while_others_wait_for_a_slot(fake_engine: Any, new_sequence: Any) -> None:
    """With a thread for each task, the second piece of the first stream would wait for another stream's first."""
    engine = fake_engine(slots=1)
    engine.before = lambda name: time.sleep(0.001)
    scheduler = Scheduler(engine, caches=1)
    streams = [Stream(scheduler, new_sequence([n], limit=30, most_unread=4)) for n in range(4)]
    order: list[int] = []

    async def read(n: int) -> None:
        async for _ in streams[n]:
            order.append(n)

    async def use() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        await asyncio.gather(*map(read, range(4)))

    finished(lambda: asyncio.run(use()))
    last_of_first = len(order) - 1 - order[::-1].index(0)
    assert set(order[: last_of_first - 5]) == {0}


def test_event_loops_of_several_threads_share_a_scheduler(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    scheduler = Scheduler(fake_engine(slots=2), caches=1)
    found: dict[int, list[list[int]]] = {}

    def serve(first: int) -> None:
        async def use() -> list[list[int]]:
            own = [new_sequence([n], limit=15, most_unread=3) for n in range(first, first + 4)]
            return await asyncio.gather(*(collect(Stream(scheduler, s)) for s in own))

        found[first] = asyncio.run(use())

    threads = [threading.Thread(target=serve, args=(4 * n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST_S)
    assert found == {4 * n: [alone([k], limit=15) for k in range(4 * n, 4 * n + 4)] for n in range(4)}


def test_an_interrupted_step_reaches_the_tasks(fake_engine: Any, new_sequence: Any, alone: Any) -> None:
    engine = fake_engine(slots=2)
    scheduler, all_wait = Scheduler(engine, caches=1), threading.Event()

    def interrupt(name: str) -> None:
        all_wait.wait(LONGEST_S)
        if name == "decode":
            engine.before = lambda name: None
            raise Interrupt

    engine.before = interrupt

    async def use() -> list[Any]:
        streams = [Stream(scheduler, new_sequence([n])) for n in range(4)]
        tasks = [asyncio.create_task(collect(stream)) for stream in streams]
        await asyncio.sleep(0)
        all_wait.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = finished(lambda: asyncio.run(use()))
    assert isinstance(found, list)
    # The sequences in the slots fail, and this wakes the tasks that wait for a slot.
    assert {type(result) for result in found} <= {PrecastError, Interrupt}
    stream = Stream(scheduler, new_sequence([9]))
    assert finished(lambda: asyncio.run(collect(stream))) == alone([9])


def test_an_executor_that_is_shut_down_fails_the_tasks(fake_engine: Any, new_sequence: Any) -> None:
    scheduler = Scheduler(fake_engine(), caches=1)

    async def use() -> list[Any]:
        executor = ThreadPoolExecutor(1)
        executor.shutdown()
        asyncio.get_running_loop().set_default_executor(executor)
        streams = [Stream(scheduler, new_sequence([n])) for n in range(3)]
        return await asyncio.gather(*map(collect, streams), return_exceptions=True)

    found = finished(lambda: asyncio.run(use()))
    assert isinstance(found, list)
    assert [str(error) for error in found] == ["cannot schedule new futures after shutdown"] * 3


@contextmanager
def busy_executor() -> Iterator[ThreadPoolExecutor]:
    """Yield an executor whose only thread is busy, so that further jobs stay in the queue."""
    executor, is_over = ThreadPoolExecutor(1), threading.Event()
    executor.submit(is_over.wait)
    try:
        yield executor
    finally:
        is_over.set()
        executor.shutdown()


def test_a_cancelled_job_of_the_executor_fails_the_tasks(fake_engine: Any, new_sequence: Any) -> None:
    scheduler = Scheduler(fake_engine(), caches=1)

    async def use() -> list[Any]:
        with busy_executor() as executor:
            asyncio.get_running_loop().set_default_executor(executor)
            streams = [Stream(scheduler, new_sequence([n])) for n in range(3)]
            tasks = [asyncio.create_task(collect(stream)) for stream in streams]
            await asyncio.sleep(0)
            executor.shutdown(wait=False, cancel_futures=True)
            return await asyncio.gather(*tasks, return_exceptions=True)

    found = finished(lambda: asyncio.run(use()))
    assert isinstance(found, list)
    assert [str(error) for error in found] == ["the event loop's executor was shut down"] * 3


def test_a_sequence_runs_ahead_of_a_busy_reader(fake_engine: Any, new_sequence: Any, alone: Any) -> None:
    """The model computes until the sequence pauses, even if no reader waits; the thread then ends."""
    scheduler = Scheduler(fake_engine(), caches=1)
    sequence = new_sequence([1], limit=30, most_unread=4)
    stream = Stream(scheduler, sequence)

    async def use() -> tuple[int, list[int]]:
        loop = asyncio.get_running_loop()
        await anext(stream)
        end = time.monotonic() + LONGEST_S
        while loop in scheduler.async_readers._loops and time.monotonic() < end:
            await asyncio.sleep(0.001)
        return len(sequence.unread), await collect(stream)

    assert finished(lambda: asyncio.run(use())) in [(n, alone([1], limit=30)) for n in (3, 4)]


def test_one_call_wakes_all_readers_of_a_step(fake_engine: Any, new_sequence: Any, alone: Any) -> None:
    class CountingLoop(asyncio.SelectorEventLoop):
        """An event loop that records the number of readers that each call wakes."""

        def __init__(self) -> None:
            super().__init__()
            self.woken: list[int] = []

        def call_soon_threadsafe(self, callback: Any, *given: Any, **options: Any) -> asyncio.Handle:
            self.woken += [len(each) for each in given if isinstance(each, list)]
            return super().call_soon_threadsafe(callback, *given, **options)

    engine, loop = fake_engine(slots=4), CountingLoop()
    scheduler = Scheduler(engine, caches=1)
    sequences = [new_sequence([n], limit=9) for n in range(4)]
    streams = [Stream(scheduler, sequence) for sequence in sequences]

    def all_wait(name: str) -> None:
        end, running = time.monotonic() + LONGEST_S, sum(not sequence.ended for sequence in sequences)
        while len(scheduler.async_readers._loops[loop].waiting) < running:
            assert time.monotonic() < end
            time.sleep(0.001)

    engine.before = all_wait

    async def use() -> list[list[int]]:
        return await asyncio.gather(*map(collect, streams))

    def run() -> list[list[int]]:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(use())

    assert finished(run) == [alone([n], limit=9) for n in range(4)]
    assert max(loop.woken) == 4


def abandoned_loop(
    stream: Stream, executor: ThreadPoolExecutor, stopped: Callable[[], None]
) -> "weakref.ref[asyncio.AbstractEventLoop]":
    """Close an event loop while a task waits for a stream; return a reference to the loop.

    `stopped` is called between the last step of the loop and its end.
    """
    loop = asyncio.new_event_loop()
    loop.set_default_executor(executor)
    task = loop.create_task(collect(stream))
    loop.run_until_complete(asyncio.sleep(0))
    stopped()
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio would log an error
    return weakref.ref(loop)


def test_a_closed_loop_is_forgotten(fake_engine: Any, new_sequence: Any, alone: Any) -> None:
    scheduler = Scheduler(fake_engine(), caches=1)
    with busy_executor() as executor:
        stop = partial(executor.shutdown, wait=False, cancel_futures=True)
        loop = abandoned_loop(Stream(scheduler, new_sequence([1])), executor, stop)
    assert finished(lambda: asyncio.run(collect(Stream(scheduler, new_sequence([9]))))) == alone([9])
    gc.collect()
    assert loop() is None


def test_the_garbage_collector_may_close_a_reader_under_the_lock(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    class CollectingLoop(asyncio.SelectorEventLoop):
        """An event loop that collects garbage when a reader, under the lock, looks it up."""

        waits = False

        def create_future(self) -> asyncio.Future[Any]:
            self.waits = True
            return super().create_future()

        def __hash__(self) -> int:
            if self.waits:
                self.waits = False
                gc.collect()
            return id(self)

    engine, executor, may_step = fake_engine(), ThreadPoolExecutor(1), threading.Event()
    engine.before = lambda name: may_step.wait()
    scheduler = Scheduler(engine, caches=1)

    def stop() -> None:
        may_step.set()
        executor.shutdown()  # wait for the steps that serve the reader

    def use() -> tuple[bool, list[int], bool]:
        gc.disable()
        gc.freeze()  # the objects of earlier tests would make each collection slow
        try:
            closed = abandoned_loop(Stream(scheduler, new_sequence([1])), executor, stop)
            was_garbage = closed() is not None
            with asyncio.Runner(loop_factory=CollectingLoop) as runner:
                found = runner.run(collect(Stream(scheduler, new_sequence([9]))))
            return was_garbage, found, closed() is None
        finally:
            gc.unfreeze()
            gc.enable()

    assert finished(use) == (True, alone([9]), True)


# --- as a server runs it ------------------------------------------------------------------------------------


@contextmanager
def stepping(scheduler: Scheduler) -> Iterator[None]:
    """Run steps in one thread."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            if not scheduler.step():
                time.sleep(0.0005)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(LONGEST_S)


class Notified:
    """The reader of a sequence that is woken by its `notify`."""

    def __init__(self, scheduler: Scheduler, make: Callable[..., TokenSequence]) -> None:
        loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._scheduler = scheduler
        self._sequence = make(notify=lambda: loop.call_soon_threadsafe(self._news.set))
        self._is_submitted = False

    async def pieces(self, most: int) -> list[int]:
        """Return up to this many tokens."""
        if not self._is_submitted:
            self._is_submitted = True
            self._scheduler.submit(self._sequence)
        found: list[int] = []
        while len(found) < most:
            has_ended = self._sequence.ended
            while self._sequence.unread and len(found) < most:
                token = self._sequence.unread.popleft().token
                found += [] if token is None else [token]
            if has_ended and not self._sequence.unread:
                break
            if not self._sequence.unread:
                await self._news.wait()
                self._news.clear()
        return found

    def cancel(self) -> None:
        self._scheduler.cancel(self._sequence)

    @property
    def reason(self) -> str:
        return self._sequence.reason


class Streamed:
    """The reader of a sequence through a stream."""

    def __init__(self, scheduler: Scheduler, make: Callable[..., TokenSequence]) -> None:
        self._scheduler, self._sequence = scheduler, make()
        self._stream = Stream(scheduler, self._sequence)

    async def pieces(self, most: int) -> list[int]:
        before = len(self._stream.completion.token_ids)
        for _ in range(most):
            if await anext(self._stream, None) is None:
                break
        return list(self._stream.completion.token_ids[before:])

    def cancel(self) -> None:
        self._scheduler.cancel(self._sequence)

    @property
    def reason(self) -> str:
        found: Completion = self._stream.completion
        return found.finish_reason


@pytest.mark.parametrize("kind", [Notified, Streamed])
@pytest.mark.parametrize("seed", range(6))
def test_twenty_requests_over_two_slots(
    fake_engine: Any, fake_prefixes: Any, new_sequence: Any, alone: Any, kind: Any, seed: int
) -> None:
    """With random lengths, paces, cancellations and deadlines, all requests end, with the tokens of each alone."""
    choose = random.Random(seed)
    engine = fake_engine(slots=2, score_tokens=4, memory=2)
    engine.before = lambda name: time.sleep(0.0002)
    scheduler = Scheduler(engine, caches=1, prefixes=fake_prefixes())
    shared = [choose.randrange(40) for _ in range(9)]

    async def request(n: int) -> tuple[list[int], str, list[int], int]:
        prompt = [*shared[: choose.randrange(10)], n, *(choose.randrange(40) for _ in range(n % 20))]
        limit, pace, fate = choose.randint(1, 30), choose.choice((1, 3, 99)), n % 5
        timeout_s = {1: 1e-6, 2: 0.02}.get(fate)

        def make(**given: Any) -> TokenSequence:
            return new_sequence(
                prompt, limit=limit, most_unread=choose.choice((1, 4, None)), timeout_s=timeout_s,
                wants_drafts=True, **given,
            )  # fmt: skip

        reader = kind(scheduler, make)
        await asyncio.sleep(choose.random() / 100)
        found: list[int] = []
        while piece := await reader.pieces(pace):
            found += piece
            if fate == 3 and len(found) > limit // 2:
                reader.cancel()
            await asyncio.sleep(choose.random() / 1000)
        return found, reader.reason, prompt, limit

    async def use() -> list[Any]:
        return await asyncio.gather(*map(request, range(20)))

    with stepping(scheduler):
        results = finished(lambda: asyncio.run(use()))
    assert isinstance(results, list)
    for n, (found, reason, prompt, limit) in enumerate(results):
        expected = alone(prompt, limit=limit, memory=2)
        assert found == expected[: len(found)]
        if n % 5 in (0, 4):
            assert (found, reason) == (expected, "length")
        elif n % 5 in (1, 2):
            assert reason in ("timeout", "length")
        else:
            assert reason in ("unfinished", "length")
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.slots) == (0, 0, 0)
