"""Calls to the tokenizers library, with each error translated into one sentence."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..artifact.errors import PrecastError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as LibraryTokenizer

# Characters from which a text is long. The library holds Python's lock while it encodes a single text, 0.6 s for a
# megabyte, but not while it encodes a batch. The first batch starts threads.
_LONG = 10_000
# JSON's escapes of ASCII letters, with which a key may be written.
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")


def encode_ids(library: "LibraryTokenizer", text: str, *, add_special_tokens: bool) -> list[int]:
    """Return the ids of a text; errors as for `encode`."""
    with _text_errors():
        if len(text) < _LONG:
            return list(library.encode(text, add_special_tokens=add_special_tokens).ids)
        # Without offsets, encoding takes half the time.
        return list(library.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


def encode(library: "LibraryTokenizer", text: str, *, add_special_tokens: bool) -> "Encoding":
    """Encode a text.

    Returns:
        The ids, with their offsets in the text.

    Raises:
        PrecastError: the text contains a lone surrogate, which no tokenizer can encode, or the library fails.
    """
    with _text_errors():
        if len(text) < _LONG:
            return library.encode(text, add_special_tokens=add_special_tokens)
        return library.encode_batch([text], add_special_tokens=add_special_tokens)[0]


@contextmanager
def _text_errors() -> Iterator[None]:
    try:
        with translate_errors(
            "tokenizer.json: expected a tokenizer that encodes any text", UnicodeEncodeError, TypeError
        ):
            yield
    except (UnicodeEncodeError, TypeError) as error:
        raise PrecastError(
            "prompt: expected text in UTF-8, found other bytes; convert the text first."
        ) from error


def decode(library: "LibraryTokenizer", ids: list[int], *, skip_special_tokens: bool) -> str:
    """Return the text of token ids.

    Raises:
        OverflowError: an id is negative or exceeds 32 bits.
        PrecastError: the library fails.
    """
    with translate_errors("tokenizer.json: expected a tokenizer that decodes any tokens", OverflowError):
        return library.decode(ids, skip_special_tokens=skip_special_tokens)


@contextmanager
def translate_errors(expected: str, *but: type[Exception]) -> Iterator[None]:
    """Turn the library's errors into a PrecastError.

    Args:
        expected: the beginning of the error text, which names the file and the expected content.
        but: exceptions that the caller's arguments cause. They propagate unchanged.
    """
    try:
        yield
    except but:
        raise
    except BaseException as error:
        # The library raises bare Exception and ValueError. A panic of its Rust code is a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PrecastError(f"{expected}, found: {_one_line(error)}; export the model again.") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]


def check_charsmaps(data: bytes) -> None:
    """Check the declared size of SentencePiece's character tables, because the library allocates that many bytes.

    Raises:
        ValueError: a table is shorter than it declares.
    """
    # A plain search takes 1 ms, and a regular expression with alternatives 9 ms.
    has_tables = b"precompiled_charsmap" in data or _ESCAPED_ASCII.search(data) is not None
    left = [json.loads(data).get("normalizer")] if has_tables else []
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            left += part.values()
            if isinstance(table := part.get("precompiled_charsmap"), str):
                raw = base64.b64decode(table)
                # The first four bytes of a table are the size of its first section, which follows them.
                if len(raw) < 4 or int.from_bytes(raw[:4], "little") > len(raw) - 4:
                    raise ValueError("a precompiled_charsmap is truncated")
