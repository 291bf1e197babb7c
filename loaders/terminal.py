"""Text that a terminal only shows."""

from collections.abc import Iterable, Iterator

# C0 but for tab and newline, DEL, C1, and the characters that reorder text around them (bidirectional embeddings,
# overrides and isolates). The marks and joiners that scripts and emoji need are not among them.
_COMMANDS = (
    *(set(range(0x20)) - {0x09, 0x0A}),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
_SHOWN = dict.fromkeys(_COMMANDS, "\N{REPLACEMENT CHARACTER}")


def harmless(text: str) -> str:
    """The text with a visible character in place of each that would command a terminal."""
    return text.translate(_SHOWN)


def harmless_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text for a terminal; a line may end in a carriage return and a newline."""
    held = ""
    for piece in pieces:
        text = held + piece
        # A newline may follow in the next piece.
        held = "\r" if text.endswith("\r") else ""
        text = text.removesuffix("\r").replace("\r\n", "\n")
        if text:
            yield harmless(text)
    if held:
        yield harmless(held)


def escaped(line: str) -> str:
    """A line of JSON without characters that command a terminal; it holds the same value."""
    return line.translate({code: f"\\u{code:04x}" for code in _COMMANDS})
