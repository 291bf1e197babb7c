"""The age of this process. A cold start begins with the process, so it includes interpreter and imports."""

import os
import time
from pathlib import Path


def process_age() -> float:
    """Return the seconds since the process started, to about 10 ms.

    Return the CPU seconds used if the system does not tell the start.
    """
    try:
        # The fields after the command's name, which may contain spaces and brackets; see proc(5).
        fields = (
            Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        )
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()
