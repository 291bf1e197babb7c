"""The progress of long work: one line on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .artifact.errors import printable

Show = Callable[[str], None]
Report = Callable[[int, int], None]
# Seconds of work between two lines where standard error is no terminal; before the time left is told.
_PAUSE_S, _SETTLED_S = 15.0, 2.0
# Of a terminal that does not tell.
_COLUMNS = 80


@contextmanager
def line_on_terminal() -> Iterator[Show]:
    """Give a function that shows a line on standard error in place of the one before.

    The line is gone when the block ends, also where it fails. Nothing is shown where standard error is no terminal.
    """
    if not sys.stderr.isatty():
        yield lambda line: None
        return
    last = ""

    def show(line: str) -> None:
        nonlocal last
        # A line that wraps could not be replaced.
        line = printable(line)[: _columns() - 1]
        if line != last:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
            last = line

    try:
        yield show
    finally:
        show("")


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except OSError:
        return _COLUMNS


@contextmanager
def counted(verb: str, noun: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Report]:
    """Give a function that reports how much is done, of how much in all.

    Args:
        verb: of the work, as "scored".
        noun: of its parts, as "predictions".
        clock: gives seconds.
    """
    started = said = clock()

    def line(done: int, total: int) -> str:
        return f"{verb} {done:,} of {total:,} {noun}{_time_left(clock() - started, done, total)}"

    def print_now_and_then(done: int, total: int) -> None:
        nonlocal said
        if done < total and clock() - said >= _PAUSE_S:
            said = clock()
            print(line(done, total), file=sys.stderr)

    with line_on_terminal() as show:
        if sys.stderr.isatty():
            yield lambda done, total: show(line(done, total))
        else:
            yield print_now_and_then


def _time_left(elapsed: float, done: int, total: int) -> str:
    if not done or elapsed < _SETTLED_S:
        return ""
    left = round(elapsed / done * (total - done))
    return f", {left // 60}:{left % 60:02} left"
