"""How a child process is started that does a part of the loader's work: by the same Python, with the same packages."""

import os
import sys


def command(module: str, *arguments: str) -> list[str] | None:
    """The command line that runs a module of precast. None where there is no Python to start."""
    # An application frozen into one file has no interpreter: it would start itself.
    if not sys.executable or getattr(sys, "frozen", False):
        return None
    # -P: nothing is imported from the folder that this happens to run in.
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's environment, with all that it imports from.

    Without what is no text, which imports pass over, and without what is empty, which means the folder that the child
    happens to run in.
    """
    folders = [folder for folder in sys.path if isinstance(folder, str) and folder]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
