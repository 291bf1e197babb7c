"""How far long work is, for who watches it on a terminal."""

import sys
from collections.abc import Callable


def line_on_terminal() -> Callable[[str], None]:
    """Shows a line on standard error in place of the one before; an empty one when the work is done.

    Nothing is shown where standard error is no terminal.
    """
    if not sys.stderr.isatty():
        return lambda line: None
    last = ""

    def show(line: str) -> None:
        nonlocal last
        if line != last:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
            last = line

    return show
