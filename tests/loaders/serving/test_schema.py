"""The search for numbers that are not finite, in the bodies of requests."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from precast.loaders.serving.schema import is_suspect

# The definition: NaN, Infinity, and numbers that may exceed the largest float.
SUSPECT = re.compile(rb"NaN|Infinity|[eE]\+?[0-9]{3}|[0-9]{200}")
PIECES = st.sampled_from(
    ["NaN", "Infinity", "e", "E", "+", "-", ".", "0", "9", "12", "345", "7" * 100, "Na", "N", "Infinit", "y", "é", " "]
)  # fmt: skip


@given(st.lists(PIECES, max_size=8))
@example(["E", "+", "345"])
@example(["e", "-", "345"])
@example(["7" * 100, "7" * 100])
@example(["7" * 100, ".", "7" * 100])
def test_the_search_finds_what_the_expression_finds(pieces) -> None:
    text = "".join(pieces).encode()
    assert is_suspect(text) == (SUSPECT.search(text) is not None)


@pytest.mark.parametrize("digits", [199, 200])
def test_long_numbers(digits: int) -> None:
    assert is_suspect(b"[" + b"1" * digits + b"]") == (digits == 200)
