"""Read typed messages. Lines that are pasted together form one message."""

import select
import sys
from collections.abc import Callable, Iterator

from .chat_history import History

COMMANDS = {
    "/reset": "forget the conversation",
    "/help": "show this",
    "/exit": "end the chat, as Ctrl-D does",
}
QUOTES = '"""'
# Seconds to wait for the next line of a paste.
_PASTE_S = 0.02

Read = Callable[[str], str]


def help_text() -> str:
    """Return the help on commands and on messages of several lines."""
    lines = [f"{name:<8} {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(
        (*lines, f"{QUOTES:<8} begin and end a message of several lines; pasted lines need no quotes")
    )


def prepare(history: History) -> None:
    """Enable line editing, the messages of earlier chats, and pastes of several lines in `input`, where supported."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(False)
    # Python turns bracketed paste off, because its own prompt executes pasted lines one by one. libedit does not have
    # bracketed paste.
    readline.parse_and_bind("set enable-bracketed-paste on")
    for message in history.messages:
        readline.add_history(message)


def remember(history: History, message: str) -> None:
    """Add a message to the history, for the arrow keys and for the next chat."""
    if history.add(message) and (readline := sys.modules.get("readline")):
        readline.add_history(message)


def messages(read: Read = input, waits: "Callable[[], bool] | None" = None) -> Iterator[str]:
    """Yield typed messages and commands one at a time until the end of input.

    Args:
        read: function like `input`, which shows a prompt and reads a line.
        waits: function that returns True if more input has arrived; None for a function that checks standard input.
    """
    waits = waits or _waits
    while True:
        lines: list[str] = []
        try:
            ended = _read_message(lines, read, waits)
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError as error:
            print(f"error: expected text in {error.encoding}, found other bytes.")
            continue
        # A command in the last line is not part of the message.
        last = [lines.pop()] if len(lines) > 1 and is_command(lines[-1]) else []
        for message in ("\n".join(lines).strip(), *last):
            if message:
                yield message
        if ended:
            print()
            return


def is_command(line: str) -> bool:
    """Return True if a line is a command. Any other line that begins with a slash is text."""
    return line.strip() in COMMANDS


def _read_message(lines: list[str], read: Read, waits: Callable[[], bool]) -> bool:
    """Append the lines of a message to `lines`; return True at the end of input."""
    try:
        lines.append(read("> "))
        # Quotes inside a paste are part of its text. Only typed quotes open a message of several lines.
        if lines[0].lstrip().startswith(QUOTES) and "\n" not in lines[0] and not waits():
            _read_quoted(lines, read)
            return False
        # A terminal with bracketed paste delivers a paste as one line. Other terminals deliver it line by line.
        while not is_command(lines[-1]) and waits():
            lines.append(read(""))
    except EOFError:
        return True
    return False


def _read_quoted(lines: list[str], read: Read) -> None:
    """Append lines up to the closing quotes, and remove both pairs of quotes."""
    lines[0] = lines[0].lstrip().removeprefix(QUOTES)
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(read("… "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)


def _waits() -> bool:
    return bool(select.select([sys.stdin], [], [], _PASTE_S)[0])
