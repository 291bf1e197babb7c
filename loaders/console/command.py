"""The command group, and the shared handling of errors, interrupts and exit codes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

from ..artifact import interrupt
from ..artifact.errors import PrecastError, log_to_stderr, printable
from .streams import open_closed_streams

FAILED = 2


class Commands(click.Group):
    """The group of all commands. Each command returns its exit code.

    An error that the user can correct is printed as one line, even if it occurs while help is printed.
    """

    def main(self, *arguments: Any, **settings: Any) -> Any:
        open_closed_streams()
        # Print a question mark for a character that the terminal's encoding lacks.
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        with _lines_only():
            return super().main(*arguments, **settings)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)  # in the order of `cli.py`; click would sort the names

    def invoke(self, context: click.Context) -> Any:
        # Handle errors here as well as in `main`, because click's code between the two would catch KeyboardInterrupt
        # and print its own message.
        with _lines_only():
            context.exit(super().invoke(context))


@contextmanager
def _lines_only() -> Iterator[None]:
    """If the block raises an error that the user can correct, print one line on standard error; exit with code 2."""
    try:
        try:
            yield
        finally:
            # Flush now, because Python would print a traceback if a flush failed at exit.
            sys.stdout.flush()
    except PrecastError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        interrupt.end()
    except BrokenPipeError:
        _abandon_output()  # the reader, such as `head`, has closed the pipe
        sys.exit(1)
    except OSError as error:
        if sys.stdout in _abandon_output():
            _fail(f"standard output: {error.strerror or error}; redirect it elsewhere.")
        where = error.filename or "input or output"
        _fail(printable(f"{where}: {error.strerror or error}; check the path and its disk."))


def _abandon_output() -> list[TextIO]:
    """Redirect to /dev/null each standard stream that cannot be flushed; return the redirected streams."""
    broken = []
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            broken.append(stream)
    return broken


def _fail(message: str) -> NoReturn:
    # If standard error is also full or closed, the message is lost.
    with suppress(OSError):
        # Join the lines, because the message may quote a library's message of several lines.
        click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(FAILED)


def local_folder(artifact: Path | str, key: Path | None) -> Path:
    """Return the artifact's folder. If the artifact is a URL, pull it first, or use the copy from an earlier pull.

    Args:
        artifact: a path or a URL.
        key: file of the public key that a pulled artifact must be signed with; None if it need not be signed.

    Raises:
        PrecastError: see `fetch`.
    """
    if isinstance(artifact, Path):
        return artifact
    from ..store.pull import fetch

    return fetch(artifact, require_signature=key, log=log_to_stderr)
