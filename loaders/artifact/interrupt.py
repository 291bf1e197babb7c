"""Ctrl-C in a process of precast's own: it tidies up, says one word and ends with 130, whatever it was doing.

No exception is raised for it. An exception may come up inside of anything: an import that is half done, a destructor,
which swallows it, or a callback of compiled code, which may crash. Instead, a block that would leave something behind
tells with `undoing` how it is removed, and the handler does that and ends the process. Only where a terminal must be
put right again, as while a password is typed, `raising` brings Python's own KeyboardInterrupt back.

This module is imported before any other, and imports next to nothing, so that there is hardly a moment without it.
In a process of somebody else's no handler is installed, and `undoing` does nothing.
"""

import os

TYPE_CHECKING = False  # typing takes some milliseconds
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import TracebackType
    from typing import NoReturn
else:
    import _signal as signal  # which has all that is needed here, and imports no enumerations

INTERRUPTED = 130
# A process has one handler of a signal, and so one list of what it must undo.
_UNDO: "list[Callable[[], object]]" = []
_RAISING: "list[object]" = []


class undoing:
    """Have something undone if the process is interrupted while the block runs.

    Args:
        undo: called at any moment, also where the block has not begun or has just ended.
    """

    def __init__(self, undo: "Callable[[], object]") -> None:
        self._undo = undo

    def __enter__(self) -> None:
        _UNDO.append(self._undo)

    def __exit__(
        self, _: "type[BaseException] | None", __: "BaseException | None", ___: "TracebackType | None"
    ) -> None:
        _UNDO.remove(self._undo)


class raising:
    """Have KeyboardInterrupt raised while the block runs, as Python does."""

    def __enter__(self) -> None:
        _RAISING.append(self)

    def __exit__(
        self, _: "type[BaseException] | None", __: "BaseException | None", ___: "TracebackType | None"
    ) -> None:
        _RAISING.remove(self)


def install() -> None:
    """Take over SIGINT, unless who started this process wants it ignored."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupted)


def ignore() -> None:
    """Ignore SIGINT from now on: the work is done, and all that is left is Python's own exit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end() -> "NoReturn":
    """Undo what is to be undone, say so, and end the process."""
    ignore()
    for undo in reversed(tuple(_UNDO)):
        try:
            undo()
        except BaseException:  # what cannot be undone is removed by the next command
            continue
    try:
        os.write(2, b"\ninterrupted\n")
    finally:  # also where standard error is closed
        # At once: a compiler's threads that still work do not survive the usual way out of Python.
        os._exit(INTERRUPTED)


def _interrupted(_: int, __: object) -> None:
    if _RAISING:
        raise KeyboardInterrupt
    end()
