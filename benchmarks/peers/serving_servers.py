"""The servers that serving.py compares: their commands, processes, and memory."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_tools
from contenders import CAPACITY, THREADS
from processes import die_with_parent, environment, machine_busy, process_busy
from serving_client import Answered, Refused, ask

SLOTS = 8
# Seconds between attempts to reach a server that does not listen yet, and the time after which it counts as broken.
_RETRY_S, _START_S = 0.005, 60.0


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A server with the model that it serves.

    Attributes:
        label: name in tables.
        group: "int8" or "int4"; comparisons are within a group.
        model: name of the model's file or folder, as made by `derive`.
    """

    label: str
    group: str
    model: str

    @property
    def is_precast(self) -> bool:
        return self.model.startswith("precast-")


CONTENDERS: Mapping[str, Contender] = {
    "precast-int8": Contender(label="precast int8", group="int8", model=f"precast-int8-{CAPACITY}"),
    "llama-server-q8_0": Contender(label="llama-server Q8_0", group="int8", model="q8_0.gguf"),
    "precast-int4": Contender(label="precast int4", group="int4", model=f"precast-int4-{CAPACITY}"),
    "llama-server-q4_0": Contender(label="llama-server Q4_0", group="int4", model="q4_0.gguf"),
}


def command(contender: Contender, model: Path, port: int, interpreters: Mapping[str, str]) -> list[str]:
    """Return the command that starts a server. llama-server divides its context among the slots."""
    if contender.is_precast:
        program = Path(interpreters["precast"]).parent / "precast"
        return [str(program), "serve", str(model), "--port", str(port), "--threads", str(THREADS)]
    threads = ["--threads", str(THREADS), "--threads-batch", str(THREADS)]
    slots = ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CAPACITY)]
    alias = ["--alias", model.name]  # the name that requests give
    tool = llama_tools.find(llama_tools.SERVER) or llama_tools.SERVER
    return [tool, "--model", str(model), "--port", str(port), *threads, *slots, *alias]


class Server:
    """The process of a server. `stop` and `resume` send signals, so that an idle server uses no core."""

    def __init__(self, arguments: Sequence[str], port: int, log: Path) -> None:
        self.port, self._log, self.began = port, log, time.perf_counter()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                preexec_fn=die_with_parent,  # safe, because the benchmark has only one thread
            )

    def first_answer(self, request: Mapping) -> tuple[float, Answered]:
        """Send a request as soon as the server listens; return the seconds from its start to the first token."""
        while time.perf_counter() - self.began < _START_S:
            if self._process.poll() is not None:
                break
            sent = time.perf_counter()
            try:
                _, [answer] = ask(self.port, [request])
            except (OSError, Refused):  # llama-server answers with status 503 while it loads
                time.sleep(_RETRY_S)
                continue
            return sent - self.began + answer.first_s, answer
        raise SystemExit(f"a server failed:\n{self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def busy(self) -> float:
        """Return the CPU time of the process in seconds."""
        return process_busy(self._process.pid)

    def memory(self) -> dict[str, int]:
        """Return the peak resident memory, and the present proportional set size, in bytes."""
        folder = Path("/proc") / str(self._process.pid)
        return {
            "peak_rss_bytes": _kilobytes(folder / "status", "VmHWM") * 1024,
            "pss_bytes": _kilobytes(folder / "smaps_rollup", "Pss") * 1024,
        }

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _kilobytes(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Meter:
    """The share of the machine (0 to 1) that processes other than the client and a server use."""

    def __init__(self, server: Server) -> None:
        self._server, self._began = server, time.monotonic()
        self._before = self._foreign()

    def _foreign(self) -> float:
        return machine_busy() - self._server.busy() - process_busy(os.getpid())

    def share(self) -> float:
        seconds = (time.monotonic() - self._began) * len(os.sched_getaffinity(0))
        return max(0.0, (self._foreign() - self._before) / seconds)
