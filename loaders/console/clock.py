"""The age of this process. The age at the first token measures a cold start, including the interpreter and imports."""

import os
import time
from pathlib import Path


def process_age() -> float:
    """Return the seconds since the process started, accurate to about 10 ms.

    If the system does not report the time of the start, return the process's CPU time in seconds.
    """
    try:
        # Take the fields after the command's name. The name itself may contain spaces and brackets; see proc(5).
        fields = (
            Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        )
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()
