"""Load a server with requests of every kind, well-behaved and not, and check every answer.

    python tests/fuzz/soak.py --minutes 30 --seed 1 [--artifact FOLDER ...] [--memory GB]

Clients send good, bad, long and malformed requests to all routes. Some send or read slowly, leave before the end, or
send half a request; now and then, more of them arrive than the queue holds. After a tenth of the time, the server gets
SIGTERM while answers stream; after two tenths, it is killed. It starts again both times, and must answer as before.

Every answer must be right: what an idle server answers, or a refusal in the API's own form. No status is above 499,
except 504 for deadlines. At the end, nothing runs or waits, and open files and threads are back to their numbers.
Memory must be flat: the mean of the last fifth of the samples is compared with the mean of the second fifth.
"""

import argparse
import asyncio
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import soak_client
import soak_requests
import soak_watch
from soak_client import MANNERS, Manner, Outcome
from soak_requests import Case
from tool_template import copy_with_tools

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "artifacts" / "smollm2-135m-instruct-int8"
START_S = 300
DRAIN_S, DEADLINE_S, QUEUE = 3, 60, 24
WORKERS, BURST, STREAMS = 16, 150, 6
# Seconds after the load for answers to end, and for connections to close.
SETTLE_S = 60
# Minutes from which the memory of a run is judged.
WARM_MINUTES = 10
# Memory may grow by this share and by these bytes.
GROWTH, SPARE_BYTES = 0.05, 32 << 20
# The share of /health's answers that may take longer than the limit: other processes use the machine, too.
HEALTH_MS, LATE = 100, 0.02
WEIGHTS = {"good": 60, "bad": 20, "long": 8, "pages": 12}


class Server:
    """A server in a process of its own, and a process that watches it."""

    def __init__(self, models: Sequence[Path], memory: float | None, folder: Path) -> None:
        self._folder, self._starts = folder, 0
        self._watcher: subprocess.Popen[bytes] | None = None
        self._command = [sys.executable, "-m", "precast", "serve", "--port", "0", *map(str, models)]
        self._command += ["--max-queue", str(QUEUE), "--request-timeout", str(DEADLINE_S)]
        self._command += ["--drain-timeout", str(DRAIN_S), *(["--memory", str(memory)] if memory else [])]

    def start(self) -> None:
        """Start the server, and wait until it is ready."""
        self._starts += 1
        self.log, self.samples = (self._folder / f"{name}-{self._starts}" for name in ("log", "samples"))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, cwd=self._folder
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        if " at http://" not in line:
            raise SystemExit(f"the server does not start: {self.log.read_text()[-2000:]}")
        self.port = int(line.partition(" at ")[2].partition("/v1;")[0].rpartition(":")[2])
        end = time.monotonic() + START_S
        while "not_ready" in soak_watch.get(self.port, "/ready")[0]:
            if time.monotonic() > end:
                raise SystemExit(f"the server is not ready: {self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def watch(self) -> None:
        """Begin to take samples."""
        command = [sys.executable, str(Path(soak_watch.__file__)), str(self.port), str(self.process.pid)]
        with self.samples.open("wb") as file:
            self._watcher = subprocess.Popen(command, stdout=file)

    def close(self) -> None:
        """End the server if it runs."""
        if self._starts and self.process.poll() is None:
            self.end(signal.SIGTERM)

    def end(self, number: int) -> int:
        """Send the server a signal, and return its exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(DRAIN_S + 30)
        finally:
            self.process.kill()
            if self._watcher is not None:
                self._watcher.wait(400)

    def errors(self) -> list[str]:
        """Return the errors in the log of the present run."""
        records = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [
            f"log: {json.dumps(record)[-1500:]}"
            for record in records
            if (
                record["event"] == "error"
                or record.get("level") in ("error", "critical")
                or "error" in record
            )
            and not record.get("message", "").endswith("graceful shutdown exceeded")
        ]


class Soak:
    """The clients of a server, what they have seen, and the faults."""

    def __init__(self, server: Server, models: Sequence[str], random: Random) -> None:
        self.server, self.random = server, random
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.known: dict[tuple[str, bytes | None], Any] = {}
        questions = soak_requests.QUESTIONS[: max(1, 4 // len(models))]
        self.kinds: dict[str, list[Case]] = {
            "good": [c for m in models for q in questions for c in soak_requests.good(m, q)],
            "bad": [c for m in models for c in soak_requests.bad(m)],
            "long": [c for m in models for c in soak_requests.long(m, 1500)],
            "pages": [c for m in models for c in soak_requests.pages(m)],
        }
        # The number of times that the server was stopped. An answer that was cut by that is no fault.
        self._stops = 0
        self._is_up = asyncio.Event()
        self._is_up.set()

    # --- requests -------------------------------------------------------------------------------------------

    async def send(self, case: Case, manner: Manner = soak_client.plain) -> Outcome:
        """Send a request, and check its end."""
        stops = self._stops
        outcome = await soak_client.talk(self.server.port, case, manner, self.random)
        what = str(outcome.status) if outcome.end == "answered" else outcome.end
        is_cut = stops != self._stops
        self.counts[f"{what} at a restart" if is_cut and what != "200" else what] += 1
        try:
            text = self._fault(case, outcome, is_cut=is_cut)
        except (ValueError, LookupError, TypeError) as error:
            text = f"an answer of no form: {error!r}: {outcome.body[-500:]!r}"
        if text is not None:
            self.faults.append(f"{case.name}, {manner.__name__}: {text:.1500}")
        return outcome

    def _fault(self, case: Case, outcome: Outcome, *, is_cut: bool) -> str | None:
        if outcome.end == "left" or (is_cut and (outcome.end == "lost" or outcome.status == 503)):
            return None
        if outcome.end != "answered":
            return outcome.end
        known = self.known.get(case.key) if case.is_repeatable else None
        return soak_requests.fault(case, outcome.status, outcome.headers, outcome.body, known)

    async def learn(self) -> int:
        """Ask an idle server all good questions; return the number of questions that the models do not support."""
        for case in self.kinds["good"]:
            if case.key not in self.known and not case.is_stream:
                await self._learn_one(case)
        kept = [case for case in self.kinds["good"] if case.key in self.known]
        dropped = len(self.kinds["good"]) - len(kept)
        self.kinds["good"] = kept
        return dropped

    async def _learn_one(self, case: Case) -> None:
        for _ in range(3):  # the machine may be too busy to meet a deadline
            outcome = await soak_client.talk(self.server.port, case, soak_client.plain, self.random)
            if outcome.status == 200:
                self.known[case.key] = soak_requests.answer(case, outcome.body, is_stream=False)
            if outcome.status in (200, 400):
                return
        self.faults.append(f"{case.name}, idle: {outcome}")

    async def ask_again(self, most: int | None = None) -> None:
        """Ask an idle server good questions again; only a deadline may refuse them."""
        cases = self.kinds["good"]
        for case in cases if most is None else self.random.sample(cases, min(most, len(cases))):
            outcome = await self.send(case)
            if outcome.status not in (200, 504):
                self.faults.append(f"{case.name}, idle: {outcome}")

    async def _work(self, end: float) -> None:
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        manners, shares = list(MANNERS), list(MANNERS.values())
        while time.monotonic() < end:
            await self._is_up.wait()
            (kind,) = self.random.choices(names, weights)
            (manner,) = self.random.choices(manners, shares)
            await self.send(self.random.choice(self.kinds[kind]), manner)

    async def _burst(self, end: float) -> None:
        """Now and then, send more requests than the queue holds."""
        while time.monotonic() + 15 < end:
            await asyncio.sleep(self.random.uniform(8, 15))
            await self._is_up.wait()
            chosen = self.random.choices(self.kinds["good"], k=BURST)
            await asyncio.gather(*(self.send(case) for case in chosen))

    async def load(self, seconds: float) -> None:
        """Send requests for some time, and wait for their ends."""
        end = time.monotonic() + seconds
        await asyncio.gather(self._burst(end), *(self._work(end) for _ in range(WORKERS)))

    # --- stops ----------------------------------------------------------------------------------------------

    async def restart(self, number: int) -> None:
        """End the server by a signal while it streams, start it again, and ask it known questions."""
        self._is_up.clear()
        cases = [case for case in self.kinds["long"] if case.is_stream]
        streams = [asyncio.create_task(self.send(self.random.choice(cases))) for _ in range(STREAMS)]
        await asyncio.sleep(1)
        self._stops += 1
        code = await asyncio.to_thread(self.server.end, number)
        if code != (0 if number == signal.SIGTERM else -number):
            self.faults.append(f"exit code {code} after signal {number}")
        await asyncio.gather(*streams)
        self.faults += self.server.errors()
        await asyncio.to_thread(self.server.start)
        await self.ask_again(12)
        self.server.watch()
        self._is_up.set()

    async def settle(self) -> None:
        """Check that nothing runs or waits any more."""
        end = time.monotonic() + SETTLE_S
        while any((busy := soak_watch.busy(self.server.port)).values()):
            if time.monotonic() > end:
                self.faults.append(f"after the load, answers run or wait: {busy}")
                return
            await asyncio.sleep(0.2)


async def run(soak: Soak, seconds: float) -> Mapping[str, Any]:
    """Run the phases, and return the figures."""
    dropped = await soak.learn()
    before = soak_watch.resources(soak.server.process.pid)
    soak.server.watch()
    load = asyncio.create_task(soak.load(seconds))
    for number in (signal.SIGTERM, signal.SIGKILL):
        await asyncio.sleep(0.1 * seconds)
        await soak.restart(number)
    await load
    await soak.settle()
    server = soak.server
    # A machine with much else to do may take no sample in a short run.
    samples = read_samples(server.samples) or [soak_watch.sample(server.port, server.process.pid)]
    await soak.ask_again()
    await soak.settle()
    await asyncio.sleep(6)  # connections that were kept alive
    after = soak_watch.resources(soak.server.process.pid)
    soak.faults += soak.server.errors() + leaks(before, after)
    return {"unsupported": dropped, "answers_known": len(soak.known), **figures(samples)}


def read_samples(path: Path) -> list[Mapping[str, Any]]:
    """Return the samples of a run; the last line may be incomplete."""
    return [json.loads(line) for line in path.read_text().splitlines()[:-1]]


def leaks(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Return the faults of open files and threads that stay after the load."""
    return [
        f"{name}: {before[name]} before the load, {after[name]} after it"
        for name, spare in (("files", 8), ("threads", 24))
        if after[name] > before[name] + spare
    ]


def figures(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of samples."""
    health = sorted(sample["health_ms"] for sample in samples)
    fifth = max(1, len(samples) // 5)
    parts = {"second": samples[fifth : 2 * fifth] or samples, "last": samples[-fifth:]}
    means = {name: statistics.fmean(s["own"] for s in part) for name, part in parts.items()}
    return {
        "samples": len(samples),
        "health_ms": {
            "median": health[len(health) // 2],
            "p99": health[len(health) * 99 // 100],
            "most": health[-1],
        },
        "health_late": sum(ms > HEALTH_MS for ms in health) / len(health),
        "memory_second_fifth": round(means["second"]),
        "memory_last_fifth": round(means["last"]),
        "memory_most": max(sample["own"] for sample in samples),
        "files_most": max(sample["files"] for sample in samples),
        "threads_most": max(sample["threads"] for sample in samples),
        "running_most": max(sample["running"] for sample in samples),
        "waiting_most": max(sample["waiting"] for sample in samples),
    }


def faults_of(found: Mapping[str, Any], *, is_warm: bool, is_strict: bool) -> list[str]:
    """Return the faults in the figures.

    Args:
        found: the figures.
        is_warm: also judge the memory, which grows in the first minutes, because caches fill.
        is_strict: also judge the latency of /health, for which the machine must have little else to do.
    """
    faults = []
    second, last = found["memory_second_fifth"], found["memory_last_fifth"]
    if is_warm and last > second * (1 + GROWTH) + SPARE_BYTES:
        faults.append(f"memory grew from {second:,} to {last:,} bytes")
    if is_strict and found["health_late"] > LATE:
        faults.append(f"{found['health_late']:.1%} of /health's answers took longer than {HEALTH_MS} ms")
    return faults


def table(counts: Counter[str], found: Mapping[str, Any]) -> str:
    """Return the figures for people."""
    mb = 1e-6
    health = found["health_ms"]
    rows = [
        *((f"requests: {name}", f"{count:,}") for name, count in sorted(counts.items())),
        ("/health: median, 99 %, most", " / ".join(f"{health[k]:.0f} ms" for k in ("median", "p99", "most"))),
        (f"/health beyond {HEALTH_MS} ms", f"{found['health_late']:.2%}"),
        (
            "memory: second fifth, last fifth, most",
            " / ".join(f"{found[f'memory_{k}'] * mb:.0f} MB" for k in ("second_fifth", "last_fifth", "most")),
        ),
        ("most open files, threads", f"{found['files_most']}, {found['threads_most']}"),
        ("most answers that run, wait", f"{found['running_most']}, {found['waiting_most']}"),
    ]
    return "\n".join(f"{name:<42}{value:>26}" for name, value in rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="time of the load")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--artifact", type=Path, action="append", help="model to serve; by default the demo model"
    )
    parser.add_argument("--memory", type=float, help="as for precast serve")
    parser.add_argument("--strict", action="store_true", help="also judge the latency of /health")
    return parser.parse_args()


def main() -> None:
    # The default action would leave the server running, and a shell lets background processes ignore SIGINT.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = parse_options()
    folder, began = Path(tempfile.mkdtemp(prefix="precast-soak-")), time.monotonic()
    try:
        models = [
            copy_with_tools(artifact, folder / f"model-{number}")
            for number, artifact in enumerate(options.artifact or [DEMO])
        ]
        server = Server(models, options.memory, folder)
        try:
            server.start()
            print(f"server: process {server.process.pid}", file=sys.stderr)
            soak = Soak(server, [model.name for model in models], Random(options.seed))
            found = asyncio.run(run(soak, 60 * options.minutes))
        finally:
            server.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    faults = soak.faults + faults_of(found, is_warm=options.minutes >= WARM_MINUTES, is_strict=options.strict)
    print(table(soak.counts, found))
    for text in faults[:30]:
        print(text)
    result = {"minutes": options.minutes, "seed": options.seed, "findings": len(faults)}
    print(
        json.dumps(
            {"soak": result, "requests": soak.counts, **found, "seconds": round(time.monotonic() - began)}
        )
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
