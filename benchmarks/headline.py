"""Measure the demo model: its export, its cold start, its speed and its memory.

A decode step reads every weight once, so it takes at least the bytes of the weights divided by the memory bandwidth.
The table shows how close a step comes to this limit. Prefill is bound by arithmetic instead. The time of a cold start
begins with the start of a new process, and includes the interpreter and all imports. All files are in the page cache.

    python benchmarks/headline.py [--rounds 7]

The output is a table, and one line of JSON at the end.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import machine

PROMPT_TOKENS = 128
DECODE_STEPS = 64


def median(values: list[float]) -> float:
    return statistics.median(values)


def _prompt(length: int, vocab: int = 49152) -> list[int]:
    return [i * 7919 % vocab for i in range(1, length + 1)]


def _precast(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "precast.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"precast {' '.join(arguments[:3])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def export(folder: Path, context: int) -> tuple[Path, dict]:
    """Export the demo model; return the artifact, and the time and peak memory of the export."""
    artifact = folder / f"demo-{context}"
    started = time.perf_counter()
    _precast("export", "--output", str(artifact), "--context", str(context))
    facts = {
        "export_s": time.perf_counter() - started,
        "export_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    return artifact, facts


def sizes(artifact: Path) -> dict:
    manifest = json.loads((artifact / "manifest.json").read_text())
    files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    return {
        "artifact_bytes": sum(files.values()),
        "weights_bytes": files["weights.safetensors"],
        "programs_bytes": sum(size for name, size in files.items() if name.startswith("programs/")),
    }


def cold_start(artifact: Path, rounds: int) -> dict:
    """Time new processes from their start to the first token of a 128-token prompt."""
    ids = ",".join(map(str, _prompt(PROMPT_TOKENS)))
    timings = [
        json.loads(_precast("run", str(artifact), "--ids", ids, "-n", "1", "--json"))["timing"]
        for _ in range(rounds + 1)
    ][1:]
    return {
        "cold_start_s": median([t["first_token_s"] for t in timings]),
        "cold_start_spread_s": [
            min(t["first_token_s"] for t in timings),
            max(t["first_token_s"] for t in timings),
        ],
        "import_s": median([t["import_s"] for t in timings]),
        "load_s": median([t["load_s"] for t in timings]),
    }


def _timed(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times)


def warm(artifact: Path, rounds: int) -> dict:
    """Measure the loading of programs, prefill, decode, bandwidth and memory; run this in a new process."""
    from precast.loaders.load import load
    from precast.loaders.locate import read_manifest
    from precast.loaders.runtime import pjrt

    model = load(artifact)
    engine, manifest = model.engine, read_manifest(artifact)
    executables = [(artifact / p.executable).read_bytes() for p in model.target.programs if p.executable]
    client = pjrt.client()
    facts = {"programs_load_s": _timed(lambda: [client.load(e, (), "") for e in executables], rounds)}
    for length in manifest.buckets:
        if length < manifest.context:
            ids = _prompt(length)
            facts[f"prefill_{length}_s"] = _timed(
                lambda ids=ids: engine.prefill(ids, engine.new_cache()), rounds
            )
    # The embedding is also the output head, so a step reads every weight once.
    weights = sum(v.bytes for v in model.target.of_kind("decode")[0].arguments if v.role == "weight")
    speeds, bandwidths = [], []
    for _ in range(rounds):
        bandwidths.append(machine.read_bandwidth(rounds=2))
        speeds.append(_decode_speed(engine))
    return facts | {
        "decode_tokens_per_s": median(speeds),
        "bandwidth_bytes_per_s": median(bandwidths),
        # Measured alternately, because the bandwidth of a shared machine varies.
        "decode_share_of_limit": median([s * weights / b for s, b in zip(speeds, bandwidths, strict=True)]),
        "resident": _resident(),
    }


def _decode_speed(engine) -> float:
    """Return the number of greedy tokens per second after a prompt of 128 tokens."""
    from precast.loaders.generation.engine import DecodeRow

    cache = engine.new_cache()
    step = engine.prefill(_prompt(PROMPT_TOKENS), cache)
    started = time.perf_counter()
    for position in range(PROMPT_TOKENS, PROMPT_TOKENS + DECODE_STEPS):
        step = engine.decode([DecodeRow(0, int(step.token[0]), position)], cache)
    return DECODE_STEPS / (time.perf_counter() - started)


def _resident() -> dict:
    """Return the resident memory in bytes: anonymous pages ("own"), and pages of mapped files ("mapped")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {"own": int(fields["RssAnon"]) * 1024, "mapped": int(fields["RssFile"]) * 1024}


def _table(facts: dict) -> str:
    mb, ms, small = 1e6, 1e3, facts["context_512"]
    rows = [
        ("cold start: from process start to first token, 128-token prompt", f"{facts['cold_start_s']:.2f} s"),
        ("of that: imports, loading", f"{facts['import_s']:.2f} s, {facts['load_s']:.2f} s"),
        ("loading all programs", f"{facts['programs_load_s'] * ms:.0f} ms"),
        (
            "prefill of 64, 128 tokens",
            f"{facts['prefill_64_s'] * ms:.0f}, {facts['prefill_128_s'] * ms:.0f} ms",
        ),
        ("prefill of 512 tokens", f"{facts['prefill_512_s'] * ms:.0f} ms"),
        ("decode after 128 tokens, context 2048", f"{facts['decode_tokens_per_s']:.1f} tokens/s"),
        (
            "decode after 128 tokens, context 512",
            f"{small['decode_tokens_per_s']:.1f} tokens/s: {small['decode_share_of_limit']:.0%} of the limit",
        ),
        ("memory read bandwidth in the same minutes", f"{small['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"),
        (
            "resident after these runs: own, mapped weights and libraries",
            f"{facts['resident']['own'] / mb:.0f} MB, {facts['resident']['mapped'] / mb:.0f} MB",
        ),
        (
            "artifact: weights, programs",
            f"{facts['weights_bytes'] / mb:.1f} MB, {facts['programs_bytes'] / mb:.2f} MB",
        ),
        ("export: time, peak memory", f"{facts['export_s']:.1f} s, {facts['export_peak_bytes'] / mb:.0f} MB"),
    ]
    return "\n".join(
        ["| SmolLM2-135M-Instruct, int8 | |", "|---|---:|", *(f"| {a} | {b} |" for a, b in rows)]
    )


def _warm_child(artifact: Path, rounds: int) -> dict:
    arguments = [sys.executable, __file__, "--warm", str(artifact), "--rounds", str(rounds)]
    return json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.warm:
        print(json.dumps(warm(arguments.warm, arguments.rounds)))
        return
    with tempfile.TemporaryDirectory(prefix="precast-benchmark-") as folder:
        artifact, facts = export(Path(folder), 2048)
        small, _ = export(Path(folder), 512)
        facts |= sizes(artifact) | cold_start(artifact, arguments.rounds)
        facts |= _warm_child(artifact, arguments.rounds)
        facts["context_512"] = _warm_child(small, arguments.rounds)
    print(_table(facts) + "\n")
    print(json.dumps({"benchmark": "headline", **facts} | machine.describe()))


if __name__ == "__main__":
    main()
