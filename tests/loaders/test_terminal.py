"""Text for a terminal: no character controls it."""

import json
import unicodedata

import pytest

from precast.loaders.console.terminal import escaped, harmless, harmless_pieces

COMMANDS = [
    "\x1b]52;c;cm0gLXJm\x07",  # sets the clipboard
    "\x1b]0;title\x1b\\",
    "\x1b[2J\x1b[H",
    "\x9b2J",
    "\x9d52;c;cm0=\x9c",
    "\rline over line",
    "gone\b\b\b\b",
    "\x7f",
    "\x0e\x0f\x05\x0b\x0c\x00",
    "\u202egnp.exe",
    "\u2066isolated\u2069",
]


def test_tab_and_newline_are_the_only_control_characters_kept():
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    shown = harmless(everything)
    left = {c for c in shown if unicodedata.category(c) == "Cc"}
    assert left == {"\t", "\n"}
    changed = {a for a, b in zip(everything, shown, strict=True) if a != b}
    assert {unicodedata.category(c) for c in changed} == {"Cc", "Cf"}
    bidirectional = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    assert {c for c in changed if unicodedata.category(c) == "Cf"} == {
        c for c in everything if unicodedata.bidirectional(c) in bidirectional
    }


@pytest.mark.parametrize("text", COMMANDS)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_command_that_comes_in_pieces_is_shown_too(text, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    shown = "".join(harmless_pieces(pieces))
    assert shown == harmless(text)
    assert not set(shown) & set(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))


@pytest.mark.parametrize("pieces", [["a\r\nb"], ["a\r", "\nb"], ["a", "\r", "", "\n", "b"], list("a\r\nb")])
def test_lines_may_end_as_on_windows(pieces):
    assert "".join(harmless_pieces(pieces)) == "a\nb"


@pytest.mark.parametrize("text", ["emoji 👩‍👩‍👧", "می‌خواهم", "שלום\u200f!", "naïve — ‘x’", "\ufeff"])
def test_characters_of_scripts_and_emoji_are_kept(text):
    assert "".join(harmless_pieces([text])) == text


@pytest.mark.parametrize("text", COMMANDS)
def test_json_holds_the_same_value(text):
    line = escaped(json.dumps(text, ensure_ascii=False))
    assert json.loads(line) == text
    assert harmless(line) == line
