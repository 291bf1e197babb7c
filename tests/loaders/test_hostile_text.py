"""Untrusted text that reaches a terminal, a library or the cache folder: findings of fuzzing."""

import json
import os
import time

import pytest

from precast.loaders.artifact import files
from precast.loaders.artifact.errors import PrecastError, printable
from precast.loaders.artifact.json_records import parse_json
from precast.loaders.console.inspect import render
from precast.loaders.text.tokenizer import Tokenizer


def test_a_message_is_one_printable_line_of_bounded_length():
    assert str(PrecastError("a, b: expected  two spaces.")) == "a, b: expected  two spaces."
    assert str(PrecastError("two\nlines\r\n\tand more")) == "two lines and more"
    assert str(PrecastError("\x1b[2J \u202etxt \ud800 \x00")) == "�[2J �txt � �"
    long = str(PrecastError("begin " + "x" * 10_000_000 + " end"))
    assert long.startswith("begin ")
    assert long.endswith(" end")
    assert len(long) <= 4003


def test_printable_keeps_ordinary_text():
    for text in ("é ﷺ 日本語 😀 – …", "<|im_start|>", ""):
        assert printable(text) == text


def test_printable_keeps_indentation():
    assert printable("  ! a\u00a0b\x1b[2J\n  c") == "  ! a b�[2J c"


def test_inspect_prints_no_terminal_commands(artifact_copy, edit_manifest):
    edit_manifest(artifact_copy, lambda manifest: manifest.update(name="\x1b]0;gone\x07\nsecond"))
    text = render(artifact_copy, as_json=False)
    assert all(line.isprintable() for line in text.split("\n"))
    assert "gone" in text.split("\n")[0]
    assert "second" in text.split("\n")[0]


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"\\uDFFF": 1}', '["\\udc00\\ud800"]'])
def test_half_of_a_surrogate_pair_is_refused(text):
    with pytest.raises(PrecastError, match="surrogates not allowed"):
        parse_json(text.encode(), "x.json")


def test_a_whole_surrogate_pair_is_a_character():
    assert parse_json(b'"\\ud83d\\ude00"', "x.json") == "😀"


@pytest.fixture
def tokenizer_with(tiny_source):
    """Return a function that replaces keys in the tiny tokenizer's JSON, and returns the JSON."""
    data = json.loads(tiny_source().tokenizer_json)
    return lambda **keys: json.dumps(data | keys).encode()


def refusal(data: bytes) -> str:
    def encode() -> None:
        Tokenizer.from_json(data, chat_template=None, bos_token=None, eos_token=None).encode("the cat")

    with pytest.raises(PrecastError) as raised:
        encode()
    return str(raised.value)


# Tables that claim 4 GB, tables of 3 bytes, and empty tables, each also with an escape sequence in the key.
@pytest.mark.parametrize("key", ["precompiled_charsmap", "precompiled\\u005fcharsmap"])
@pytest.mark.parametrize("table", ["/////w==", "AAAA", ""])
def test_a_character_table_that_declares_too_large_a_size(tokenizer_with, key, table):
    data = tokenizer_with(normalizer={"type": "Precompiled", "precompiled_charsmap": table})
    text = refusal(data.replace(b"precompiled_charsmap", key.encode()))
    assert "a precompiled_charsmap is truncated; export the model again." in text


def test_a_tokenizer_that_fails_while_it_encodes(tokenizer_with):
    text = refusal(tokenizer_with(model={"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}))
    assert text.startswith("tokenizer.json: expected a tokenizer that encodes any text, found: ")


def test_old_entries_of_the_cache_folder_are_removed(artifact_copy, own_cache):
    weights = artifact_copy / "weights.safetensors"
    files.record_hash(weights, "0")
    (old,) = (own_cache / "verified").iterdir()
    for age, left in ((100, 2), (200, 1)):
        os.utime(old, (time.time() - age * 86400,) * 2)
        os.utime(weights)
        files.record_hash(weights, "0")
        if age == 100:
            assert len(list((own_cache / "verified").iterdir())) == left
    assert not old.exists()
