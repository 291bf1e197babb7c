"""Stop strings against a simple reference, for text cut into pieces in any way."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.stopping import StopStrings

# Only a few letters, so that stop strings overlap themselves and each other.
LETTERS = st.text(alphabet="abé", max_size=30)
STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4)


def until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return the text before the match that ends first (the longest of several), and True if there is a match."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def could_begin(text: str, stops: list[str]) -> int:
    """Return the length of the longest suffix of `text` that begins a stop string."""
    lengths = range(len(text), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)


@st.composite
def pieces(draw: st.DrawFn) -> list[str]:
    text = draw(LETTERS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(deadline=None, max_examples=1000)
@given(pieces=pieces(), stops=STOPS)
def test_shown_text_ends_where_the_first_stop_string_begins(pieces: list[str], stops: list[str]) -> None:
    watch, shown, read = StopStrings(stops), "", ""
    for piece in pieces:
        text, stopped = watch.push(piece)
        shown, read = shown + text, read + piece
        expected, found = until_stop(read, stops)
        assert stopped == found
        if found:
            assert shown == expected
        else:  # exactly the suffix that could begin a stop string is held back
            assert shown == read[: len(read) - could_begin(read, stops)]
    assert shown + watch.flush() == until_stop(read, stops)[0]


def test_no_text_follows_a_stop() -> None:
    watch = StopStrings(["END"])
    assert watch.push("one E") == ("one ", False)
    assert watch.push("ND two") == ("", True)
    assert watch.push("three") == ("", True)
    assert watch.flush() == ""


def test_held_text_is_flushed_once() -> None:
    watch = StopStrings(["END"])
    assert watch.push("the EN") == ("the ", False)
    assert watch.flush() == "EN"
    assert watch.flush() == ""


def test_the_match_that_ends_first_wins_and_then_the_longest() -> None:
    assert StopStrings(["abcd", "bc"]).push("xabcd") == ("xa", True)
    assert StopStrings(["c", "abc"]).push("xabc") == ("x", True)


def test_without_stop_strings_everything_passes() -> None:
    watch = StopStrings([])
    assert watch.push("all of it") == ("all of it", False)
    assert watch.flush() == ""


def test_work_and_memory_are_linear_in_the_text() -> None:
    """Test the worst case: a stop string that almost matches everywhere."""
    watch = StopStrings(["a" * 1000 + "b"])
    shown = "".join(watch.push("a" * 100)[0] for _ in range(1000))
    assert len(shown) == 100_000 - 1000
    assert len(watch.flush()) == 1000


@pytest.mark.parametrize("stops", [[""], ["a", ""], [None], "abc"])
def test_stop_strings_must_be_text(stops: object) -> None:
    with pytest.raises(
        PrecastError, match=r"^Stop strings: expected a list of non-empty strings, found .*\.$"
    ):
        StopStrings(stops)
