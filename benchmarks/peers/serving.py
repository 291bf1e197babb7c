"""Compare `precast serve` with llama-server: the same requests, slots and threads, and the same number of bits.

    one      one stream with a prompt of about 100 tokens and an answer of 128
    sampled  the same at temperature 1, at which drafts from the prompt rarely help precast
    eight    eight streams at once, each with its own prompt
    shared   eight streams at once, which share a system prompt that the server has seen before
    start    time from the start of the server's process to the first token of its first answer

Both servers get the same requests from the same client through OpenAI's chat API. In each round, all servers run one
after the other, in a rotating order. All idle servers are stopped (SIGSTOP). Every prompt is new, except for the shared
system prompt. The script checks that the servers count the same tokens in each prompt, and that each answer has all its
tokens. llama-server decides itself whether to use flash attention.

The overhead of HTTP is the time of precast's answers, divided by the time of the same prompts in `generate_many`, in a
process without a server.

    .venv-bench/bin/python benchmarks/peers/llama_tools.py llama-server      # once
    .venv-bench/bin/python benchmarks/peers/serving.py --precast-python .venv/bin/python [--rounds 5]

The script writes benchmarks/results/serving.json. The output is a table, and one line of JSON at the end.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import contenders
import derive
import limits
import llama_tools
import machine
import serving_report
from contenders import CAPACITY, THREADS
from processes import Worker, wait_for_quiet
from serving_client import Answered, ask
from serving_servers import CONTENDERS, SLOTS, Contender, Meter, Server, command, free_port

RESULTS = Path(__file__).parents[1] / "results" / "serving.json"
TEXT = Path(__file__).parents[2] / "loaders" / "audit" / "data" / "persuasion.txt"
ANSWER = 128
WORDS, SHARED_WORDS = 68, 340
# A measurement is repeated if other processes use more than this share of the machine.
OTHERS = 0.05


@dataclass(frozen=True, kw_only=True)
class Load:
    """Streams that begin together.

    Attributes:
        streams: number of streams.
        temperature: the temperature; 0 for greedy answers.
        shares: True if the streams share a system prompt.
    """

    streams: int
    temperature: float = 0.0
    shares: bool = False


LOADS: Mapping[str, Load] = {
    "one": Load(streams=1),
    "sampled": Load(streams=1, temperature=1.0),
    "eight": Load(streams=SLOTS),
    "shared": Load(streams=SLOTS, shares=True),
}


class Texts:
    """Passages of a text, none of which begins where another one began."""

    def __init__(self) -> None:
        self._words = TEXT.read_text().split()
        starts = range(SHARED_WORDS, len(self._words) - WORDS)
        self._starts = random.Random(0).sample(starts, len(starts))
        self.system = " ".join(self._words[:SHARED_WORDS])

    def passage(self) -> str:
        start = self._starts.pop()
        return " ".join(self._words[start : start + WORDS])


def messages(texts: Texts, load: Load) -> list[list[dict]]:
    """Return a conversation for each stream. Without a shared system prompt, the first message is a passage."""
    if load.shares:
        pairs = [(texts.system, texts.passage()) for _ in range(load.streams)]
    else:
        pairs = [(texts.passage(), "Continue.") for _ in range(load.streams)]
    return [[{"role": "system", "content": a}, {"role": "user", "content": b}] for a, b in pairs]


def body(model: str, conversation: Sequence[Mapping], load: Load, tokens: int = ANSWER) -> dict:
    """Return a request."""
    return {
        "model": model,
        "messages": conversation,
        "max_tokens": tokens,
        "temperature": load.temperature,
        "seed": 1,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class Bench:
    """The servers, and what they have answered."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.interpreters = {"peers": sys.executable, "precast": arguments.precast_python}
        self.patience, self.retries, self.rounds = arguments.patience, arguments.retries, arguments.rounds
        self.folder, self.texts = folder, Texts()
        self.contenders = {name: CONTENDERS[name] for name in arguments.contenders}
        self.models = {name: self._model(c) for name, c in self.contenders.items()}

    def _model(self, contender: Contender) -> Path:
        if contender.is_precast:
            return derive.precast_artifact(contender.group, CAPACITY, self.interpreters, keep=True)
        return derive.obtain(contender.model, self.interpreters)

    def start(self, name: str) -> Server:
        port = free_port()
        arguments = command(self.contenders[name], self.models[name], port, self.interpreters)
        return Server(arguments, port, self.folder / f"{name}.log")

    def request(self, name: str, conversation: Sequence[Mapping], load: Load, tokens: int = ANSWER) -> dict:
        return body(self.models[name].name, conversation, load, tokens)

    def in_process(self, name: str) -> Worker:
        """Start the process that runs precast without a server."""
        one = contenders.CONTENDERS[name]
        return Worker(one, self.models[name], self.interpreters["precast"], self.folder / f"{name}-alone.log")

    def served(self, name: str, server: Server, conversations: Sequence, load: Load) -> dict:
        """Send conversations to a server, and return what was measured."""
        server.resume()
        if load.shares:  # a request before the measurement, so that the server knows the system prompt
            first = [{**conversations[0][0]}, {"role": "user", "content": "Hello."}]
            ask(server.port, [self.request(name, first, load, 4)] * load.streams)
        wait_for_quiet(self.patience)
        meter = Meter(server)
        seconds, answers = ask(server.port, [self.request(name, c, load) for c in conversations])
        others = meter.share()
        server.stop()
        return {"seconds": seconds, "answers": answers, "others": others}


def _alone(worker: Worker, conversations: Sequence, load: Load, patience: float) -> dict:
    """Answer conversations in the process without a server; return the seconds and the texts."""
    request = {"together": conversations, "answer": ANSWER, "temperature": load.temperature}
    if load.shares:
        first = [{**conversations[0][0]}, {"role": "user", "content": "Hello."}]
        worker.ask(**(request | {"together": [first] * load.streams, "answer": 4}))
    wait_for_quiet(patience)
    answer = worker.ask(**request)
    return {**answer.values, "others": answer.others}


def check(found: Mapping[str, dict]) -> None:
    """End the benchmark if answers are not comparable."""
    for name, run in found.items():
        if short := [a.tokens for a in run["answers"] if a.tokens != ANSWER]:
            raise SystemExit(f"{name}: expected answers of {ANSWER} tokens, found {short[0]}.")
    prompts = {name: [a.prompt_tokens for a in run["answers"]] for name, run in found.items()}
    if len({tuple(lengths) for lengths in prompts.values()}) != 1:
        raise SystemExit(f"The servers count different tokens in the prompts: {prompts}.")


def one_round(
    bench: Bench, load: Load, servers: Mapping[str, Server], workers: Mapping[str, Worker], number: int
) -> dict[str, dict]:
    """Run a load on all servers, and again if other processes disturbed it; return the quietest attempt."""
    names, best = list(servers), None
    rotated = names[number % len(names) :] + names[: number % len(names)]
    for _ in range(1 + bench.retries):
        conversations, found = messages(bench.texts, load), {}
        for name in rotated:
            found[name] = bench.served(name, servers[name], conversations, load)
            if name in workers:
                found[name]["alone"] = _alone(workers[name], conversations, load, bench.patience)
        check(found)
        others = max(run["others"] for run in found.values())
        if best is None or others < max(run["others"] for run in best.values()):
            best = found
        if others <= OTHERS:
            break
    return best


def measure_loads(bench: Bench, loads: Sequence[str]) -> dict[str, dict]:
    """Return the runs of each load on each server, and the memory of each server at the end."""
    servers, workers = {}, {}
    for name, contender in bench.contenders.items():
        servers[name] = bench.start(name)
        servers[name].first_answer(
            bench.request(name, messages(bench.texts, LOADS["one"])[0], LOADS["one"], 2)
        )
        servers[name].stop()
        if contender.is_precast:
            workers[name] = bench.in_process(name)
    runs = {load: {name: [] for name in servers} for load in loads}
    for number in range(bench.rounds + 1):
        for load in loads:
            found = one_round(bench, LOADS[load], servers, workers, number)
            if number:  # the first round warms up
                for name, run in found.items():
                    runs[load][name].append(run)
        print(f"round {number} of {bench.rounds}", file=sys.stderr, flush=True)
    memory = {name: server.memory() for name, server in servers.items()}
    for process in (*servers.values(), *workers.values()):
        process.close()
    return {"loads": runs, "memory": memory}


def measure_starts(bench: Bench) -> dict[str, list[float]]:
    """Return, for each server, the times from the start of its process to the first token, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in bench.contenders}
    for number in range(bench.rounds + 1):
        for name in bench.contenders:
            wait_for_quiet(bench.patience)
            server = bench.start(name)
            conversation = messages(bench.texts, LOADS["one"])[0]
            seconds, _ = server.first_answer(bench.request(name, conversation, LOADS["one"], 2))
            server.close()
            if number:  # the first round fills the page cache
                times[name].append(seconds)
    return times


def summary(answers: Sequence[Answered], runs: Sequence[Mapping]) -> dict:
    """Return the figures of one server for one load."""
    tokens = [sum(a.tokens for a in run["answers"]) / run["seconds"] for run in runs]
    gaps = sorted(gap for a in answers for gap in a.gaps_s)
    found = {
        "tokens_per_s": limits.spread(tokens),
        "first_token_s": limits.spread([a.first_s for a in answers]),
        "first_token_p95_s": limits.spread(
            [serving_report.percentile([a.first_s for a in r["answers"]], 95) for r in runs]
        ),
        "token_s": limits.spread([(a.last_s - a.first_s) / (a.tokens - 1) for a in answers]),
        "gap_p95_s": serving_report.percentile(gaps, 95),
        "prompt_tokens": limits.spread([a.prompt_tokens for a in answers]),
        "cached_tokens": limits.spread([a.cached_tokens for a in answers]),
        "others": limits.spread([run["others"] for run in runs]),
    }
    if "alone" in runs[0]:
        ratios = [run["seconds"] / run["alone"]["seconds"] for run in runs]
        same = [
            a.text == text for r in runs for a, text in zip(r["answers"], r["alone"]["texts"], strict=True)
        ]
        found["over_generate_many"] = limits.spread(ratios)
        found["same_texts"] = sum(same) / len(same)
    return found


def measure(arguments: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(prefix="precast-serving-") as folder:
        bench = Bench(arguments, Path(folder))
        starts = measure_starts(bench)
        found = measure_loads(bench, arguments.loads)
    loads = {
        load: {name: summary([a for r in runs for a in r["answers"]], runs) for name, runs in named.items()}
        for load, named in found["loads"].items()
    }
    return {
        "benchmark": "serving",
        "threads": THREADS,
        "slots": SLOTS,
        "answer_tokens": ANSWER,
        "rounds": arguments.rounds,
        "start_s": {name: limits.spread(times) for name, times in starts.items()},
        "memory": found["memory"],
        "loads": loads,
        "ratios": serving_report.ratios(found["loads"], starts, CONTENDERS),
        "labels": {name: c.label for name, c in bench.contenders.items()},
        **machine.describe(("llama-cpp-python",)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precast-python", default=".venv/bin/python", help="a Python with precast[serve]")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine")
    parser.add_argument(
        "--retries", type=int, default=1, help="retries if other processes disturb a measurement"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if llama_tools.find(llama_tools.SERVER) is None and any("llama" in n for n in arguments.contenders):
        raise SystemExit("llama-server is missing; build it: benchmarks/peers/llama_tools.py llama-server")
    result = measure(arguments)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(serving_report.table(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
