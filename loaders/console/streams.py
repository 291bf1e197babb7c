"""Replacements for standard streams that were closed when the process started.

Each command imports this module first, so the module imports only modules that Python itself has already imported.
"""

import os
import sys

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def open_closed_streams() -> None:
    """Open /dev/null in place of each standard stream that was closed when the process started.

    Otherwise a file that is opened later would get the file descriptor of the closed stream, and receive the stream's
    output.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        if getattr(sys, name) is not None:
            continue
        # os.open returns the lowest free descriptor. It is the stream's own, because all lower descriptors are open.
        handle = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(handle, True)
        setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
