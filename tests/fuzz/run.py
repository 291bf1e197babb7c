"""Mutated artifacts, by the thousand: none may end the process, hang it, lead it outside its folder or fill its memory.

    python tests/fuzz/run.py --cases 20000 --seed 1
    python tests/fuzz/run.py --only executable --first 17 --cases 1        one case again

Every case is a kind and a number, and is made from these alone (`kinds.py`). Two processes work at a time; one that
dies or hangs is replaced. A finding is tried again in a fresh process, and the artifact is kept. A mutated program
(StableHLO, executable) is first loaded as if it were trusted; where that ends the process, which native code may do, it
is loaded as any stranger's is, and the loader's trial in a child process must make a sentence of it.
"""

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kinds
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from precast.loaders import signing

HERE = Path(__file__).resolve().parent
START_S = 120


class Worker:
    """One `worker.py`, started again where it ended."""

    def __init__(self, base: Path, folder: Path) -> None:
        self._base, self._folder = base, folder
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def _start(self) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), str(self._base), str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._process = process
        if self._answer(START_S) != {"ready": True}:
            raise SystemExit(f"a worker does not start: {self.log()}")
        return process

    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-1500:]

    def ask(self, kind: str, seed: int, *, trusted: bool) -> dict[str, Any]:
        """What came of a case: its answer, or how the process ended."""
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"kind": kind, "seed": seed, "trusted": trusted}).encode() + b"\n")
        process.stdin.flush()
        answer = self._answer(kinds.KINDS[kind].limit_s)
        if answer is not None:
            return answer
        ended = process.poll() is not None or self._ended(process)
        self.stop()
        if not ended:
            return {
                "outcome": "hang",
                "found": [f"no answer within {kinds.KINDS[kind].limit_s} s"],
                "seconds": 0,
            }
        code = process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"outcome": "crash", "found": [f"ended by {how}: {self.log()[-600:]}"], "seconds": 0}

    def _ended(self, process: subprocess.Popen[bytes]) -> bool:
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _answer(self, limit_s: float) -> dict[str, Any] | None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        line, end = b"", time.monotonic() + limit_s
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                return None
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


@dataclass
class Tally:
    """What came of the cases of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    findings: list[dict[str, Any]] = field(default_factory=list)


def one(worker: Worker, kind: str, seed: int) -> tuple[dict[str, Any], str]:
    """Runs a case; what was found stands only if a fresh process finds it as well."""
    native = kinds.KINDS[kind].native
    result = worker.ask(kind, seed, trusted=True)
    outcome = str(result["outcome"])
    if native and outcome != "refused":
        worker.stop()  # wrong native code may have written anywhere
    if native and (outcome in ("crash", "hang") or result["found"]):
        again = worker.ask(kind, seed, trusted=False)
        worker.stop()
        again["found"] = [f"{f} (trusted: {result['found'][0]:.200})" for f in again["found"]]
        return again, f"{outcome}, not trusted: {again['outcome']}"
    if result["found"]:
        worker.stop()
        again = worker.ask(kind, seed, trusted=True)
        if not again["found"] and outcome == "hang":
            return again, "slow once"
        if not again["found"]:
            result["found"] = [f"only in a process that met other cases before: {f}" for f in result["found"]]
    return result, outcome


def plan(cases: int, first: int, only: str | None, *, missing: Mapping[str, str]) -> list[tuple[str, int]]:
    """Kinds and numbers, mixed, so that a short run meets all of them.

    Raises:
        SystemExit: a kind is unknown, or it is in `missing`, which holds the remedies.
    """
    chosen = only.split(",") if only else [name for name in kinds.KINDS if name not in missing]
    if unknown := [name for name in chosen if name not in kinds.KINDS]:
        raise SystemExit(f"--only: there is no kind {unknown[0]!r}; choose of {', '.join(kinds.KINDS)}.")
    if impossible := [name for name in chosen if name in missing]:
        raise SystemExit(f"--only {impossible[0]} {missing[impossible[0]]}.")
    shares = {name: kinds.KINDS[name].share for name in chosen}
    total = sum(shares.values())
    counts = {name: max(1, round(cases * share / total)) for name, share in shares.items()}
    largest = max(counts, key=lambda name: counts[name])
    counts[largest] = max(1, counts[largest] + cases - sum(counts.values()))
    planned = [(n / count, name, first + n) for name, count in counts.items() for n in range(count)]
    return [(name, number) for _, name, number in sorted(planned)]


def fuzz(
    base: Path, folder: Path, planned: list[tuple[str, int]], processes: int, findings: Path
) -> dict[str, Tally]:
    """Runs the cases on several workers."""
    tallies = {name: Tally() for name, _ in planned}
    cases, whole, done = iter(planned), kinds.Base.read(base), 0

    def work(number: int) -> None:
        nonlocal done
        worker = Worker(base, folder / f"worker{number}")
        try:
            for kind, seed in _shared(cases):
                result, outcome = one(worker, kind, seed)
                tally = tallies[kind]
                tally.outcomes[outcome] += 1
                tally.slowest = max(tally.slowest, result["seconds"])
                if result["found"]:
                    tally.findings.append(
                        {"kind": kind, "seed": seed, "outcome": outcome, "found": result["found"]}
                    )
                    _keep(whole, findings, tally.findings[-1])
                done += 1
                if done % 1000 == 0:
                    print(
                        f"{done} of {len(planned)} cases, {_count(tallies)} findings",
                        file=sys.stderr,
                        flush=True,
                    )
        finally:
            worker.stop()

    with ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(work, n) for n in range(processes)]:
            future.result()
    return tallies


def _count(tallies: dict[str, Tally]) -> int:
    return sum(len(t.findings) for t in tallies.values())


def _shared(cases: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    # A list's iterator may be drawn from by several threads.
    while (case := next(cases, None)) is not None:
        yield case


def _keep(base: kinds.Base, findings: Path, finding: dict[str, Any]) -> None:
    """Writes what was changed, and what came of it."""
    place = findings / f"{finding['kind']}-{finding['seed']}"
    place.mkdir(parents=True, exist_ok=True)
    case = kinds.make(base, finding["kind"], finding["seed"])
    (place / "finding.json").write_text(json.dumps(finding, indent=1))
    for name, change in case.changes.items():
        contents = change if isinstance(change, bytes) else repr(change).encode()
        (place / name.replace("/", "_")).write_bytes(contents)


def make_base(folder: Path) -> Path:
    """Exports the tiny model of the golden artifacts, and signs it."""
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, make, pathlib; make.export_golden(pathlib.Path(sys.argv[1]))",
            str(folder),
        ],
        check=True,
        cwd=HERE.parent / "golden",
        env={**os.environ, "PRECAST_CACHE": str(folder.parent / "cache")},
    )
    sign_base(folder)
    return folder


def sign_base(folder: Path) -> None:
    """Signs an artifact with a new key, which lies beside it from then on."""
    key, public = ec.generate_private_key(ec.SECP256R1()), kinds.key_of(folder)
    private = public.with_name("private.pem")
    public.parent.mkdir()
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    named = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(encoding, named))
    signing.sign(folder, private, lambda: "")


def table(tallies: dict[str, Tally]) -> str:
    rows = [("kind", "cases", "findings", "slowest", "outcomes")]
    for name, tally in tallies.items():
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in tally.outcomes.most_common())
        rows.append(
            (name, str(tally.outcomes.total()), str(len(tally.findings)), f"{tally.slowest:.1f} s", outcomes)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4])) for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1, help="which series of numbers")
    parser.add_argument("--only", metavar="KIND,…", help=f"of {', '.join(kinds.KINDS)}")
    parser.add_argument("--first", type=int, help="number of the first case; overrides --seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--artifact", type=Path, help="the artifact to mutate; a tiny one is exported by default"
    )
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    # Numbers of different series do not meet.
    first = options.seed * 1_000_000 if options.first is None else options.first
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="precast-fuzz-"))
    try:
        # Resolved first: the key is looked for beside the folder, which "." does not name.
        base = (options.artifact or make_base(folder / "base" / "artifact")).resolve()
        missing = kinds.missing(kinds.Base.read(base))
        planned = plan(options.cases, first, options.only, missing=missing)
        tallies = fuzz(base, folder, planned, options.processes, options.findings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = [finding for tally in tallies.values() for finding in tally.findings]
    print(table(tallies))
    for finding in found[:40]:
        print(f"{finding['kind']} {finding['seed']} ({finding['outcome']}): {finding['found'][0]:.300}")
    print(
        json.dumps(
            {"cases": len(planned), "findings": len(found), "seconds": round(time.monotonic() - started)}
        )
    )
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
