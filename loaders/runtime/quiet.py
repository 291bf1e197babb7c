"""Libraries of Google's that take the level of their log from the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


@contextmanager
def quiet(level: str) -> Iterator[None]:
    """Set the log level while a library is loaded, unless the user has set one.

    The variable stands in the environment that C code sees, and nowhere that Python code looks.
    """
    if _LEVEL in os.environ:
        yield
        return
    os.putenv(_LEVEL, level)
    try:
        yield
    finally:
        os.unsetenv(_LEVEL)
