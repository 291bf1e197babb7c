"""How long ago this process started: cold start is measured from there, imports and interpreter included."""

import os
import time
from pathlib import Path


def process_age() -> float:
    """Seconds since the process started, to about 10 ms; CPU seconds used where the system does not tell."""
    try:
        # Fields after the command's name, which may itself hold spaces and brackets; see proc(5).
        fields = (
            Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        )
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()
