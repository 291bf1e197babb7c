"""Guards for importing native libraries: check the CPU first, and suppress the libraries' log messages."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec

from ..artifact.errors import PrecastError
from ..artifact.machine import cpu_features, processor_family

# The largest library of jaxlib, which its modules share.
_LIBRARY = "libjax_common.so"
_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


def check_cpu() -> None:
    """Refuse a CPU that cannot run jaxlib. Otherwise, an illegal instruction in jaxlib would end the process.

    Raises:
        PrecastError: this CPU lacks a feature that jaxlib was compiled for. The wheels of jaxlib need AVX.
    """
    features = cpu_features()
    if features and processor_family() == "x86_64" and "avx" not in features:
        from jaxlib import cpu_feature_guard  # knows the features that jaxlib was compiled for

        try:
            cpu_feature_guard.check_cpu_features()
        except RuntimeError:
            raise PrecastError(
                "jaxlib cannot run on this CPU, which lacks AVX; use a CPU from 2011 or later, or have the virtual"
                " machine expose the CPU features of its host (CPU type host)."
            ) from None


def open_jaxlib() -> None:
    """Open jaxlib's library without Python's lock, so that its import holds the lock for 5 instead of 20 ms.

    Do nothing if the library cannot be opened; the import gives the reason.
    """
    spec = find_spec("jaxlib")
    with suppress(PrecastError):
        check_cpu()
        # A call of a C function gives up the lock, and `ctypes.CDLL` does not.
        open_library = ctypes.CDLL(None).dlopen
        open_library.restype = ctypes.c_void_p
        # XLA reads the log level once, when it is loaded.
        with quiet("1"):
            for folder in (spec and spec.submodule_search_locations) or ():
                open_library(os.fsencode(os.path.join(folder, _LIBRARY)), os.RTLD_NOW)


def quiet(level: str) -> AbstractContextManager[None]:
    """Set the log level of Google's libraries during the import of one of them, but keep a level set by the user.

    Level 1 counts as unset, because the command line itself sets it for the libraries that an export imports.
    """
    return variable(_LEVEL, level) if os.environ.get(_LEVEL, "1") == "1" else nullcontext()


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for C code, without changing `os.environ`."""
    os.putenv(name, value)
    try:
        yield
    finally:
        if (before := os.environ.get(name)) is None:
            os.unsetenv(name)
        else:
            os.putenv(name, before)
