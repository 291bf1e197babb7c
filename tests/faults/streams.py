"""Run commands with standard streams that are closed, full or without a reader, each in a fork of this process.

Takes a JSON list of commands, each with its list of streams ("open", or "closed", "full" or "left" and a number), and
prints a list of command, streams, exit code, output and errors.
"""

import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence

NAMES = ("stdin", "stdout", "stderr")


def replace(number: int, handle: int) -> None:
    os.dup2(handle, number)
    mode = "r" if number == 0 else "w"
    setattr(sys, NAMES[number], os.fdopen(number, mode, encoding="utf-8", closefd=False))


def arrange(streams: str, out: int, err: int) -> None:
    """Reset this process to the state in which Python starts."""
    replace(0, os.open(os.devnull, os.O_RDONLY))
    replace(1, out)
    replace(2, err)
    if streams == "open":
        return
    kind, number = streams.split()
    if kind == "closed":
        os.close(int(number))
        setattr(sys, NAMES[int(number)], None)
    elif kind == "full":
        replace(int(number), os.open("/dev/full", os.O_WRONLY))
    else:
        reader, writer = os.pipe()
        os.close(reader)
        replace(int(number), writer)


def run(command: Sequence[str]) -> int:
    """Run a command; return the exit code that Python's own exit would give."""
    from precast.cli import main

    try:
        main(list(command), prog_name="precast")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    try:
        sys.stdout.flush()
    except OSError:
        return 120
    return code


def in_a_fork(command: Sequence[str], streams: str) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if (child := os.fork()) == 0:
            try:
                arrange(streams, out.fileno(), err.fileno())
                code = run(command)
            except BaseException:
                import traceback

                os.write(err.fileno(), traceback.format_exc().encode())
                code = 70
            os._exit(code)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return os.waitstatus_to_exitcode(status), *texts


def main() -> None:
    # Imported once, for all the forks.
    import precast.loaders.audit.check
    import precast.loaders.console.run
    import precast.loaders.load  # noqa: F401

    results = [
        (command, streams, *in_a_fork(command, streams))
        for command, several in json.loads(sys.argv[1])
        for streams in several
    ]
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
