"""Set environment variables for libraries that read them at start, hidden from all other code."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


def quiet(level: str) -> AbstractContextManager[None]:
    """Set the log level of Google's libraries while one is loaded, unless the user has set one."""
    return nullcontext() if _LEVEL in os.environ else variable(_LEVEL, level)


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set a variable in the environment of C code; `os.environ` stays as it is."""
    os.putenv(name, value)
    try:
        yield
    finally:
        if (before := os.environ.get(name)) is None:
            os.unsetenv(name)
        else:
            os.putenv(name, before)
