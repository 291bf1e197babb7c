"""Child processes that do a part of the loader's work: the same Python, with the same packages.

A child first says that it runs. An executable that is no Python, and an application that embeds Python and starts
itself, are known by their silence. A variable in a child's environment names the work it was started for, and no
process starts another for the same work below it.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import subprocess

# Names the modules that a process and those above it were started for.
GUARD = "PRECAST_CHILD_OF"
READY = b"precast child ready\n"
# For a Python to start and import, on a slow disk.
START_S = 120
# Linux's PR_SET_PDEATHSIG, prctl(2).
_SET_DEATH_SIGNAL = 1


class NotStarted(Exception):
    """No child runs. The text is the reason, in words that go into a sentence's brackets."""


class Child:
    """A child process that runs.

    Attributes:
        process: with pipes.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", errors: IO[bytes]) -> None:
        self.process, self._errors = process, errors

    def complaint(self) -> str:
        """The last line on its standard error; empty where there is none."""
        return _last_line(self._errors)


@contextmanager
def started(module: str, *arguments: str, changes: Mapping[str, str] | None = None) -> Iterator[Child]:
    """Start a module of precast as a child process; it is ended behind the ``with`` block.

    Args:
        module: its name; its `main` begins with `answers`.
        arguments: of its command line.
        changes: variables of its environment.

    Raises:
        NotStarted: when no child can be started, and when it does not become ready.
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
    """The command line that runs a module of precast.

    Raises:
        NotStarted: where there is no Python to start, or this process descends from such a child.
    """
    if module in os.environ.get(GUARD, "").split(","):
        raise NotStarted(f"this process was started by {module} itself")
    python = _python()
    if python is None:
        raise NotStarted("there is no Python to start")
    # -P: nothing is imported from the folder that this happens to run in.
    return [python, "-P", "-m", module, *arguments]


def _end_with_parent() -> None:
    """Have the system end this process when the one that started it ends, however that comes about."""
    import ctypes
    import signal

    with suppress(AttributeError, OSError):  # another system than Linux
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def environment(module: str) -> dict[str, str]:
    """This process's environment, with all that it imports from, and the guard.

    Without what is no text, which imports pass over, and without what is empty, which means the folder that the child
    happens to run in.
    """
    folders = [folder for folder in sys.path if isinstance(folder, str) and folder]
    above = os.environ.get(GUARD)
    guard = f"{above},{module}" if above else module
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), GUARD: guard}


def _python() -> str | None:
    """The interpreter. `sys.executable` may be a server or an application that embeds Python."""
    # An application frozen into one file has no interpreter beside it.
    if getattr(sys, "frozen", False):
        return None
    if sys.executable and os.path.basename(sys.executable).lower().startswith(("python", "pypy")):
        return sys.executable
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    paths = [os.path.join(prefix, "bin", name) for prefix in (sys.prefix, sys.base_prefix)]
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def _await_ready(process: "subprocess.Popen[bytes]", executable: str, errors: IO[bytes]) -> None:
    """Read what a child says first.

    Raises:
        NotStarted: when that is anything else, or nothing.
    """
    import selectors

    assert process.stdout is not None
    found, until = b"", time.monotonic() + START_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        # Past Python's buffer: what follows the line is for others to read.
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
    # At the end of its input a child may end by itself, but not while it works.
    if process.poll() is None:
        process.kill()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):  # where it has gone with words of ours unread
            if stream is not None:
                stream.close()
    process.wait()


def answers() -> BinaryIO:
    """In a child: say that it runs, and return the stream to its parent.

    What libraries print goes to standard error from now on, so that it does not pass for an answer.
    """
    _end_with_parent()
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    stream.write(READY)
    stream.flush()
    return stream
