"""Run pip install and show its progress in one line.

    python .ci/pip_install.py ARGUMENTS OF pip install

On a terminal, the line shows the numbers of packages, megabytes and seconds. Elsewhere, nothing appears until pip is
done. pip's own output, including its warnings, appears only if pip fails. Otherwise, each editable installation would
print setuptools' warning about folders with the package's name, and pip's warnings about absent folders of an index.
"""

import os
import re
import subprocess
import sys
import threading
import time

# The name of a package ends at its version or its extras. After `Processing`, pip prints a file name.
_PACKAGE = re.compile(
    r"^(?:Collecting |Requirement already satisfied: |Processing (?:.*/)?)([\w.]+(?:-[A-Za-z]\w*)*)"
)
_SIZE = re.compile(r"^\s*Downloading .*\((\d+(?:\.\d+)?) (kB|MB|GB)\)")
_MEGABYTES = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}
_INTERVAL_S = 0.5


class Installation:
    """The progress of an installation, derived from the lines that pip prints."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.packages: set[str] = set()
        self.megabytes = 0.0
        self.stage = "looking for packages"

    def read(self, line: str) -> None:
        """Update the progress from one line of pip's output."""
        if package := _PACKAGE.match(line):
            self.packages.add(package[1].lower().replace("-", "_"))
            self.stage = "fetching"
        elif size := _SIZE.match(line):
            self.megabytes += float(size[1]) * _MEGABYTES[size[2]]
        elif line.startswith("  Building "):
            self.stage = "compiling the kernels, 1 to 2 minutes"
        elif line.startswith("Installing collected packages"):
            self.stage = "installing"

    def __str__(self) -> str:
        seconds = int(time.monotonic() - self.started)
        fetched = f"{len(self.packages)} found, {self.megabytes:.0f} MB fetched"
        return f"  {seconds // 60}:{seconds % 60:02}  {fetched}; {self.stage}"


def _show(state: Installation, done: threading.Event) -> None:
    while not done.wait(_INTERVAL_S):
        print(f"\r\x1b[K{state}", end="", file=sys.stderr, flush=True)
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def main() -> int:
    """Run pip, show its progress in one line, and return its exit code."""
    command = [sys.executable, "-m", "pip", "--no-color", "install", "--progress-bar", "off", *sys.argv[1:]]
    state, output, done = Installation(), [], threading.Event()
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # pip's lines arrive at once
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        display = threading.Thread(target=_show, args=(state, done), daemon=True)
        if sys.stderr.isatty():
            display.start()
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                output.append(line)
                state.read(line)
        finally:
            done.set()
            if display.ident is not None:
                display.join()
    if pip.returncode:
        sys.stderr.writelines(output)
    return pip.returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
