"""The form of a tokenizer.json that loads fastest."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from precast.exporter import tokenizer_form
from precast.exporter.tokenizer_form import fast_form


def document(merges: list[Any], tokens: tuple[str, ...] = (), **fields: Any) -> bytes:
    """Return a tokenizer.json as checkpoints have it: indented, in the order of ids; with fields of the model."""
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


@pytest.mark.parametrize("fields", [{"ignore_merges": True}, {"byte_fallback": True}, {"dropout": 0.5}])
def test_options_of_the_model_stay(fields: dict[str, Any]) -> None:
    data = document([["a", "b"], ["ab", "é"]], **fields)
    found = fast_form(data)
    assert len(found) < len(data)
    assert json.loads(found)["model"].items() >= fields.items()
    assert Tokenizer.from_buffer(found).to_str() == Tokenizer.from_buffer(data).to_str()


def test_an_added_token_outside_the_vocabulary_stays() -> None:
    value = json.loads(document([["a", "b"]]))
    value["added_tokens"].append({**value["added_tokens"][0], "id": 7, "content": "<end>"})
    data = json.dumps(value, indent=2).encode()
    found = fast_form(data)
    assert len(found) < len(data)
    before, after = (Tokenizer.from_buffer(d) for d in (data, found))
    assert before.to_str() == after.to_str()
    assert after.encode("ab<end>").ids == [4, 7]


def test_tokens_that_share_an_id_stay_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own spelling of such a tokenizer contains one of these tokens, chosen at random."""
    monkeypatch.setattr(tokenizer_form, "_canonical", lambda _: "the same by chance")
    data = document([["a", "b"]], vocab={"b": 1, "a": 0, "ab": 2, "c": 1})
    assert fast_form(data) == data


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
