"""Watch a server for soak.py: print a line of JSON for each sample until the server has gone.

    python tests/fuzz/soak_watch.py PORT PROCESS_ID

This is a process of its own, so that the load that soak.py makes does not delay it.
"""

import http.client
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

_STATE = re.compile(r"^precast:num_requests_(running|waiting)\{.*\} (.*)$", re.MULTILINE)
_EVERY_S = 0.25


def get(port: int, path: str) -> tuple[str, float]:
    """Return the text at a path, and the milliseconds that it took."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    return text, (time.perf_counter() - began) * 1e3


def busy(port: int) -> Mapping[str, int]:
    """Return the numbers of answers that run and that wait."""
    counts = {"running": 0, "waiting": 0}
    for name, value in _STATE.findall(get(port, "/metrics")[0]):
        counts[name] += int(float(value))
    return counts


def resources(process: int) -> Mapping[str, int]:
    """Return the resident memory in bytes, without and with mapped files, the open files, and the threads."""
    status = Path(f"/proc/{process}/status").read_text()
    fields = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if len(line.split()) > 1}
    return {
        "own": int(fields["RssAnon"]) * 1024,
        "resident": int(fields["VmRSS"]) * 1024,
        "files": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(fields["Threads"]),
    }


def sample(port: int, process: int) -> Mapping[str, float]:
    """Return the state of a server, and the time of an answer of /health."""
    health = get(port, "/health")[1]
    return {"health_ms": round(health, 2), **resources(process), **busy(port)}


def main() -> None:
    port, process = int(sys.argv[1]), int(sys.argv[2])
    began = time.monotonic()
    while True:
        try:
            found = sample(port, process)
        except (OSError, http.client.HTTPException, KeyError):
            return
        print(json.dumps({"at": round(time.monotonic() - began, 2), **found}), flush=True)
        time.sleep(_EVERY_S)


if __name__ == "__main__":
    main()
