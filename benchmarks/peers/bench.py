"""Compare precast with its peers: the same model, prompts and threads, and the same number of bits, alternately.

Each contender has a process that loads the model once and then answers requests. All idle contenders are stopped
(SIGSTOP), so that their threads cannot spin. For each prompt length, each contender runs the prompt in an empty cache
and then decodes. The order of the contenders rotates with each round. The memory bandwidth and the arithmetic peaks of
the machine are measured just before each measurement of precast. If other processes used more than 5% of the machine
during a measurement, the measurement is repeated. The results state the share that other processes used.

Decoding is bound by memory, because a step reads the weights and the filled part of the cache once. Prefill is bound by
arithmetic. The results also give precast's figures as shares of these limits. A cold start is the time from the start
of a new process to the first token, with all files in the page cache.

    make bench                                        # builds .venv-bench, then runs this
    python benchmarks/peers/bench.py --precast-python .venv/bin/python [--contenders NAME …] [--rounds 5]

The script writes peers.json and peers.svg into benchmarks/results. The output is a table, and one line of JSON at the
end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import derive
import fidelity
import limits
import machine
import peers_picture
import report
from contenders import CAPACITY, CONTENDERS, REFERENCE, THREADS, Contender
from processes import Worker, first_token, wait_for_quiet

RESULTS = Path(__file__).parents[1] / "results"
LENGTHS = (16, 128, 512, 2000)
COLD_TOKENS = 128
CONTEXTS, CONTEXT_FILLED = (512, 8192), 400
VOCAB = 49152


def prompt(length: int) -> list[int]:
    return [i * 7919 % VOCAB for i in range(1, length + 1)]


def steps_after(length: int) -> int:
    return min(64, CAPACITY - length - 8)


class Bench:
    """A run of the benchmark: its workers and their measurements."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.patience, self.retries, self.rounds = arguments.patience, arguments.retries, arguments.rounds
        self.folder = folder
        self.interpreters = {"peers": sys.executable, "precast": arguments.precast_python}
        self.keep = arguments.keep_artifacts
        self.contenders = {name: CONTENDERS[name] for name in arguments.contenders}
        self.models = {name: self._model(c) for name, c in self.contenders.items()}
        self.record = {name: {"label": c.label, "group": c.group} for name, c in self.contenders.items()}
        self.machine = []

    def _model(self, contender: Contender) -> Path:
        if contender.model.startswith("precast-"):
            _, weights, context = contender.model.split("-")
            return derive.precast_artifact(weights, int(context), self.interpreters, keep=self.keep)
        return derive.obtain(contender.model, self.interpreters)

    def start(self, name: str, model: Path | None = None) -> Worker:
        contender = self.contenders[name]
        path = model or self.models[name]
        return Worker(contender, path, self.interpreters[contender.interpreter], self.folder / f"{name}.log")

    def measured(self, worker: Worker, **request: object) -> dict:
        """Send a request, and repeat it while other processes disturb it; return the answer of the quietest attempt.

        "others" in the answer is the share of the machine that other processes used during this attempt.
        """
        best = None
        for _ in range(1 + self.retries):
            wait_for_quiet(self.patience)
            answer = worker.ask(**request)
            if best is None or answer.others < best.others:
                best = answer
            if best.others <= 0.05:
                break
        return dict(best.values) | {"others": best.others}

    def limits(self, peak: Path) -> dict:
        """Measure the memory bandwidth and the arithmetic peaks; record them for the summary, and return them."""
        wait_for_quiet(self.patience)
        found = json.loads(subprocess.run([peak, str(THREADS)], check=True, capture_output=True).stdout)
        found["read_bytes_per_s"] = max(found["read_bytes_per_s"], machine.read_bandwidth())
        self.machine.append(found)
        return found


def compile_peak(folder: Path) -> Path:
    binary, source = folder / "peak", Path(__file__).parents[1] / "peak.c"
    flags = ["-O3", "-march=native", "-pthread"]
    subprocess.run(["cc", *flags, str(source), "-o", str(binary)], check=True)
    return binary


def timed_rounds(bench: Bench, workers: Mapping[str, Worker], lengths: Sequence[int]) -> None:
    """Run all contenders on all prompt lengths, round by round, and record the results."""
    peak = compile_peak(bench.folder)
    names = list(workers)
    for name, worker in workers.items():
        for length in lengths:
            worker.ask(run=prompt(length), steps=2)
        _say(f"warm: {name}")
    runs = {name: {length: [] for length in lengths} for name in names}
    for number in range(bench.rounds):
        rotated = names[number % len(names) :] + names[: number % len(names)]
        for length in lengths:
            for name in rotated:
                steps = steps_after(length)
                # The bandwidth changes within minutes with the load of the machine, so the limit is measured in the
                # same minute as the speed.
                limit = {"limits": bench.limits(peak)} if name.startswith("precast") else {}
                answer = bench.measured(workers[name], run=prompt(length), steps=steps)
                runs[name][length].append(answer | limit)
        _say(f"round {number + 1} of {bench.rounds}")
    for name in names:
        bench.record[name]["prompts"] = {
            str(length): _summary(bench, name, length, runs[name][length]) for length in lengths
        }


def _summary(bench: Bench, name: str, length: int, runs: Sequence[Mapping]) -> dict:
    summary = {
        "prefill_s": limits.spread([r["prefill_s"] for r in runs]),
        "decode_tokens_per_s": limits.spread([1 / r["step_s"] for r in runs]),
        "others": limits.spread([r["others"] for r in runs]),
    }
    if name.startswith("precast"):
        pairs = [(r, r["limits"]) for r in runs]
        manifest = json.loads((bench.models[name] / "manifest.json").read_text())
        filled = length + steps_after(length) / 2
        decode = [limits.decode_share(manifest, r["step_s"], filled, m["read_bytes_per_s"]) for r, m in pairs]
        peaks = [m.get("f32_fma", 0) if "float" in name else limits.int8_peak(m) for _, m in pairs]
        work = limits.prompt_operations(manifest["model"], length)
        prefill = [work / r["prefill_s"] / peak for (r, _), peak in zip(pairs, peaks, strict=True)]
        summary["decode_share"] = limits.spread(decode)
        summary["prefill_share"] = limits.spread(prefill)
    return summary


def memory(bench: Bench) -> None:
    """Measure the resident memory of new processes twice: after loading, and after a prompt with an answer."""
    for name in bench.contenders:
        worker = bench.start(name)
        loaded = worker.ask(memory=True).values
        worker.ask(run=prompt(COLD_TOKENS), steps=64)
        bench.record[name]["resident_bytes"] = {
            "loaded": dict(loaded),
            "used": dict(worker.ask(memory=True).values),
        }
        worker.close()


def cold_starts(bench: Bench) -> None:
    times = {name: [] for name in bench.contenders}
    for number in range(bench.rounds + 1):
        for name, c in bench.contenders.items():
            wait_for_quiet(bench.patience)
            interpreter = bench.interpreters[c.interpreter]
            seconds = first_token(c, bench.models[name], interpreter, prompt(COLD_TOKENS))
            if number:  # the first round fills the page cache
                times[name].append(seconds)
    for name, values in times.items():
        bench.record[name]["cold_start_s"] = limits.spread(values)
    _say("cold starts done")


def contexts(bench: Bench) -> dict:
    """Measure precast's decode step with two context lengths and the same number of filled positions."""
    found = {}
    for name in (n for n in bench.contenders if n.startswith("precast")):
        weights = name.removeprefix("precast-")
        paths = {
            s: derive.precast_artifact(weights, s, bench.interpreters, keep=bench.keep) for s in CONTEXTS
        }
        workers = {s: bench.start(name, path) for s, path in paths.items()}
        steps = {s: [] for s in CONTEXTS}
        for number in range(bench.rounds + 1):
            for s, worker in workers.items():
                answer = bench.measured(worker, run=prompt(CONTEXT_FILLED), steps=64)
                if number:
                    steps[s].append(answer["step_s"])
        for worker in workers.values():
            worker.close()
        found[name] = {str(s): limits.spread(values) for s, values in steps.items()}
        found[name]["ratio"] = limits.spread([b / a for a, b in zip(*steps.values(), strict=True)])
    _say("contexts done")
    return found


def fidelities(bench: Bench, tokens: int) -> None:
    asked = next((n for n in bench.contenders if n.startswith("precast")), None)
    names = [n for n, c in bench.contenders.items() if c.group != "float32"]
    if REFERENCE not in bench.contenders or asked is None or not names:
        _say(
            "fidelity is left out: it needs the reference, a precast contender, and a contender with fewer than 32 bits"
        )
        return
    workers = {name: bench.start(name) for name in dict.fromkeys([REFERENCE, asked, *names])}
    windows = workers[asked].ask(windows=[tokens, 512]).values["windows"]
    chosen = {n: w for n, w in workers.items() if n == REFERENCE or n in names}
    for name, figures in fidelity.measure(chosen, REFERENCE, windows, bench.folder).items():
        bench.record[name]["fidelity"] = figures
    for worker in workers.values():
        worker.close()
    _say("fidelity done")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(arguments: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(prefix="precast-bench-") as folder:
        bench = Bench(arguments, Path(folder))
        result = {"benchmark": "peers", "threads": THREADS, "capacity": CAPACITY, "rounds": arguments.rounds}
        wanted = arguments.parts
        versions = {}
        if "timed" in wanted:
            workers = {name: bench.start(name) for name in bench.contenders}
            for worker in workers.values():
                versions |= worker.hello["versions"]
            timed_rounds(bench, workers, arguments.lengths)
            for worker in workers.values():
                worker.close()
            if bench.machine:
                result["machine"] = {
                    key: limits.spread([m[key] for m in bench.machine]) for key in bench.machine[0]
                }
        if "cold" in wanted:
            cold_starts(bench)
        if "memory" in wanted:
            memory(bench)
        if "contexts" in wanted:
            result["contexts"] = contexts(bench)
        if "fidelity" in wanted:
            fidelities(bench, arguments.tokens)
        described = machine.describe(())
        described["versions"] |= versions
        return result | {"contenders": bench.record} | described


PARTS = ("timed", "cold", "memory", "contexts", "fidelity")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precast-python", default=".venv/bin/python", help="a Python with precast[export]")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=3072, help="tokens to measure fidelity on")
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine")
    parser.add_argument(
        "--retries", type=int, default=2, help="retries if other processes disturb a measurement"
    )
    parser.add_argument(
        "--keep-artifacts", action="store_true", help="reuse existing artifacts; export only missing ones"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--report", type=Path, help="existing peers.json to print and draw, instead of measuring"
    )
    arguments = parser.parse_args()
    result = json.loads(arguments.report.read_text()) if arguments.report else measure(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        (arguments.output / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    peers_picture.draw(result, arguments.output / "peers.svg")
    print(report.tables(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
