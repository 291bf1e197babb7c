"""The process of a contender: load a model once, then answer requests.

    python worker.py MODULE MODEL OPTIONS

Each line of standard input is a request in JSON, and each line of standard output is its answer:
    {"run": ids, "steps": n}       -> {"prefill_s": …, "step_s": …, "tokens": […]}; an empty cache, then n greedy steps
    {"memory": true}               -> {"anonymous": …, "file": …}; resident memory in bytes
    {"score": ids, "first": i, "out": path} -> {}; logits of the positions i … len − 2 as float32 in a .npy file
    {"chat": turns, "answer": n} -> {"first_token_s": […]}; turns of new ids, each with a greedy answer of n tokens
    {"store": ids, "out": path} -> {}; writes the keys and values of the ids to a file (only llama.cpp)
    {"together": conversations, "answer": n, "temperature": t} -> {"seconds": …, "texts": […]}; answers of n tokens to
        all conversations at once (only precast)
    {"weights": true}              -> {"bytes": n}; size of all weights with their scales
    {"windows": [tokens, window]}  -> {"windows": [[…], …]}; token ids of a text (only precast)
The first line of output describes the load: {"loaded_s": …, "versions": {…}}. If a prompt is given as fourth argument,
the line also has "first_token_at", a time on the system's monotonic clock.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol


class Engine(Protocol):
    """The engine that a contender's module returns from ``load(model, options)``."""

    packages: Sequence[str]

    def prefill(self, ids: Sequence[int]) -> int:
        """Run a prompt in an empty cache; return the next token, chosen greedily."""

    def run(self, ids: Sequence[int], steps: int) -> tuple[float, float, list[int]]:
        """Return the time of the prompt and the mean time of a step after it, in seconds, and the tokens."""

    def logits(self, ids: Sequence[int], first: int) -> Iterator[object]:
        """Prefill up to position `first`, then decode; yield logits ``[V]`` of positions ``first … len(ids) − 2``."""


def timed_run(engine, ids: Sequence[int], steps: int) -> tuple[float, float, list[int]]:
    """Implement `Engine.run` for an engine with `prefill` and `step`."""
    started = time.perf_counter()
    tokens = [engine.prefill(ids)]
    first = time.perf_counter()
    for position in range(len(ids), len(ids) + steps):
        tokens.append(engine.step(tokens[-1], position))
    ended = time.perf_counter()
    return first - started, (ended - first) / steps if steps else 0.0, tokens


def resident() -> dict[str, int]:
    """Return this process's resident memory in bytes: anonymous memory, and pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return {"anonymous": fields["RssAnon"] + fields["RssShmem"], "file": fields["RssFile"]}


def _score(engine: Engine, ids: Sequence[int], first: int, out: str) -> dict:
    import numpy as np

    np.save(out, np.stack([np.array(row, np.float32) for row in engine.logits(ids, first)]))
    return {}


def answer(engine: Engine, command: dict) -> dict:
    if "run" in command:
        prefill, step, tokens = engine.run(command["run"], command["steps"])
        return {"prefill_s": prefill, "step_s": step, "tokens": tokens}
    if "memory" in command:
        return resident()
    if "score" in command:
        return _score(engine, command["score"], command["first"], command["out"])
    if "chat" in command:
        return {"first_token_s": engine.chat(command["chat"], command["answer"])}
    if "store" in command:
        engine.store(command["store"], command["out"])
        return {}
    if "together" in command:
        return engine.together(command["together"], command["answer"], command["temperature"])
    if "weights" in command:
        return {"bytes": engine.weight_bytes()}
    if "windows" in command:
        return {"windows": engine.windows(*command["windows"])}
    raise ValueError(f"unknown command {command!r:.60}")


def _versions(packages: Sequence[str]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    # Libraries print to standard output. Redirect it to standard error, and write the answers to a duplicate of the
    # original.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, model, options, *first = sys.argv[1:]
    started = time.perf_counter()
    engine = importlib.import_module(module).load(model, json.loads(options))
    hello = {"loaded_s": time.perf_counter() - started}
    if first:
        engine.prefill(json.loads(first[0]))
        hello["first_token_at"] = time.clock_gettime(time.CLOCK_MONOTONIC)
    print(json.dumps(hello | {"versions": _versions(engine.packages)}), file=channel)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=channel)
    channel.flush()
    os._exit(0)  # some libraries exit slowly or crash


if __name__ == "__main__":
    main()
