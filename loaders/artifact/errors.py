"""The one exception that a user is meant to read."""

# More than any sentence of ours; less than a file can put into one.
_LONGEST = 4000


class PrecastError(Exception):
    """Something the user can put right.

    The message is one sentence: where, what was expected, what was found, what to do. The command line prints
    it without a traceback and exits with code 2. It may quote what strangers wrote, so it is made one line of printable
    characters, of bounded length: a terminal does what control characters say.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def printable(text: str) -> str:
    """One line that a terminal only shows, indented as it was: for what strangers wrote."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
    indent = len(text) - len(text.lstrip(" "))
    return " " * indent + " ".join("".join(shown).split())


def _one_line(message: str) -> str:
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
    return printable(message)
