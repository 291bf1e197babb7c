"""The bytes that each token of a vocabulary adds to a text, for grammars."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError
from .tokenizer import BYTE_TOKEN, byte_alphabet, byte_level_bytes

if TYPE_CHECKING:
    from tokenizers import AddedToken

    from .tokenizer import Tokenizer

# The first byte of a special token. It never occurs in UTF-8, so no text matches a special token.
SPECIAL = b"\xff"


def vocabulary_bytes(tokenizer: "Tokenizer", size: int) -> list[bytes]:
    """Return the bytes of each token.

    A special token and an added token spelt ``<…>`` are not text. The bytes of such a token are `SPECIAL`, followed by
    the token's spelling.

    Args:
        tokenizer: the tokenizer.
        size: V, the number of ids. The bytes of an id without a token are `SPECIAL`, followed by ``<[id]>``.

    Raises:
        PrecastError: the decoder is neither byte-level nor SentencePiece's. The bytes of a token may then depend on the
            tokens next to it.
    """
    decoder = tokenizer.library.decoder
    steps = [] if decoder is None else list(_steps(json.loads(decoder.__getstate__())))
    read, has_byte_tokens = _reader(steps), any(step["type"] == "ByteFallback" for step in steps)
    added = tokenizer.added_tokens
    found = [SPECIAL + b"<[%d]>" % token for token in range(size)]
    for token in range(size):
        # One by one, because the library holds Python's lock for 0.1 s while it copies a vocabulary.
        if (text := tokenizer.token(token)) is None:
            continue
        if token not in added or (has_byte_tokens and BYTE_TOKEN.fullmatch(text)):
            found[token] = read(text)
        else:
            found[token] = SPECIAL * _is_mark(added[token]) + text.encode()
    return found


def _is_mark(added: "AddedToken") -> bool:
    return bool(added.special or (added.content.startswith("<") and added.content.endswith(">")))


def mark_token(tokenizer: "Tokenizer", text: str) -> int | None:
    """Return the id of a marker such as ``<think>``; None if `vocabulary_bytes` treats the marker as text."""
    token, added = tokenizer.library.token_to_id(text), tokenizer.added_tokens
    return token if token is not None and token in added and _is_mark(added[token]) else None


def grammar_symbol(tokenizer: "Tokenizer", text: str) -> str:
    """Return the symbol for a marker in a Lark grammar: the marker's token, or else a string."""
    token = mark_token(tokenizer, text)
    return json.dumps(text) if token is None else f"<[{token}]>"


def drops_first_space(tokenizer: "Tokenizer", tokens: list[bytes]) -> bool:
    """Return True if decoding drops a space at the beginning of a text, as most SentencePiece decoders do.

    Args:
        tokenizer: the tokenizer.
        tokens: the result of `vocabulary_bytes`.
    """
    for token, data in enumerate(tokens):
        if len(data) > 1 and data.startswith(b" "):
            return tokenizer.decode([token]).encode() != data
    return False


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a decoder in order, with nested sequences flattened."""
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _reader(steps: list[Mapping[str, Any]]) -> Callable[[str], bytes]:
    """Return a function that converts a token's spelling to the token's bytes.

    Raises:
        PrecastError: the decoder has a step that neither byte-level nor SentencePiece tokenizers use.
    """
    spaces = ""
    for step in steps:
        match step:
            case {"type": "ByteFallback" | "ByteLevel" | "Fuse"} | {
                "type": "Strip",
                "content": " ",
                "stop": 0,
            }:
                pass
            case {"type": "Replace", "pattern": {"String": str(char)}, "content": " "} | {
                "type": "Metaspace",
                "replacement": str(char),
            } if len(char) == 1:
                spaces += char
            case _:
                raise PrecastError(
                    "tokenizer.json: a constrained answer needs a byte-level or SentencePiece decoder, found"
                    f" {step['type']}; generate without a constraint."
                )
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return partial(byte_level_bytes, alphabet=byte_alphabet())
    table = str.maketrans(dict.fromkeys(spaces, " "))
    if "ByteFallback" not in kinds:
        return lambda text: text.translate(table).encode()

    def read(text: str) -> bytes:
        match = BYTE_TOKEN.fullmatch(text)
        return text.translate(table).encode() if match is None else bytes([int(match[1], 16)])

    return read
