"""The added and special tokens of a Hugging Face directory.

Five places may define one: tokenizer.json, `added_tokens_decoder` and the other keys of tokenizer_config.json,
special_tokens_map.json and added_tokens.json. Their precedence is undocumented; this file follows
`PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__` of transformers 5.23, step by step.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precast.loaders.artifact.errors import PrecastError

from ..files import optional_json, plain_file

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

CONFIG, TOKENS_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

# The special tokens that every tokenizer may name, in transformers' order.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA, _EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"
_SPECIFIC, _DECODER = "model_specific_special_tokens", "added_tokens_decoder"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens besides a tokenizer's own vocabulary.

    Attributes:
        added: the list `added_tokens` for tokenizer.json that gives the same ids and texts.
        named: the text of each special token that has a name ("bos_token", …, and the model's own, as
            "image_token"), where it has a text.
        is_named: True if a file other than tokenizer.json and config.json names special tokens.
    """

    added: list[dict[str, Any]]
    named: Mapping[str, str]
    is_named: bool


def read_tokens(folder: Path, document: Mapping[str, Any], library: "Tokenizer") -> Tokens:
    """Find the added tokens of a directory.

    Args:
        folder: the directory.
        document: its tokenizer.json.
        library: the tokenizer that `document` makes. Tokens are added to it.

    Raises:
        PrecastError: for a token that is neither text nor an object with its text in `content`, and for tokens that
            cannot be written to a tokenizer.json.
    """
    given = dict(optional_json(folder / CONFIG))
    _take_extra(given)
    specific = _take_specific(folder, given)
    if _DECODER not in given:
        _merge_map(folder, given, specific)
    named, extra = (
        _named(folder, given, specific),
        _extra(folder, given),
    )  # these functions also check the types of values
    decoder = _decoder(folder, given, document)
    special = _special_texts(library) | _add(library, decoder, named, extra)
    texts = {key: _content(token) for key, token in named.items()}
    is_named = any(plain_file(folder / name) for name in (CONFIG, TOKENS_MAP))
    return Tokens(added=_written(folder, document, library, special), named=texts, is_named=is_named)


# --- what the files say, as transformers merges it ----------------------------------------------------------------


def _take_extra(given: dict[str, object]) -> None:
    """Rename the list of further special tokens from its older key to the newer one."""
    if _EXTRA_BEFORE in given and not given.get(_EXTRA):
        given[_EXTRA] = given.pop(_EXTRA_BEFORE)


def _take_specific(folder: Path, given: dict[str, Any]) -> dict[str, object]:
    """Take the special tokens with a name of their own, as "image_token", out of the configuration."""
    names = [
        key for key in given if key.endswith("_token") and key not in NAMED and isinstance(given[key], str)
    ]
    specific: dict[str, object] = {key: given.pop(key) for key in names}
    if isinstance(given.get(_EXTRA), dict):
        specific |= given.pop(_EXTRA)
    return specific or _mapping(folder / CONFIG, _SPECIFIC, given.get(_SPECIFIC))


def _merge_map(folder: Path, given: dict[str, Any], specific: dict[str, object]) -> None:
    """Let special_tokens_map.json overrule tokenizer_config.json."""
    path = folder / TOKENS_MAP
    for key, value in optional_json(path).items():
        if key == _EXTRA and isinstance(value, list):
            known = list(given.get(_EXTRA) or [])
            given[key] = known + [token for token in value if token not in known]
        elif isinstance(value, dict) and key != _EXTRA:
            given[key] = {**value, "special": True}
        else:
            given[key] = value
    if isinstance(given.get(_EXTRA), dict):
        specific |= given.pop(_EXTRA)


def _named(
    folder: Path, given: Mapping[str, Any], specific: Mapping[str, object]
) -> dict[str, "AddedToken | str"]:
    """Return special tokens by name: those that every tokenizer may have, then the model's own."""
    own = [
        key
        for key in given
        if key.endswith("_token") and key not in NAMED and isinstance(given[key], str | dict)
    ]
    said = {key: given[key] for key in (*NAMED, *own) if given.get(key) is not None} | dict(specific)
    return {key: _token_or_text(folder / CONFIG, key, value) for key, value in said.items()}


def _extra(folder: Path, given: Mapping[str, Any]) -> list["AddedToken | str"]:
    """Return further special tokens, which have no name."""
    key = _EXTRA if _EXTRA in given else _EXTRA_BEFORE
    tokens = given.get(key) or []
    if not isinstance(tokens, list):
        raise PrecastError(
            f"{folder / CONFIG}: expected {key} to be a list of tokens, found {json.dumps(tokens):.80}; correct it."
        )
    return [_token_or_text(folder / CONFIG, key, token) for token in tokens]


def _decoder(folder: Path, given: Mapping[str, Any], document: Mapping[str, Any]) -> dict[int, "AddedToken"]:
    """Return added tokens by id, from `added_tokens_decoder` or else from added_tokens.json and tokenizer.json."""
    if _DECODER in given:
        path = folder / CONFIG
        entries = _mapping(path, _DECODER, given[_DECODER])
        return {_number(path, key): _token(path, _DECODER, entry) for key, entry in entries.items()}
    # transformers reads only the newer key of the list, and skips entries that are not tokens yet.
    said = [*(given[key] for key in NAMED if given.get(key)), *(given.get(_EXTRA) or ())]
    special = {
        _content(_token_or_text(folder / CONFIG, _DECODER, token))
        for token in said
        if isinstance(token, str) or "__type" not in token
    }
    decoder = {
        _number(folder / ADDED, number): _added(text, is_special=text in special)
        for text, number in optional_json(folder / ADDED).items()
    }
    for entry in document.get("added_tokens") or ():
        decoder[entry["id"]] = _token(folder / "tokenizer.json", "added_tokens", entry)
    return decoder


# --- adding them --------------------------------------------------------------------------------------------------


def _add(
    library: "Tokenizer",
    decoder: Mapping[int, "AddedToken"],
    named: Mapping[str, "AddedToken | str"],
    extra: Iterable["AddedToken | str"],
) -> frozenset[str]:
    """Add tokens in transformers' order, which determines ids and flags; return the texts of special ones."""
    tokens = [token for _, token in sorted(decoder.items())]
    known = {token.content for token in (*library.get_added_tokens_decoder().values(), *tokens)}
    tokens += [_as_token(token) for token in (*named.values(), *extra) if _content(token) not in known]
    names = {_content(token) for token in named.values()}
    for token in tokens:
        if token.content in names:
            token.special = True
    library.add_tokens(tokens)
    return frozenset(token.content for token in tokens if token.special)


def _as_token(token: "AddedToken | str") -> "AddedToken":
    from tokenizers import AddedToken

    return AddedToken(token, special=True) if isinstance(token, str) else token


def _written(
    folder: Path, document: Mapping[str, Any], library: "Tokenizer", special: frozenset[str]
) -> list[dict[str, Any]]:
    """Return the added tokens of a tokenizer, as tokenizer.json lists them; a special token stays special."""
    added = [
        {
            "id": number,
            "content": token.content,
            **{flag: getattr(token, flag) for flag in _FLAGS},
            "special": token.content in special,
        }
        for number, token in sorted(library.get_added_tokens_decoder().items())
    ]
    if added != document.get("added_tokens"):
        _check_ids(folder, document, added)
    return added


def _check_ids(folder: Path, document: Mapping[str, Any], added: list[dict[str, Any]]) -> None:
    """Refuse tokens whose ids change when the written tokenizer.json is read."""
    from tokenizers import Tokenizer

    again = Tokenizer.from_str(json.dumps({**document, "added_tokens": added})).get_added_tokens_decoder()
    for entry in added:
        token = again.get(entry["id"])
        if token is None or token.content != entry["content"]:
            raise PrecastError(
                f"{folder}: the added token {entry['content']!r} cannot keep its id in a tokenizer.json; save the "
                "tokenizer again (AutoTokenizer.from_pretrained(...).save_pretrained(...))."
            )


def _special_texts(library: "Tokenizer") -> frozenset[str]:
    return frozenset(token.content for token in library.get_added_tokens_decoder().values() if token.special)


# --- values -------------------------------------------------------------------------------------------------------


def _added(text: str, *, is_special: bool) -> "AddedToken":
    from tokenizers import AddedToken

    return AddedToken(text, normalized=not is_special, special=is_special)


def _token(path: Path, key: str, entry: object) -> "AddedToken":
    """Read a token that is written as an object."""
    from tokenizers import AddedToken

    content = entry.get("content") if isinstance(entry, dict) else None
    flags = {flag: entry[flag] for flag in _FLAGS if flag in entry} if isinstance(entry, dict) else {}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise PrecastError(
            f"{path}: expected {key} to be a token with its content and flags, found {json.dumps(entry):.80}; "
            "correct it."
        )
    return AddedToken(content, **flags)


def _token_or_text(path: Path, key: str, value: object) -> "AddedToken | str":
    if isinstance(value, dict):
        return _token(path, key, value)
    if not isinstance(value, str):
        raise PrecastError(f"{path}: expected {key} to be text, found {json.dumps(value):.80}; correct it.")
    return value


def _content(token: "AddedToken | str") -> str:
    return token if isinstance(token, str) else str(token.content)


def _mapping(path: Path, key: str, value: object) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise PrecastError(
            f"{path}: expected {key} to be an object, found {json.dumps(value):.80}; correct it."
        )
    return dict(value or {})


def _number(path: Path, value: object) -> int:
    try:
        return int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        raise PrecastError(
            f"{path}: expected token ids, found {json.dumps(value):.80}; correct it."
        ) from None
