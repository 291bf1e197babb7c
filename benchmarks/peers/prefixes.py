"""Measure the time to the first token after stored prefixes, for precast and its peers.

    start   time from the start of a new process to the first token, after a prompt of 8 tokens alone, and after a
            prefix and the same prompt. The prefix's keys and values come from a file: for precast from the artifact,
            for llama.cpp from the kind of file from which its server restores a slot. OpenVINO GenAI is left out,
            because it keeps prefixes in memory only.
    chat    time to the first token of each of 10 turns. Each answer has 40 tokens, and each contender continues from
            its own answers: precast with the prefixes in memory, llama.cpp with its context, OpenVINO GenAI with its
            prefix cache.

The script uses the files, workers and interpreters of bench.py. In each round, the contenders run one after the other.

    .venv-bench/bin/python benchmarks/peers/prefixes.py --precast-python .venv/bin/python [--rounds 5] [--prefix 1900]

The script writes benchmarks/results/prefixes.json. The output is a table.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import derive
import machine
from contenders import CAPACITY, CONTENDERS, THREADS, Contender
from processes import Worker, first_token, wait_for_quiet

RESULTS = Path(__file__).parents[1] / "results" / "prefixes.json"
NAMES = ("precast-int8", "llama.cpp-q8_0", "openvino-int8", "precast-int4", "llama.cpp-q4_0", "openvino-int4")
FIRST_TURN, LATER_TURNS, TURNS, ANSWER = 36, 31, 10, 40
PROMPT = 8
PATIENCE_S = 30.0


def ids(length: int, seed: int) -> list[int]:
    """Return arbitrary token ids."""
    return [(i * 7919 + seed * 104729) % 49152 for i in range(1, length + 1)]


def turns(round_: int) -> list[list[int]]:
    """Return the new token ids of each turn. The ids differ between rounds, so that no round reuses a prefix."""
    lengths = [FIRST_TURN] + [LATER_TURNS] * (TURNS - 1)
    return [ids(length, 1 + round_ * TURNS + turn) for turn, length in enumerate(lengths)]


class Bench:
    """The contenders' files and workers."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.interpreters = {"peers": sys.executable, "precast": arguments.precast_python}
        self.rounds, self.prefix, self.folder = arguments.rounds, arguments.prefix, folder
        self.contenders = {name: CONTENDERS[name] for name in arguments.contenders}
        self.models = {name: self._model(c) for name, c in self.contenders.items()}

    def _model(self, contender: Contender) -> Path:
        if contender.worker == "precast_worker":
            return derive.precast_artifact(contender.group, CAPACITY, self.interpreters, keep=True)
        return derive.obtain(contender.model, self.interpreters)

    def worker(self, name: str, contender: Contender) -> Worker:
        interpreter = self.interpreters[contender.interpreter]
        return Worker(contender, self.models[name], interpreter, self.folder / f"{name}.log")

    def chat(self) -> dict[str, list[float]]:
        """Return, for each contender, the median time to the first token of each turn, in seconds."""
        workers = {
            name: self.worker(name, c if c.worker == "llama_cpp_worker" else _with(c, prefixes=True))
            for name, c in self.contenders.items()
        }
        times: dict[str, list[list[float]]] = {name: [] for name in workers}
        for round_ in range(self.rounds + 1):
            for name, worker in workers.items():
                wait_for_quiet(PATIENCE_S)
                answer = worker.ask(chat=turns(round_), answer=ANSWER).values
                times[name].append(answer["first_token_s"])
        for worker in workers.values():
            worker.close()
        return {
            name: [statistics.median(t) for t in zip(*rows[1:], strict=True)] for name, rows in times.items()
        }

    def start(self) -> dict[str, dict[str, float]]:
        """Return, for each contender, the median times from a process's start to its first token, in seconds."""
        stored = {name: self._stored(name, c) for name, c in self.contenders.items() if _has_file(c)}
        times: dict[str, dict[str, list[float]]] = {name: {"short": [], "prefix": []} for name in stored}
        for _ in range(self.rounds + 1):
            for name, (contender, model, prefix) in stored.items():
                interpreter = self.interpreters[contender.interpreter]
                plain = self.contenders[name] if contender.worker == "llama_cpp_worker" else contender
                kinds = {"short": (plain, self.models[name], []), "prefix": (contender, model, prefix)}
                for kind, (one, path, before) in kinds.items():
                    wait_for_quiet(PATIENCE_S)
                    times[name][kind].append(first_token(one, path, interpreter, [*before, *ids(PROMPT, 0)]))
        medians = {
            name: {kind: statistics.median(t[1:]) for kind, t in kinds.items()}
            for name, kinds in times.items()
        }
        return {
            name: {**kinds, "ratio": kinds["prefix"] / kinds["short"], "prefix_tokens": len(stored[name][2])}
            for name, kinds in medians.items()
        }

    def _stored(self, name: str, contender: Contender) -> tuple[Contender, Path, list[int]]:
        """Store a prefix; return the contender that uses it, its model, and the prefix's token ids."""
        if contender.worker == "llama_cpp_worker":
            state, prefix = self.folder / f"{name}.state", ids(self.prefix, 1)
            worker = self.worker(name, contender)
            worker.ask(store=prefix, out=str(state))
            worker.close()
            return _with(contender, state=str(state)), self.models[name], prefix
        artifact, text = self.folder / name, self.folder / "prefix.txt"
        shutil.copytree(self.models[name], artifact)
        # The prefix is the text on which `precast eval` measures by default. Only its length affects the time.
        prefix = self._shipped_text(artifact, text)
        command = [self.interpreters["precast"], "-m", "precast.cli", "add-prefix", str(artifact), "prefix"]
        subprocess.run([*command, "--text", str(text)], check=True, stdout=subprocess.DEVNULL)
        return _with(contender, prefixes=True), artifact, prefix

    def _shipped_text(self, artifact: Path, text: Path) -> list[int]:
        """Write the first `self.prefix` tokens of `precast eval`'s text to a file; return the file's token ids."""
        code = (
            "import json, sys, precast; from precast.loaders.audit import evaluate;"
            "model, count = precast.load(sys.argv[1]), int(sys.argv[3]);"
            "ids = model.tokenizer.encode(evaluate.read_text(evaluate.SHIPPED_TEXT, count))[:count];"
            "text = model.tokenizer.decode(ids); open(sys.argv[2], 'w').write(text);"
            "print(json.dumps(model.tokenizer.encode(text)))"
        )
        command = [self.interpreters["precast"], "-c", code, str(artifact), str(text), str(self.prefix)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _with(contender: Contender, **options: object) -> Contender:
    return replace(contender, options={**contender.options, **options})


def _has_file(contender: Contender) -> bool:
    return contender.worker != "openvino_worker"


def table(result: Mapping) -> str:
    """Return the results as Markdown."""
    lines = [
        "| | start, 8 tokens, s | start, 8 tokens after a stored prefix, s | ratio | turn 1, ms | turn 10, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, chat in result["chat"].items():
        s = result["start"].get(name)
        start = f"{s['short']:.2f} | {s['prefix']:.2f} | {s['ratio']:.2f}" if s else "– | – | –"
        lines.append(f"| {CONTENDERS[name].label} | {start} | {chat[0] * 1e3:.0f} | {chat[-1] * 1e3:.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precast-python", default=sys.executable)
    parser.add_argument("--contenders", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefix", type=int, default=1900, help="tokens of the stored prefix")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="precast-prefixes-") as folder:
        bench = Bench(options, Path(folder))
        result = {
            "machine": machine.describe(()),
            "threads": THREADS,
            "rounds": options.rounds,
            "start": bench.start(),
            "chat": bench.chat(),
        }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
