"""The age of this process. It measures a cold start, because it includes the interpreter's start and all imports."""

import os
import time
from pathlib import Path


def process_age() -> float:
    """Return the seconds since the process started, accurate to about 10 ms.

    If the system does not report the time of the start, return the CPU time that the process has used, in seconds.
    """
    try:
        # The fields after the command's name, which may contain spaces and brackets; see proc(5).
        fields = (
            Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        )
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()
