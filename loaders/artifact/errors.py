"""`PrecastError`, the exception for errors that the user can fix, and functions that make text safe to print."""

import sys

# The maximum length of a message, in characters. The middle of a longer message, which may quote a file, is cut out.
_MAX_LENGTH = 4000


class PrecastError(Exception):
    """An error that the user can fix.

    The message is one sentence: the place, what was expected, what was found, and the remedy. The command line prints
    the message without a traceback and exits with code 2. A message may quote untrusted text with control characters,
    which a terminal would obey. So every message is reduced to one line of at most about 4,000 printable characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class PromptTooLongError(PrecastError):
    """A prompt that leaves no room in the model's context."""


def printable(text: str) -> str:
    """Return untrusted text as one line of printable characters; keep its indentation."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
    indent = len(text) - len(text.lstrip(" "))
    return " " * indent + " ".join("".join(shown).split())


def log_to_stderr(message: str) -> None:
    """Print a message, which may contain untrusted text, on standard error."""
    print(printable(message), file=sys.stderr)


def _one_line(message: str) -> str:
    if len(message) > _MAX_LENGTH:
        message = f"{message[: _MAX_LENGTH // 2]} … {message[-_MAX_LENGTH // 2 :]}"
    return printable(message)
