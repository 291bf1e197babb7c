"""Set environment variables for libraries that read them at start, hidden from all other code."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


def quiet(level: str) -> AbstractContextManager[None]:
    """Set the log level of Google's libraries while one is loaded, unless the user has set another than 1.

    The command line sets 1, for the libraries that an export loads, and TensorFlow needs 2.
    """
    return variable(_LEVEL, level) if os.environ.get(_LEVEL, "1") == "1" else nullcontext()


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
