"""Ctrl-C in a process of precast's own: it tidies up, says one word and ends with 130, whatever it was doing.

No exception is raised for it. An exception may come up inside of anything: an import that is half done, a destructor,
which swallows it, or a callback of compiled code, which may crash. Instead, a block that would leave something behind
tells with `undoing` how it is removed, and the handler does that and ends the process. Only where a terminal must be
put right again, as while a password is typed, `raising` brings Python's own KeyboardInterrupt back.

Python calls handlers between two of its own steps. While the main thread is inside of a compiler or a program, which
may be for minutes, a thread that waits for the signal does what the handler would.

This module is imported before any other, and imports next to nothing, so that there is hardly a moment without it.
In a process of somebody else's no handler is installed, and `undoing` does nothing.
"""

import _thread
import os
from time import sleep

TYPE_CHECKING = False  # typing takes some milliseconds
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import TracebackType
    from typing import NoReturn
else:
    import _signal as signal  # which has all that is needed here, and imports no enumerations

INTERRUPTED = 130
# How long the main thread has to come to its handler, in seconds.
_PATIENCE_S = 1.0
# A process has one handler of a signal, and so one list of what it must undo.
_UNDO: "list[Callable[[], object]]" = []
_RAISING: "list[object]" = []
# Signals that the main thread has come to.
_HANDLED: "list[int]" = []
_ENDING = _thread.allocate_lock()


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
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _interrupted)
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    _thread.start_new_thread(_watch, (readable,))


def _watch(readable: int) -> None:
    """End the process where the main thread does not come to do it."""
    while os.read(readable, 1):
        sleep(_PATIENCE_S)
        if not _HANDLED and not _RAISING:
            end()
        _HANDLED.clear()


def ignore() -> None:
    """Ignore SIGINT from now on: the work is done, and all that is left is Python's own exit."""
    _HANDLED.append(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end() -> "NoReturn":
    """Undo what is to be undone, say so, and end the process."""
    # Once: the main thread may come to its handler after all, and waits here for the end.
    _ENDING.acquire()
    # `ignore` is refused to a thread beside the main one. What cannot be undone is removed by the next command.
    for step in (ignore, *reversed(_UNDO)):
        try:
            step()
        except BaseException:
            continue
    try:
        os.write(2, b"\ninterrupted\n")
    finally:  # also where standard error is closed
        # At once: a compiler's threads that still work do not survive the usual way out of Python.
        os._exit(INTERRUPTED)


def _interrupted(number: int, _: object) -> None:
    _HANDLED.append(number)
    if _RAISING:
        raise KeyboardInterrupt
    end()
