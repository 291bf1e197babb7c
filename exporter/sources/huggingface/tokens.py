"""Read the added and special tokens of a Hugging Face directory.

Five places may define a token: tokenizer.json, `added_tokens_decoder` and the other keys of tokenizer_config.json,
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
    """The added and special tokens of a tokenizer.

    Attributes:
        added: the tokens of all five places, as the value of `added_tokens` in tokenizer.json.
        named: texts of special tokens, by name. The names are those in `NAMED` and the model's own names, such as
            "image_token".
        has_own_files: True if the directory has tokenizer_config.json or special_tokens_map.json.
    """

    added: list[dict[str, Any]]
    named: Mapping[str, str]
    has_own_files: bool


def read_tokens(folder: Path, document: Mapping[str, Any], library: "Tokenizer") -> Tokens:
    """Return the added and special tokens of a directory.

    Args:
        folder: the directory.
        document: its tokenizer.json.
        library: the tokenizer of `document`. The function adds tokens to it.

    Raises:
        PrecastError: a token is neither text nor an object with its text in `content`, or a tokenizer.json cannot
            express the tokens.
    """
    settings = dict(optional_json(folder / CONFIG))
    _rename_extra(settings)
    own = _take_own(folder, settings)
    if _DECODER not in settings:
        _merge_map(folder, settings, own)
    # `_named` and `_extra` check the types of values; `_decoder` relies on these checks.
    named, extra = _named(folder, settings, own), _extra(folder, settings)
    decoder = _decoder(folder, settings, document)
    special = _special_texts(library) | _add(library, decoder, named, extra)
    texts = {key: _content(token) for key, token in named.items()}
    has_own_files = any(plain_file(folder / name) for name in (CONFIG, TOKENS_MAP))
    return Tokens(
        added=_entries(folder, document, library, special), named=texts, has_own_files=has_own_files
    )


# --- merging the files as transformers does -----------------------------------------------------------------------


def _rename_extra(settings: dict[str, object]) -> None:
    """If the newer key of unnamed special tokens has no tokens, move the list of the older key to it."""
    if _EXTRA_BEFORE in settings and not settings.get(_EXTRA):
        settings[_EXTRA] = settings.pop(_EXTRA_BEFORE)


def _take_own(folder: Path, settings: dict[str, Any]) -> dict[str, object]:
    """Remove and return the special tokens with model-specific names, such as "image_token"."""
    names = [
        key
        for key in settings
        if key.endswith("_token") and key not in NAMED and isinstance(settings[key], str)
    ]
    own: dict[str, object] = {key: settings.pop(key) for key in names}
    if isinstance(settings.get(_EXTRA), dict):
        own |= settings.pop(_EXTRA)
    return own or _mapping(folder / CONFIG, _SPECIFIC, settings.get(_SPECIFIC))


def _merge_map(folder: Path, settings: dict[str, Any], own: dict[str, object]) -> None:
    """Override `settings`, the keys of tokenizer_config.json, with those of special_tokens_map.json."""
    path = folder / TOKENS_MAP
    for key, value in optional_json(path).items():
        if key == _EXTRA and isinstance(value, list):
            known = list(settings.get(_EXTRA) or [])
            settings[key] = known + [token for token in value if token not in known]
        elif isinstance(value, dict) and key != _EXTRA:
            settings[key] = {**value, "special": True}
        else:
            settings[key] = value
    if isinstance(settings.get(_EXTRA), dict):
        own |= settings.pop(_EXTRA)


def _named(
    folder: Path, settings: Mapping[str, Any], own: Mapping[str, object]
) -> dict[str, "AddedToken | str"]:
    """Return special tokens by name: the names that every tokenizer may have, then the model's own names."""
    names = [
        key
        for key in settings
        if key.endswith("_token") and key not in NAMED and isinstance(settings[key], str | dict)
    ]
    values = {key: settings[key] for key in (*NAMED, *names) if settings.get(key) is not None} | dict(own)
    return {key: _token_or_text(folder / CONFIG, key, value) for key, value in values.items()}


def _extra(folder: Path, settings: Mapping[str, Any]) -> list["AddedToken | str"]:
    """Return the special tokens that have no name."""
    key = _EXTRA if _EXTRA in settings else _EXTRA_BEFORE
    tokens = settings.get(key) or []
    if not isinstance(tokens, list):
        raise PrecastError(
            f"{folder / CONFIG}: expected {key} to be a list of tokens, found {json.dumps(tokens):.80}; correct it."
        )
    return [_token_or_text(folder / CONFIG, key, token) for token in tokens]


def _decoder(
    folder: Path, settings: Mapping[str, Any], document: Mapping[str, Any]
) -> dict[int, "AddedToken"]:
    """Return added tokens by id, from `added_tokens_decoder` or else from added_tokens.json and tokenizer.json."""
    if _DECODER in settings:
        path = folder / CONFIG
        entries = _mapping(path, _DECODER, settings[_DECODER])
        return {_number(path, key): _token(path, _DECODER, entry) for key, entry in entries.items()}
    # As in transformers, only the newer key of unnamed special tokens is read, and objects with "__type" are skipped.
    values = [*(settings[key] for key in NAMED if settings.get(key)), *(settings.get(_EXTRA) or ())]
    special = {
        _content(_token_or_text(folder / CONFIG, _DECODER, token))
        for token in values
        if isinstance(token, str) or "__type" not in token
    }
    decoder = {
        _number(folder / ADDED, number): _added(text, is_special=text in special)
        for text, number in optional_json(folder / ADDED).items()
    }
    for entry in document.get("added_tokens") or ():
        decoder[entry["id"]] = _token(folder / "tokenizer.json", "added_tokens", entry)
    return decoder


# --- adding tokens ------------------------------------------------------------------------------------------------


def _add(
    library: "Tokenizer",
    decoder: Mapping[int, "AddedToken"],
    named: Mapping[str, "AddedToken | str"],
    extra: Iterable["AddedToken | str"],
) -> frozenset[str]:
    """Add tokens to `library` in transformers' order, on which their ids depend; return the texts of special tokens."""
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


def _entries(
    folder: Path, document: Mapping[str, Any], library: "Tokenizer", special: frozenset[str]
) -> list[dict[str, Any]]:
    """Return the value of `added_tokens` for tokenizer.json: all tokens added to `library`, with their flags."""
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
    """Load the tokenizer.json with the tokens in `added`, and check that each token has kept its id.

    Raises:
        PrecastError: a token has another id after loading.
    """
    from tokenizers import Tokenizer

    reread = Tokenizer.from_str(json.dumps({**document, "added_tokens": added})).get_added_tokens_decoder()
    for entry in added:
        token = reread.get(entry["id"])
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
    """Return the token that a JSON object describes."""
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


def _number(path: Path, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise PrecastError(
            f"{path}: expected token ids, found {json.dumps(value):.80}; correct it."
        ) from None
