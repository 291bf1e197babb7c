"""The form of a tokenizer.json that loads fastest."""

import json
from typing import Any


def fast_form(data: bytes) -> bytes:
    """Return the same tokenizer in the form that the `tokenizers` library reads fastest.

    A BPE vocabulary is sorted, merges are written as "a b" where possible, and spaces between the parts of the JSON are
    left out. Every start reads the file, so this saves a tenth to a half of the time for the tokenizer.

    Args:
        data: a tokenizer.json that the library can read. It is returned unchanged if its model is not a BPE model, if
            tokens share an id, or if the library would read another tokenizer from the new form.
    """
    document = json.loads(data)
    model = document.get("model") or {}
    if model.get("type") != "BPE":
        return data
    # The library would choose one of the tokens of an id at random, so the two forms could not be compared.
    if len(set(model["vocab"].values())) < len(model["vocab"]):
        return data
    # The library first collects the vocabulary in a sorted map, which grows faster in sorted order.
    model["vocab"] = dict(sorted(model["vocab"].items()))
    model["merges"] = _spelled(model["merges"])
    found = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return found if _canonical(found) == _canonical(data) else data


def _spelled(merges: list[Any]) -> list[Any]:
    """Return merges in the older form, "a b", if possible, because that form loads in two thirds of the time.

    In the older form, a token cannot contain a space, and a merge that begins with "#version" would be read as a
    comment.
    """
    pairs = [merge for merge in merges if not isinstance(merge, str)]
    if any(" " in token or token.startswith("#version") for pair in pairs for token in pair):
        return merges
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _canonical(data: bytes) -> str:
    """Return the library's own spelling of a tokenizer."""
    from tokenizers import Tokenizer

    spelling: str = Tokenizer.from_buffer(data).to_str()
    return spelling
