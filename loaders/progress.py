"""Show the progress of long work: one changing line on a terminal, occasional lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .artifact.errors import printable

Show = Callable[[str], None]
Report = Callable[[int, int], None]
# Seconds between two lines if standard error is no terminal; seconds of work before the time left is shown.
_PAUSE_S, _SETTLED_S = 15.0, 2.0
# The width of a terminal that does not report it.
_COLUMNS = 80


@contextmanager
def line_on_terminal() -> Iterator[Show]:
    """Yield a function that replaces the progress line on standard error.

    The line is erased when the block ends, even with an error. Without a terminal nothing is shown.
    """
    if not sys.stderr.isatty():
        yield lambda line: None
        return
    last = ""

    def show(line: str) -> None:
        nonlocal last
        # A wrapped line could not be replaced.
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
    """Yield a function that reports the finished and the total amount of work.

    Args:
        verb: participle for the work, such as "scored".
        noun: name of its units, such as "predictions".
        clock: returns seconds.
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
