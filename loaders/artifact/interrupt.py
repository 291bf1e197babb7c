"""Handle Ctrl-C at any moment in precast's own processes: clean up, print "interrupted", and exit with code 130.

The handler raises no exception, because an exception could surface anywhere: in an unfinished import, in a destructor
that swallows the exception, or in a callback from compiled code that would then crash. Instead, a block that could
leave something behind registers a clean-up function with `on_interrupt`. The handler runs the registered functions and
ends the process. `raise_on_interrupt` restores Python's own KeyboardInterrupt for code that must reset the terminal,
such as a password prompt.

Python runs signal handlers only between two bytecode instructions, and the main thread may spend minutes inside a
compiler or a program. So a second thread also waits for the signal, and does the handler's work if the main thread does
not respond.

This module is imported first and imports almost nothing, so that it can handle Ctrl-C almost from the start. A program
that imports precast as a library has no such handler, and `on_interrupt` has no effect there.
"""

import _thread
import os
from time import sleep

TYPE_CHECKING = False  # importing typing takes milliseconds
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import TracebackType
    from typing import NoReturn
else:
    import _signal as signal  # unlike signal, it does not import enum

INTERRUPTED = 130
# Seconds that the main thread is allowed to take until it reaches its handler.
_PATIENCE_S = 1.0
# A process has one handler per signal, and so one list of clean-ups.
_CLEAN_UPS: "list[Callable[[], object]]" = []
_RAISING: "list[object]" = []
# Signals that the main thread has handled.
_HANDLED: "list[int]" = []
# Reentrant: a second Ctrl-C may arrive while `end` runs but before it ignores the signal. The handler then calls `end`
# again in the same thread, and this inner call ends the process.
_ENDING = _thread.RLock()


class on_interrupt:
    """Run `clean_up` if the process is interrupted while the block runs.

    Args:
        clean_up: a function that is safe to call at any moment, even just before the block begins or just after it
            ends.
    """

    def __init__(self, clean_up: "Callable[[], object]") -> None:
        self._clean_up = clean_up

    def __enter__(self) -> None:
        _CLEAN_UPS.append(self._clean_up)

    def __exit__(
        self, _: "type[BaseException] | None", __: "BaseException | None", ___: "TracebackType | None"
    ) -> None:
        _CLEAN_UPS.remove(self._clean_up)


class raise_on_interrupt:
    """Raise KeyboardInterrupt on Ctrl-C while the block runs, as Python does by default."""

    def __enter__(self) -> None:
        _RAISING.append(self)

    def __exit__(
        self, _: "type[BaseException] | None", __: "BaseException | None", ___: "TracebackType | None"
    ) -> None:
        _RAISING.remove(self)


def install() -> None:
    """Install the handler for SIGINT. If this process was started with SIGINT ignored, do nothing."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _interrupted)
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    _thread.start_new_thread(_watch, (readable,))


def _watch(readable: int) -> None:
    """After Ctrl-C, end the process if the main thread does not do so within a second."""
    while os.read(readable, 1):
        sleep(_PATIENCE_S)
        if not _HANDLED and not _RAISING:
            end()
        _HANDLED.clear()


def ignore() -> None:
    """Ignore all further SIGINT signals, because the work is done and only Python's own exit remains."""
    _HANDLED.append(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end() -> "NoReturn":
    """Run the clean-ups, print "interrupted", and end the process."""
    # If the main thread reaches its handler late, it waits here until the process ends.
    _ENDING.acquire()
    # Each step may fail: `ignore` raises outside the main thread, and a clean-up may meet a full disk. The next command
    # removes what a failed clean-up leaves behind.
    for step in (ignore, *reversed(_CLEAN_UPS)):
        try:
            step()
        except BaseException:
            continue
    try:
        os.write(2, b"\ninterrupted\n")
    finally:  # exit even if standard error is closed
        # Exit at once: Python's ordinary exit can crash while a compiler's threads still run.
        os._exit(INTERRUPTED)


def _interrupted(number: int, _: object) -> None:
    _HANDLED.append(number)
    if _RAISING:
        raise KeyboardInterrupt
    end()
