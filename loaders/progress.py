"""Progress of long work: the type of its callbacks, and its display on standard error."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .artifact.errors import printable
from .artifact.frozen import Frozen

# Seconds between two lines if standard error is no terminal; seconds of a step before its time left is shown.
_PAUSE_S, _SETTLED_S = 15.0, 2.0
# The width of a terminal that does not report it.
_COLUMNS = 80


class Step(Frozen):
    """The state of long work.

    Attributes:
        text: the work, as a participle: "hashing", "comparing weights".
        done: finished units.
        total: units in all; 0 if unknown.
        unit: name of the units: "predictions". A display converts "bytes" to megabytes.
    """

    text: str
    done: int = 0
    total: int = 0
    unit: str = ""


Progress = Callable[[Step], None]


def silent(_: Step) -> None:
    """Ignore progress."""


@contextmanager
def show_progress(clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """Yield a function that shows progress on standard error.

    On a terminal each step replaces the one before, and the line is erased when the block ends, even with an error.
    Elsewhere a line is printed every 15 seconds at most.

    Args:
        clock: returns seconds.
    """
    with _line_on_terminal() if sys.stderr.isatty() else _occasional_lines(clock) as show:
        yield _with_time_left(show, clock)


_Show = Callable[[Step, str], None]


@contextmanager
def _line_on_terminal() -> Iterator[_Show]:
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
        yield lambda _, line: show(line)
    finally:
        show("")


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except OSError:
        return _COLUMNS


@contextmanager
def _occasional_lines(clock: Callable[[], float]) -> Iterator[_Show]:
    printed = clock()

    def show(step: Step, line: str) -> None:
        nonlocal printed
        is_last = 0 < step.total <= step.done
        if not is_last and clock() - printed >= _PAUSE_S:
            printed = clock()
            print(printable(line), file=sys.stderr)

    yield show


def _with_time_left(show: _Show, clock: Callable[[], float]) -> Progress:
    started, text = clock(), ""

    def progress(step: Step) -> None:
        nonlocal started, text
        if step.text != text:
            started, text = clock(), step.text
        show(step, _line(step) + _time_left(step, clock() - started))

    return progress


def _line(step: Step) -> str:
    if not step.total:
        return f"{step.text} …"
    if step.unit == "bytes":
        return f"{step.text}: {step.done / 1e6:,.1f} of {step.total / 1e6:,.1f} MB"
    return f"{step.text}: {step.done:,} of {step.total:,} {step.unit}"


def _time_left(step: Step, elapsed: float) -> str:
    if not step.done or elapsed < _SETTLED_S:
        return ""
    left = round(elapsed / step.done * (step.total - step.done))
    return f", {left // 60}:{left % 60:02} left"
