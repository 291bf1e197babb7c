"""The benchmark's side of the workers: start, query and stop them, and measure the load by other processes."""

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contenders import Contender

WORKER = Path(__file__).parent / "worker.py"
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A worker's answer, and the share of the machine (0 to 1) that other processes used during the request."""

    values: Mapping
    others: float


def machine_busy() -> float:
    """Return the CPU time in seconds that all processes have used since the machine started."""
    user, nice, system, _, _, irq, soft, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + soft + steal) / _TICK


def process_busy(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def wait_for_quiet(patience: float, limit: float = 0.05) -> bool:
    """Wait at most `patience` seconds until the machine is idle for a moment; return True if it was."""
    ends = time.monotonic() + patience
    cores = len(os.sched_getaffinity(0))
    while time.monotonic() < ends:
        before = machine_busy()
        time.sleep(0.2)
        if machine_busy() - before <= limit * 0.2 * cores + 1 / _TICK:
            return True
    return False


def command(contender: Contender, model: Path, interpreter: str) -> list[str]:
    return [interpreter, str(WORKER), contender.worker, str(model), json.dumps(dict(contender.options))]


def environment() -> dict[str, str]:
    # Remove the benchmark's own settings of threads. OpenMP's defaults are the fastest for a worker that runs alone.
    # Every worker runs alone, because idle workers are stopped.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_", "GOMP_", "MKL_"))}
    return kept | {"TF_CPP_MIN_LOG_LEVEL": "1", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}


def die_with_parent() -> None:
    """Make the operating system kill the worker when the benchmark dies. Otherwise, a stopped worker would remain.

    The call is prctl(PR_SET_PDEATHSIG, SIGKILL).
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Worker:
    """The process of a contender. A signal stops it except while it answers a request."""

    def __init__(self, contender: Contender, model: Path, interpreter: str, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command(contender, model, interpreter),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(),
                preexec_fn=die_with_parent,  # safe, because the benchmark has only one thread
            )
        self.hello = self._read()
        self._stop()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker failed:\n{self._log.read_text()[-2000:]}")
        return json.loads(line)

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, **request: object) -> Answer:
        pid, cores = self._process.pid, len(os.sched_getaffinity(0))
        self._process.send_signal(signal.SIGCONT)
        machine, own, started = machine_busy(), process_busy(pid), time.monotonic()
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        values = self._read()
        foreign = (machine_busy() - machine) - (process_busy(pid) - own)
        self._stop()
        return Answer(values=values, others=max(0.0, foreign / cores / (time.monotonic() - started)))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def first_token(contender: Contender, model: Path, interpreter: str, ids: Sequence[int]) -> float:
    """Return the time in seconds from the start of a new process to the first token after a prompt."""
    started = time.clock_gettime(time.CLOCK_MONOTONIC)
    done = subprocess.run(
        [*command(contender, model, interpreter), json.dumps(list(ids))],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(),
    )
    if done.returncode or not done.stdout:
        raise SystemExit(f"{contender.label} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[0])["first_token_at"] - started
