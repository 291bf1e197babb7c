"""Run parts of the loader's work in child processes, with the same Python and packages.

Parent and child exchange messages through pipes. A message is a line of JSON, followed by binary data. The key "data"
of the JSON states the number of bytes in this data. The messages are:

1. The child writes `READY` as soon as it runs. If it writes anything else, or nothing, then the executable was not
   Python: `sys.executable` may be an application that embeds Python, and a second copy of it has now started.
2. The parent sends a request: {"request": {…}}.
3. The child reports its progress any number of times, {"progress": "…"}, and then sends either an answer, {"answer":
   {…}}, or a sentence about its failure, {"error": "…"}. Steps 2 and 3 may repeat.
4. The parent closes the pipe, and the child exits.

The environment variable `GUARD` names the modules that a process and its ancestors were started for. A process refuses
to start a child for any of these modules, so children cannot start each other endlessly.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from ..artifact.errors import PrecastError, printable
from ..progress import Progress, Step, silent

if TYPE_CHECKING:
    import subprocess

# The environment variable with the modules that this process and its ancestors were started for, separated by commas.
GUARD = "PRECAST_CHILD_OF"
READY = b"precast child ready\n"
# Seconds that Python may take to start and import the module on a slow disk.
START_S = 120
# Seconds that a child may take to exit after it has closed its pipe. Also the seconds between a request's time limit
# and the moment at which the system ends the child.
EXIT_S = 5
_PIECE_BYTES = 1 << 20
# Linux's PR_SET_PDEATHSIG, prctl(2).
_SET_DEATH_SIGNAL = 1

Answer = tuple[Mapping[str, Any], bytes]


class StartError(Exception):
    """The child did not start. The text is the reason, in a form that fits in brackets."""


class Refusal(Exception):
    """The child answered with an error. The text is the sentence that the child sent."""


class Crash(Exception):
    """The child ended without an answer.

    Attributes:
        code: exit code; if a signal ended the child, the negated number of the signal.
        reason: the signal's name; if no signal ended the child, its last line on standard error, or else the exit code
            in words.
    """

    def __init__(self, code: int, complaint: str) -> None:
        self.code = code
        self.reason = (complaint if code >= 0 else "") or ending(code)
        super().__init__(self.reason)


# --- the parent ---------------------------------------------------------------------------------------------


class Child:
    """The parent's handle for a running child process.

    Attributes:
        process: the process.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", errors: IO[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._errors = errors
        self._input, self._output = process.stdin, process.stdout
        self._received = bytearray()

    def await_ready(self, name: str) -> None:
        """Wait until the child reports that it runs.

        Args:
            name: the executable, for messages.

        Raises:
            StartError: the child writes anything other than `READY`, or does not write `READY` in time.
        """
        until = time.monotonic() + START_S
        try:
            # Compare byte by byte, because another program may never end its line.
            while READY.startswith(self._received) and len(self._received) < len(READY):
                self._receive_more(until)
        except TimeoutError:
            raise StartError(f"{name} did not become ready within {START_S} s") from None
        except EOFError:
            code = self._exit_code()
            raise StartError(f"{name}: {_last_line(self._errors) or ending(code)}") from None
        if not self._received.startswith(READY):
            raise StartError(f"{name} does not behave like a Python interpreter")
        del self._received[: len(READY)]

    def ask(
        self,
        request: Mapping[str, Any],
        data: bytes = b"",
        *,
        limit_s: int | None = None,
        progress: Progress = silent,
    ) -> Answer:
        """Send a request, and wait for its answer.

        Args:
            request: values that JSON can represent.
            data: the request's binary data.
            limit_s: seconds that the answer may take; None for no limit.
            progress: receives the child's steps, which have a text but no counts.

        Returns:
            The answer's values, and the answer's binary data.

        Raises:
            Refusal: the child answers with an error.
            Crash: the child ends without an answer.
            TimeoutError: no answer arrives within `limit_s`.
        """
        until = None if limit_s is None else time.monotonic() + limit_s
        try:
            with suppress(BrokenPipeError):  # the child has crashed, but its last messages can still be read
                _send(self._input, {"request": request, "limit_s": limit_s}, data)
            while True:
                message, received = self._receive(until)
                if "progress" not in message:
                    break
                progress(Step(text=str(message["progress"])))
        except EOFError:
            raise Crash(self._exit_code(), _last_line(self._errors)) from None
        if "error" in message:
            raise Refusal(str(message["error"]))
        return message["answer"], received

    def close(self) -> None:
        """End the child."""
        # Kill the child, because a busy child would not notice the end of its input.
        if self.process.poll() is None:
            self.process.kill()
        for stream in (self._input, self._output):
            with suppress(OSError):  # the child ended without reading all of our data
                stream.close()
        self.process.wait()

    def _receive(self, until: float | None) -> tuple[Mapping[str, Any], bytes]:
        while b"\n" not in self._received:
            self._receive_more(until)
        line = self._take(self._received.index(b"\n") + 1)
        try:
            message = json.loads(line)
            size = int(message["data"])
        except (ValueError, KeyError, TypeError):  # a library wrote into the pipe
            raise Crash(0, f"unexpected output: {line[:80].rstrip()!r}") from None
        while len(self._received) < size:
            self._receive_more(until)
        return message, self._take(size)

    def _receive_more(self, until: float | None) -> None:
        """Read at least one byte.

        Raises:
            EOFError: the child has closed its end of the pipe.
            TimeoutError: no byte arrives before the time `until`.
        """
        import selectors

        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            if not selector.select(None if until is None else max(0.0, until - time.monotonic())):
                raise TimeoutError
        # Read the file descriptor, because the stream's buffer could hold bytes that the selector does not see.
        piece = os.read(self._output.fileno(), _PIECE_BYTES)
        if not piece:
            raise EOFError
        self._received += piece

    def _take(self, count: int) -> bytes:
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken

    def _exit_code(self) -> int:
        """Return the exit code of a child that has closed its end of the pipe."""
        import subprocess

        try:
            return self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextmanager
def started(module: str, *, changes: Mapping[str, str] | None = None) -> Iterator[Child]:
    """Start a module of precast as a child process; end the process after the ``with`` block.

    Args:
        module: the module's name; its `main` calls `serve`.
        changes: environment variables to set for the child.

    Raises:
        StartError: no child can be started, or it does not become ready.
    """
    import subprocess
    import tempfile

    line, variables = command(module), environment(module) | dict(changes or {})
    try:
        errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed below)
    except OSError as error:
        raise StartError(str(error)) from None
    with errors:
        try:
            process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=variables
            )
        except (OSError, ValueError) as error:
            raise StartError(str(error)) from None
        child = Child(process, errors)
        try:
            child.await_ready(line[0])
            yield child
        finally:
            child.close()


def command(module: str) -> list[str]:
    """Return the command line that runs a module of precast.

    Raises:
        StartError: there is no Python to start, or this process or an ancestor was itself started for the module.
    """
    if module in os.environ.get(GUARD, "").split(","):
        raise StartError(f"this process is itself a child process for {module}")
    python = _python()
    if python is None:
        raise StartError("there is no Python to start")
    # -P: import nothing from the working folder.
    return [python, "-P", "-m", module]


def environment(module: str) -> dict[str, str]:
    """Return the environment for a child: this process's environment, import path and the guard variable.

    The import path is `sys.path` without two kinds of entries: values that are not strings, which Python's import
    ignores, and empty strings, which stand for the working folder.
    """
    folders = [folder for folder in sys.path if isinstance(folder, str) and folder]
    above = os.environ.get(GUARD)
    guard = f"{above},{module}" if above else module
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), GUARD: guard}


def _python() -> str | None:
    """Return the path of a Python interpreter, which may differ from `sys.executable`; None if none is found."""
    # An application frozen into one file (PyInstaller) comes without an interpreter.
    if getattr(sys, "frozen", False):
        return None
    if sys.executable and os.path.basename(sys.executable).lower().startswith(("python", "pypy")):
        return sys.executable
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    paths = [os.path.join(prefix, "bin", name) for prefix in (sys.prefix, sys.base_prefix)]
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def ending(code: int) -> str:
    """Describe the end of a process: "SIGSEGV", or "exit code 3"."""
    import signal

    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


# --- the child ----------------------------------------------------------------------------------------------


def serve(answer: Callable[[Mapping[str, Any], bytes, Progress], Answer]) -> None:
    """Answer the parent's requests until it closes the pipe.

    Args:
        answer: a function that computes the answer to a request from the request's values, the request's data, and a
            callback for progress. If the function raises a PrecastError, the parent receives the error's text.
    """
    output = ready()

    def progress(step: Step) -> None:
        _send(output, {"progress": printable(step.text)})

    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            message, data = _read(sys.stdin.buffer)
            _limit_time(message["limit_s"])
            try:
                values, result = answer(message["request"], data, progress)
                _send(output, {"answer": values}, result)
            except PrecastError as error:
                _send(output, {"error": " ".join(str(error).split())})


def ready() -> BinaryIO:
    """Tell the parent that this child is running; return the stream for messages to the parent.

    Redirect the output of libraries to standard error, so that their output is not mistaken for a message. Disable core
    dumps, and make the system end this process when its parent ends.
    """
    _end_with_parent()
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    stream.write(READY)
    stream.flush()
    return stream


def _end_with_parent() -> None:
    """Make the system end this process when its parent ends for any reason."""
    import ctypes
    import signal

    with suppress(AttributeError, OSError):  # a system other than Linux
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _limit_time(limit_s: int | None) -> None:
    """Make the system end this process shortly after its time limit, in case the parent does not end it."""
    import signal

    with suppress(AttributeError):  # Windows
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(0 if limit_s is None else limit_s + EXIT_S)


# --- messages -----------------------------------------------------------------------------------------------


def _send(stream: IO[bytes], message: Mapping[str, Any], data: bytes = b"") -> None:
    stream.write(json.dumps({**message, "data": len(data)}).encode() + b"\n")
    stream.write(data)
    stream.flush()


def _read(stream: BinaryIO) -> tuple[Mapping[str, Any], bytes]:
    """Read a message.

    Raises:
        EOFError: the parent has closed the pipe.
    """
    line = stream.readline()
    if not line:
        raise EOFError
    message = json.loads(line)
    return message, stream.read(message["data"])
