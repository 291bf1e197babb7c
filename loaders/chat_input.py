"""Messages that a person types: lines that are pasted together are one message."""

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
# How long the rest of a paste may take to arrive, in seconds.
_PASTE_S = 0.02

Read = Callable[[str], str]


def help_text() -> str:
    """The commands, and how to type more than one line."""
    lines = [f"{name:<8} {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(
        (*lines, f"{QUOTES:<8} begin and end a message of several lines; pasted lines need none")
    )


def prepare(history: History) -> None:
    """Give `input` line editing, the history of former chats, and pasting of several lines, where the system can."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(False)
    # Off in Python, which executes pasted lines one by one; libedit does not know it.
    readline.parse_and_bind("set enable-bracketed-paste on")
    for message in history.messages:
        readline.add_history(message)


def remember(history: History, message: str) -> None:
    """Add a message to the history, for the arrow keys and for the next chat."""
    if history.add(message) and (readline := sys.modules.get("readline")):
        readline.add_history(message)


def messages(read: Read = input, waits: "Callable[[], bool] | None" = None) -> Iterator[str]:
    """Yield what is typed, a message or a command at a time, until the end of input.

    Args:
        read: reads a line after a prompt, as `input`.
        waits: whether more input has arrived.
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
        # A command that was typed ahead stands alone.
        last = [lines.pop()] if len(lines) > 1 and is_command(lines[-1]) else []
        for message in ("\n".join(lines).strip(), *last):
            if message:
                yield message
        if ended:
            print()
            return


def is_command(line: str) -> bool:
    """Whether a line is a command; any other that begins with a slash is text."""
    return line.strip() in COMMANDS


def _read_message(lines: list[str], read: Read, waits: Callable[[], bool]) -> bool:
    """Collect the lines of a message; return whether the input has ended."""
    try:
        lines.append(read("> "))
        # Quotes that are pasted belong to the text.
        if lines[0].lstrip().startswith(QUOTES) and "\n" not in lines[0] and not waits():
            _read_quoted(lines, read)
            return False
        # A terminal that brackets what is pasted gives all of it as one line; another gives line after line.
        while not is_command(lines[-1]) and waits():
            lines.append(read(""))
    except EOFError:
        return True
    return False


def _read_quoted(lines: list[str], read: Read) -> None:
    """Read on until the closing quotes, which are removed as the opening ones are."""
    lines[0] = lines[0].lstrip().removeprefix(QUOTES)
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(read("… "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)


def _waits() -> bool:
    return bool(select.select([sys.stdin], [], [], _PASTE_S)[0])
