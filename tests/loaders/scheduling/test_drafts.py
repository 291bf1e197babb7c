"""Drafts: the lookup, the decision to verify a draft, and answers that are the same without drafts."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precast.loaders.generation.drafts import CallTimes, Drafts
from precast.loaders.generation.scheduler import Scheduler

TEXT = list(range(100, 140))


def proposals(drafts: Drafts, tokens: Sequence[int], begin: int, most: int = 15) -> list[list[int]]:
    """Return the draft at each length of a text, as if each token had been decoded separately."""
    return [drafts.propose(tokens[:n], most) for n in range(begin, len(tokens) + 1)]


def test_a_repeated_text_is_guessed_in_drafts_that_grow_with_the_match() -> None:
    found = proposals(Drafts(CallTimes(16)), [*TEXT, 1, 2, *TEXT], begin=len(TEXT) + 2)
    lengths = [len(draft) for draft in found]
    assert not any(lengths[:3])
    assert lengths[30] == 15
    for place, draft in enumerate(found[:30]):
        assert draft == [*TEXT, 1, 2, *TEXT][place : place + len(draft)]


def test_a_period_is_continued_beyond_the_known_tokens() -> None:
    tokens = [1, 2, 3] * 8
    *_, draft = proposals(Drafts(CallTimes(16)), tokens, begin=3)
    assert draft == [1, 2, 3] * 5


def test_the_longest_match_is_followed_and_of_equal_ones_the_latest() -> None:
    drafts = Drafts(CallTimes(16))
    tokens = [5, 6, 7, 8, 9, 10, 11, 12, 1, 9, 10, 30, 2, 9, 10, 31]
    drafts.propose([*tokens, 5, 6, 7, 8], 15)  # these tokens occurred before, followed by 9
    assert drafts.propose([*tokens, 5, 6, 7, 8, 9, 10], 1) in ([], [11])
    assert drafts._source == tokens.index(11)
    other = Drafts(CallTimes(16))
    other.propose([*tokens, 3, 9, 10], 15)
    assert other._source == tokens.index(31)


def test_text_without_repetition_is_never_guessed() -> None:
    assert not any(proposals(Drafts(CallTimes(16)), list(range(300)), begin=1))


def test_lookups_that_were_wrong_stop_drafts_and_right_ones_bring_them_back() -> None:
    drafts, wrong = Drafts(CallTimes(16)), list[int]()
    for n in range(40):
        wrong += [1, 2, 3, 4, 50 + n]  # the same four tokens, followed by another token each time
    lengths = [len(draft) for draft in proposals(drafts, wrong, begin=1)]
    after_four = lengths[4::5]
    assert max(after_four[20:]) <= 1
    right = [*wrong, *TEXT, *TEXT, *TEXT]
    assert max(len(draft) for draft in proposals(drafts, right, begin=len(wrong))) == 15


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60), most=st.integers(1, 15))
def test_a_draft_continues_an_earlier_occurrence_of_the_latest_tokens(tokens: list[int], most: int) -> None:
    for n, draft in enumerate(proposals(Drafts(CallTimes(16)), tokens, begin=1, most=most), 1):
        assert len(draft) <= most
        if draft:
            known = tokens[:n]
            pairs = [i for i in range(2, n) if known[i - 2 : i] == known[-2:]]
            assert any(all(g == (known + draft)[i + j] for j, g in enumerate(draft)) for i in pairs)


# --- times --------------------------------------------------------------------------------------------------


def test_calls_that_cost_too_much_are_left_out_and_tried_again_later() -> None:
    times = CallTimes(16)
    for _ in range(20):
        times.add(1, 0.010)
        for count in range(2, 17):
            times.add(count, 0.010 * 20)
    drafts = Drafts(times)
    assert not any(proposals(drafts, [*TEXT, *TEXT], begin=1))
    for _ in range(3000):
        times.add(1, 0.010)
    assert any(proposals(drafts, [*TEXT, *TEXT, *TEXT], begin=2 * len(TEXT)))


def test_times_are_those_measured() -> None:
    times = CallTimes(16)
    assert [times.ratio(n) for n in (1, 4)] == [1.0, 1.5]
    for _ in range(60):
        times.add(8, 1.0)  # there is no time of a decode step yet
    assert times.ratio(8) == pytest.approx(1 + 7 / 6)
    times.add(1, 0.004)
    for _ in range(60):
        times.add(8, 0.008)
    assert times.ratio(8) == pytest.approx(2, rel=0.01)
    assert times.ratio(1) == 1


# --- generation ---------------------------------------------------------------------------------------------


def run(scheduler: Scheduler, *sequences: Any) -> None:
    for sequence in sequences:
        scheduler.submit(sequence)
    while scheduler.step():
        pass


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock, so that all calls count with their assumed times."""
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.3, "seed": 4}, {"repetition_penalty": 0.9}, {"no_repeat_ngram_size": 30}],
)
def test_answers_with_drafts_are_those_without_in_fewer_calls(
    fake_engine: Any, new_sequence: Any, alone: Any, still: None, params: dict[str, Any]
) -> None:
    engine = fake_engine(context=500, score_tokens=16, memory=1)
    sequence = new_sequence([1, 2, 3], limit=300, wants_drafts=True, **params)
    run(Scheduler(engine), sequence)
    assert sequence.tokens[3:] == alone([1, 2, 3], limit=300, memory=1, **params)
    if not params:  # the answer is a cycle
        names = [name for name, _ in engine.calls]
        assert names.count("decode") + names.count("score") < 80


def test_a_draft_never_exceeds_the_limit_or_the_context(
    fake_engine: Any, new_sequence: Any, alone: Any, still: None
) -> None:
    for limit in range(30, 50):
        engine = fake_engine(context=50, score_tokens=16, memory=1)
        sequence = new_sequence([9], limit=limit, wants_drafts=True)
        run(Scheduler(engine), sequence)
        assert sequence.tokens[1:] == alone([9], limit=limit, memory=1)
        assert sequence.reason == "length"


def test_an_end_within_a_draft_ends_the_answer(
    fake_engine: Any, new_sequence: Any, alone: Any, still: None
) -> None:
    tokens = alone([1], limit=100, memory=1)
    stop = "".join(chr(ord("A") + t) for t in tokens[60:63])
    place = "".join(chr(ord("A") + t) for t in tokens).index(stop) + 3
    sequence = new_sequence([1], limit=100, wants_drafts=True, stop=(stop,))
    run(Scheduler(fake_engine(context=200, score_tokens=16, memory=1)), sequence)
    assert (sequence.tokens[1:], sequence.reason) == (tokens[:place], "stop")


@pytest.mark.parametrize("has_drafts", [True, False])
def test_drafts_are_for_sequences_that_want_them_and_are_alone(
    fake_engine: Any, new_sequence: Any, still: None, has_drafts: bool
) -> None:
    engine = fake_engine(context=500, score_tokens=16, memory=1)
    both = [new_sequence([n], limit=n, wants_drafts=has_drafts) for n in (60, 150)]
    run(Scheduler(engine), *both)
    calls = [(name, len(slots)) for name, slots in engine.calls if name != "prefill"]
    alone_from = [count for _, count in calls].index(2) + 59
    assert ("score", 1) not in calls[:alone_from]
    assert (("score", 1) in calls[alone_from:]) == has_drafts


def test_prompts_with_log_probabilities_are_read_by_scoring(
    fake_engine: Any, new_sequence: Any, alone: Any
) -> None:
    class Recorder:
        rows = 0

        def add(self, logits: Any) -> None:
            self.rows += len(logits)

    for score_tokens in (0, 6):
        engine = fake_engine(score_tokens=score_tokens)
        sequence = new_sequence(list(range(13)))
        sequence.prompt_logprobs = Recorder()
        run(Scheduler(engine), sequence)
        assert sequence.prompt_logprobs.rows == 13
        assert sequence.tokens[13:] == alone(list(range(13)))
        names = [name for name, _ in engine.calls]
        assert list(itertools.islice(names, 1, 4)) == ["score" if score_tokens else "decode"] * 3
