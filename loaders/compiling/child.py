"""Child processes for parts of the loader's work, with the same Python and packages.

A child first reports that it runs. A silent child is an executable other than Python, or an application that embeds
Python and started itself. An environment variable of a child names its work, and no descendant starts another child for
the same work.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import subprocess

# Names the modules that this process and its ancestors were started for.
GUARD = "PRECAST_CHILD_OF"
READY = b"precast child ready\n"
# Seconds for Python to start and import on a slow disk.
START_S = 120
# Linux's PR_SET_PDEATHSIG, prctl(2).
_SET_DEATH_SIGNAL = 1


class NotStarted(Exception):
    """The child did not start. The text is the reason, worded to stand in brackets."""


class Child:
    """A running child process.

    Attributes:
        process: the process, with pipes.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", errors: IO[bytes]) -> None:
        self.process, self._errors = process, errors

    def complaint(self) -> str:
        """Return the last line of its standard error, or an empty text."""
        return _last_line(self._errors)


@contextmanager
def started(module: str, *arguments: str, changes: Mapping[str, str] | None = None) -> Iterator[Child]:
    """Start a module of precast as a child process, and end it after the ``with`` block.

    Args:
        module: the module's name; its `main` begins with `answers`.
        arguments: command-line arguments.
        changes: environment variables to set.

    Raises:
        NotStarted: no child can be started, or it does not become ready.
    """
    import subprocess
    import tempfile

    line, surroundings = command(module, *arguments), environment(module) | dict(changes or {})
    try:
        errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed below)
    except OSError as error:
        raise NotStarted(str(error)) from None
    with errors:
        try:
            process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=surroundings
            )
        except (OSError, ValueError) as error:
            raise NotStarted(str(error)) from None
        try:
            _await_ready(process, line[0], errors)
            yield Child(process, errors)
        finally:
            _end(process)


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module of precast.

    Raises:
        NotStarted: there is no Python to start, or this process descends from such a child.
    """
    if module in os.environ.get(GUARD, "").split(","):
        raise NotStarted(f"this process was started by {module} itself")
    python = _python()
    if python is None:
        raise NotStarted("there is no Python to start")
    # -P: nothing is imported from the folder that this happens to run in.
    return [python, "-P", "-m", module, *arguments]


def _end_with_parent() -> None:
    """Have the system end this process when its parent ends for any reason."""
    import ctypes
    import signal

    with suppress(AttributeError, OSError):  # another system than Linux
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def environment(module: str) -> dict[str, str]:
    """Return this process's environment, with its import path and the guard variable.

    Leave out path entries that are not text, which imports ignore, and empty ones, which mean the working folder.
    """
    folders = [folder for folder in sys.path if isinstance(folder, str) and folder]
    above = os.environ.get(GUARD)
    guard = f"{above},{module}" if above else module
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), GUARD: guard}


def _python() -> str | None:
    """Return the interpreter. `sys.executable` may be a server or an application that embeds Python."""
    # An application frozen into one file comes without an interpreter.
    if getattr(sys, "frozen", False):
        return None
    if sys.executable and os.path.basename(sys.executable).lower().startswith(("python", "pypy")):
        return sys.executable
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    paths = [os.path.join(prefix, "bin", name) for prefix in (sys.prefix, sys.base_prefix)]
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def _await_ready(process: "subprocess.Popen[bytes]", executable: str, errors: IO[bytes]) -> None:
    """Read a child's report that it runs.

    Raises:
        NotStarted: the child says anything else, or nothing.
    """
    import selectors

    assert process.stdout is not None
    found, until = b"", time.monotonic() + START_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        # Bypass Python's buffer: other code reads the bytes after the line.
        while READY.startswith(found) and found != READY:
            if not selector.select(max(0.0, until - time.monotonic())):
                raise NotStarted(f"{executable} did not become ready within {START_S} s")
            piece = os.read(process.stdout.fileno(), len(READY) - len(found))
            if not piece:
                raise NotStarted(f"{executable}: {_last_line(errors) or ending(process.wait())}")
            found += piece
    if found != READY:
        raise NotStarted(f"{executable} answers as something other than Python does")


def ending(code: int) -> str:
    """Say how a process ended: "SIGSEGV", or "exit code 3"."""
    import signal

    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def _end(process: "subprocess.Popen[bytes]") -> None:
    # An idle child ends at the end of its input; a busy one must be ended.
    if process.poll() is None:
        process.kill()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):  # the child ended without reading all of our data
            if stream is not None:
                stream.close()
    process.wait()


def answers() -> BinaryIO:
    """In a child, report that it runs, and return the stream to its parent.

    Redirect the output of libraries to standard error, so that it does not count as an answer.
    """
    _end_with_parent()
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    stream.write(READY)
    stream.flush()
    return stream
