"""Call the tokenizers library, and turn its errors into one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..artifact.errors import PrecastError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as LibraryTokenizer


def encoded(library: "LibraryTokenizer", text: str, *, add_special_tokens: bool) -> "Encoding":
    """Return the tokens of a text.

    Raises:
        PrecastError: the text contains half of a surrogate pair, which no tokenizer can encode.
    """
    try:
        with explained(
            "tokenizer.json: expected a tokenizer that encodes any text", UnicodeEncodeError, TypeError
        ):
            return library.encode(text, add_special_tokens=add_special_tokens)
    except (UnicodeEncodeError, TypeError) as error:
        raise PrecastError(
            "prompt: expected text in UTF-8, found bytes that are not; convert it first."
        ) from error


def decoded(library: "LibraryTokenizer", ids: list[int], *, skip_special_tokens: bool) -> str:
    """Return the text of tokens.

    Raises:
        OverflowError: an id is negative or absurdly large.
    """
    with explained("tokenizer.json: expected a tokenizer that decodes any tokens", OverflowError):
        return library.decode(ids, skip_special_tokens=skip_special_tokens)


@contextmanager
def explained(expected: str, *but: type[Exception]) -> Iterator[None]:
    """Turn the library's errors into one sentence, except errors about the caller's arguments."""
    try:
        yield
    except but:
        raise
    except BaseException as error:
        # The library raises bare Exception and ValueError; a panic of its Rust code is a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PrecastError(f"{expected}, found: {_one_line(error)}; export the artifact again.") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]
