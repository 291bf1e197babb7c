"""The form of a tokenizer.json that loads fastest."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from precast.exporter import tokenizer_form
from precast.exporter.tokenizer_form import fast_form


def document(merges: list[Any], tokens: tuple[str, ...] = (), **fields: Any) -> bytes:
    """Return a tokenizer.json as checkpoints have it: indented, in the order of ids."""
    names = ("<s>", "é", "b", "a", "ab", "abé", "a b", *tokens)
    added = {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False}
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": merges}
    value = {
        "version": "1.0",
        "added_tokens": [{**added, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model | fields,
    }
    return json.dumps(value, indent=2).encode()


def test_the_vocabulary_is_sorted_and_merges_are_texts() -> None:
    data = document([["a", "b"], ["ab", "é"]])
    found = fast_form(data)
    model = json.loads(found)["model"]
    assert list(model["vocab"]) == sorted(model["vocab"])
    assert model["merges"] == ["a b", "ab é"]
    assert b"\n" not in found
    assert "é".encode() in found
    before, after = (Tokenizer.from_buffer(d) for d in (data, found))
    assert before.to_str() == after.to_str()
    assert after.encode("<s>abéa").tokens == ["<s>", "abé", "a"]
    assert fast_form(found) == found
    assert fast_form(document(["a b", "ab é"])) == found


@pytest.mark.parametrize(
    ("merges", "tokens"), [([["a", " b"]], (" b",)), ([["#version", "b"]], ("#version", "#versionb"))]
)
def test_merges_that_have_no_older_spelling_stay_pairs(merges: list[Any], tokens: tuple[str, ...]) -> None:
    data = document(merges, tokens)
    found = fast_form(data)
    assert json.loads(found)["model"]["merges"] == merges
    assert Tokenizer.from_buffer(found).to_str() == Tokenizer.from_buffer(data).to_str()


def test_other_models_and_other_meanings_stay_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    other = json.loads(document([]))
    other["model"] = {"type": "WordLevel", "vocab": {"b": 0, "a": 1}, "unk_token": "a"}
    data = json.dumps(other, indent=2).encode()
    assert fast_form(data) == data
    assert fast_form(b"{}") == b"{}"
    # A form that the library reads as another tokenizer is dropped.
    data = document([["a", "b"]])
    monkeypatch.setattr(tokenizer_form, "_spelled", lambda merges: [])
    assert fast_form(data) == data
