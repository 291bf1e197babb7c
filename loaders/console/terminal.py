"""Text without control characters for terminals."""

import os
import sys
from collections.abc import Iterable, Iterator

# C0 except tab and newline, DEL, C1, and the characters that reorder nearby text (bidirectional embeddings, overrides
# and isolates). The marks and joiners of scripts and emoji are not included.
_COMMANDS = (
    *(set(range(0x20)) - {0x09, 0x0A}),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
_SHOWN = dict.fromkeys(_COMMANDS, "\N{REPLACEMENT CHARACTER}")


# The terminal's codes that begin and end dimmed text.
DIM, RESET = "\x1b[2m", "\x1b[0m"


def has_colours() -> bool:
    """Return True if standard output is a terminal, and the user wants colours."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and sys.stdout.isatty()


def harmless(text: str) -> str:
    """Replace each character that could control a terminal with U+FFFD."""
    return text.translate(_SHOWN)


def harmless_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text after replacing each CRLF with a newline, and applying `harmless` to the rest."""
    held = ""
    for piece in pieces:
        text = held + piece
        # The newline may be at the start of the next piece.
        held = "\r" if text.endswith("\r") else ""
        text = text.removesuffix("\r").replace("\r\n", "\n")
        if text:
            yield harmless(text)
    if held:
        yield harmless(held)


def escaped(line: str) -> str:
    """Escape the characters in a line of JSON that could control a terminal; the JSON value is unchanged."""
    return line.translate({code: f"\\u{code:04x}" for code in _COMMANDS})
