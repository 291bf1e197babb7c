"""Random schedules: sequences join, leave, lag, fail or miss deadlines, and each answer is that of its prompt alone."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.generation.scheduler import Scheduler
from precast.loaders.generation.sequence import TokenSequence

requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 39), min_size=1, max_size=30),
        "limit": st.integers(1, 20),
        "ends": st.lists(st.integers(0, 39), max_size=4),
        "most_unread": st.sampled_from([1, 2, 7, None]),
        "timeout_s": st.sampled_from([None, None, None, 3.0, 20.0]),
        "params": st.sampled_from(
            [
                {},
                {},
                {"temperature": 1.0, "seed": 5, "top_k": 4},
                {"repetition_penalty": 1.3},
                {"temperature": 0.7, "seed": 6, "no_repeat_ngram_size": 1},
            ]
        ),
        "fails_after": st.sampled_from([None, None, None, 0, 3]),
    }
)
numbers = st.integers(0, 30)
operations = st.one_of(
    st.tuples(st.just("submit"), requests),
    st.tuples(st.just("submit"), requests),
    st.tuples(st.just("step"), numbers),
    st.tuples(st.just("step"), numbers),
    st.tuples(st.just("read"), numbers),
    st.tuples(st.just("cancel"), numbers),
    st.tuples(st.just("close"), numbers),
    st.tuples(st.just("wait"), numbers),
    st.tuples(st.just("break"), st.sampled_from(["prefill", "decode", "cache"])),
)


class Run:
    """A scheduler under test, with the sequences submitted so far and the tokens that their readers took."""

    def __init__(self, engine: Any, scheduler: Scheduler, clock: list[float]) -> None:
        self.engine, self.scheduler, self.clock = engine, scheduler, clock
        self.requests: list[dict[str, Any]] = []
        self.sequences: list[TokenSequence] = []
        self.taken: list[list[int]] = []

    def submit(self, request: dict[str, Any], new_sequence: Callable[..., TokenSequence]) -> None:
        left = iter(range(0 if request["fails_after"] is None else request["fails_after"]))

        def notify() -> None:
            if request["fails_after"] is not None and next(left, None) is None:
                raise OSError("of the reader")

        sequence = new_sequence(
            request["prompt"],
            limit=request["limit"],
            ends=request["ends"],
            most_unread=request["most_unread"],
            timeout_s=request["timeout_s"],
            wants_drafts=True,
            notify=notify,
            **request["params"],
        )
        self.requests.append(request)
        self.sequences.append(sequence)
        self.taken.append([])
        self.scheduler.submit(sequence)

    def read(self, place: int) -> None:
        unread = self.sequences[place].unread
        while unread:
            piece = unread.popleft()
            if piece.token is not None:
                self.taken[place].append(piece.token)

    def break_next(self, call: str) -> None:
        def fail(name: str) -> None:
            if name == call:
                self.engine.before = lambda name: None
                raise RuntimeError("of the engine")

        self.engine.before = fail

    def do(self, operation: tuple[str, Any], new_sequence: Callable[..., TokenSequence]) -> None:
        name, argument = operation
        if name == "submit":
            self.submit(argument, new_sequence)
        elif name == "step":
            for _ in range(argument):
                self.scheduler.step()
        elif name == "wait":
            self.clock[0] += argument / 4
        elif name == "break":
            self.break_next(argument)
        elif self.sequences:
            place = argument % len(self.sequences)
            if name == "read":
                self.read(place)
            else:
                getattr(self.scheduler, name)(self.sequences[place])
                assert self.sequences[place].ended

    def finish(self) -> None:
        """Read all tokens until all sequences have ended."""
        for _ in range(10_000):
            for place in range(len(self.sequences)):
                self.read(place)
            if not self.scheduler.step() and all(s.ended for s in self.sequences):
                return
        pytest.fail("a sequence starved")


def check_places(scheduler: Scheduler, bound: int | None, slots: int) -> None:
    stats = scheduler.stats()
    assert stats.running <= stats.slots
    assert bound is None or stats.slots <= bound * slots
    places = [(id(b), s.slot) for b in scheduler._batches for s in b.running()]
    assert len(set(places)) == len(places) == stats.running


@given(
    schedule=st.lists(operations, max_size=40),
    bound=st.sampled_from([None, 1, 2]),
    slots=st.integers(1, 4),
    has_prefixes=st.booleans(),
    drafting=st.sampled_from([{}, {"score_tokens": 6, "memory": 1}, {"score_tokens": 2, "memory": 2}]),
)
@settings(max_examples=400, deadline=None)
def test_every_answer_is_that_of_its_prompt_alone(
    fake_engine: Any,
    fake_prefixes: Any,
    new_sequence: Any,
    alone: Any,
    schedule: Any,
    bound: int | None,
    slots: int,
    has_prefixes: bool,
    drafting: dict[str, int],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = [1000.0]
        patch.setattr(time, "perf_counter", lambda: clock[0])
        engine = fake_engine(slots=slots, **drafting)
        prefixes = fake_prefixes() if has_prefixes else None
        run = Run(engine, Scheduler(engine, caches=bound, prefixes=prefixes), clock)
        for operation in schedule:
            run.do(operation, new_sequence)
            check_places(run.scheduler, bound, slots)
        run.finish()
    assert (run.scheduler.stats().slots, run.scheduler.stats().waiting) == (0, 0)
    for request, sequence, taken in zip(run.requests, run.sequences, run.taken, strict=True):
        expected = alone(
            request["prompt"],
            limit=request["limit"],
            ends=request["ends"],
            memory=drafting.get("memory", 1000),
            **request["params"],
        )
        assert taken == expected[: len(taken)]
        if sequence.reason in ("stop", "length") and sequence.error is None:
            assert taken == expected
        elif sequence.error is None:
            assert sequence.reason == "timeout" or sequence.closing
