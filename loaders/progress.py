"""Progress of long work: the type of its callbacks, and its display on standard error."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from .artifact.errors import printable
from .artifact.frozen import Frozen

# Minimum seconds between two lines if standard error is not a terminal, and the seconds that a step must have run
# before its remaining time is shown.
_PAUSE_S, _SETTLED_S = 15.0, 2.0
# The assumed width of a terminal that does not report its width.
_COLUMNS = 80


class Step(Frozen):
    """The state of long work.

    Attributes:
        text: the work, as a participle: "hashing", "comparing weights".
        done: number of finished units.
        total: number of all units; 0 if unknown.
        unit: the unit's name in the plural, such as "predictions". A display shows "bytes" in megabytes.
    """

    text: str
    done: int = 0
    total: int = 0
    unit: str = ""


Progress = Callable[[Step], None]


def silent(_: Step) -> None:
    """Ignore progress."""


def amount(step: Step) -> str:
    """Return the finished and the total units as text, such as "3 of 8 requests"; the total must be known."""
    if step.unit == "bytes":
        return f"{step.done / 1e6:,.1f} of {step.total / 1e6:,.1f} MB"
    return f"{step.done:,} of {step.total:,} {step.unit}"


def byte_counter(progress: Progress, text: str, total: int) -> Callable[[int], None]:
    """Return a function that accepts the size of each finished block, and reports the total so far.

    Args:
        progress: receives the total so far.
        text: the work, as for `Step`.
        total: number of bytes of all blocks.
    """
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(Step(text=text, done=done, total=total, unit="bytes"))

    return count


class Display:
    """Progress and messages on standard error.

    On a terminal, each step replaces the line of the previous step. Elsewhere, a line is printed at most every 15
    seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start a display.

        Args:
            clock: a function that returns the time in seconds.
        """
        self._clock = clock
        self._on_terminal = sys.stderr.isatty()
        self._started = self._printed = clock()
        self._text = self._line = ""

    def __call__(self, step: Step) -> None:
        """Show a step."""
        now = self._clock()
        if step.text != self._text:
            self._started, self._text = now, step.text
        line = printable(_line(step) + _time_left(step, now - self._started))
        is_last = 0 < step.total <= step.done
        if self._on_terminal:
            self._replace(line)
        elif not is_last and now - self._printed >= _PAUSE_S:
            self._printed = now
            print(line, file=sys.stderr)

    def log(self, message: str) -> None:
        """Print a message that stays on the screen."""
        self.clear()
        print(printable(message), file=sys.stderr)

    def clear(self) -> None:
        """Erase the progress line on a terminal."""
        self._replace("")

    def _replace(self, line: str) -> None:
        # Shorten the line, because "\r" could not return to the start of a wrapped line.
        line = line[: _columns() - 1]
        if line != self._line:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
            self._line = line


@contextmanager
def show_progress(clock: Callable[[], float] = time.monotonic) -> Iterator[Display]:
    """Yield a display whose line is erased when the block ends, even if it raises."""
    display = Display(clock)
    try:
        yield display
    finally:
        display.clear()


def progress_on_terminal() -> AbstractContextManager[Progress]:
    """Yield a display if standard error is a terminal, else `silent`. Pulls and pushes use this by default."""
    return show_progress() if sys.stderr.isatty() else nullcontext(silent)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except OSError:
        return _COLUMNS


def _line(step: Step) -> str:
    if not step.total:
        return f"{step.text} …"
    return f"{step.text}: {amount(step)}"


def _time_left(step: Step, elapsed: float) -> str:
    if not step.done or elapsed < _SETTLED_S:
        return ""
    left = round(elapsed / step.done * (step.total - step.done))
    return f", {left // 60}:{left % 60:02} left"
