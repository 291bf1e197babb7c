"""Compare a model that a server loads at its first request with a cold `precast run`.

    run        time from the start of `precast run` to its end
    on demand  time of a request to a running server whose model is not in memory
    first      the same, but the server has not verified the artifact before, so it replays the golden answers

All answer the same prompt with the same number of tokens. The three alternate in each round, and a ratio is that of two
times of one round. All files are in the page cache. A server offers the artifact under two names, so that it loads
neither at its start, and unloads a model after half a second.

    python benchmarks/on_demand.py [--rounds 7] [--artifact FOLDER]

The script writes benchmarks/results/on_demand.json. The output is a table, and one line of JSON at the end.
"""

import argparse
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import machine

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "artifacts" / "smollm2-135m-instruct-int8"
RESULTS = ROOT / "benchmarks" / "results" / "on_demand.json"
PROMPT, TOKENS = "The capital of France is", 16
IDLE_S = 0.5
PRECAST = [sys.executable, "-m", "precast"]


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """Yield the port of a server of the artifacts in a folder."""
    command = [*PRECAST, "serve", str(folder), "--port", "0", "--idle-unload", str(IDLE_S)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().partition("/v1;")[0].rpartition(":")[2])
    finally:
        process.terminate()
        process.wait()


def request(port: int, path: str, value: object = None) -> str:
    """Return the answer to a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = None if value is None else json.dumps(value)
    connection.request("GET" if body is None else "POST", path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"{path}: status {response.status}: {text[:500]}")
    return text


def run(artifact: Path) -> tuple[float, str]:
    """Return the seconds of a cold run, and its answer."""
    command = [
        *PRECAST,
        "run",
        str(artifact),
        "--prompt",
        PROMPT,
        "-n",
        str(TOKENS),
        "--json",
        "--temperature",
        "0",
    ]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - began, json.loads(done.stdout)["text"]


def on_demand(port: int) -> tuple[float, str]:
    """Return the seconds of a request to a model that is not loaded, and the answer."""
    while 'model_loaded{model_name="one"} 1' in request(port, "/metrics"):
        time.sleep(0.1)
    ask = {"model": "one", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    began = time.perf_counter()
    answer = json.loads(request(port, "/v1/completions", ask))
    return time.perf_counter() - began, answer["choices"][0]["text"]


def forget(cache: Path) -> None:
    """Remove the records of the golden answers that were replayed."""
    shutil.rmtree(cache / "replayed", ignore_errors=True)


def measure(artifact: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each kind and round, without a first round to warm up."""
    times: dict[str, list[float]] = {"run": [], "on_demand": [], "first": []}
    with tempfile.TemporaryDirectory(prefix="precast-benchmark-") as folder:
        models, cache = Path(folder) / "models", Path(folder) / "cache"
        models.mkdir()
        for name in ("one", "two"):
            (models / name).symlink_to(artifact.resolve())
        os.environ["PRECAST_CACHE"] = str(cache)
        with server(models) as port:
            for number in range(rounds + 1):
                forget(cache)
                found = {"first": on_demand(port), "run": run(artifact), "on_demand": on_demand(port)}
                if len({text for _, text in found.values()}) > 1:
                    raise SystemExit(f"the answers differ: {found}")
                for kind, (seconds, _) in found.items():
                    times[kind] += [seconds] if number else []
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--artifact", type=Path, default=DEMO)
    options = parser.parse_args()
    times = measure(options.artifact, options.rounds)
    facts: dict[str, object] = {f"{kind}_s": statistics.median(seconds) for kind, seconds in times.items()}
    print(f"| {options.artifact.name}: {TOKENS} tokens | seconds | share of a cold run |\n|---|---:|---:|")
    for kind, seconds in times.items():
        ratios = [mine / cold for mine, cold in zip(seconds, times["run"], strict=True)]
        facts[f"{kind}_ratio"] = statistics.median(ratios)
        facts[f"{kind}_ratio_spread"] = [min(ratios), max(ratios)]
        print(
            f"| {kind.replace('_', ' ')} | {statistics.median(seconds):.2f} | {statistics.median(ratios):.2f} |"
        )
    result = {"benchmark": "on_demand", "rounds": options.rounds, **facts, **machine.describe()}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
