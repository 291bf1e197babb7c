"""Compare precast and llama.cpp at real sizes: both read the same GGUF file with random weights.

precast exports the file with --weights source, so both engines have exactly the same weights, and their results differ
only by the rounding of activations. The engines alternate in each round. The idle engine is stopped.

    .venv-bench/bin/python benchmarks/peers/sizes.py --precast-python .venv/bin/python [--shapes 1.2b 7b] [--rounds 3]

The script writes benchmarks/results/sizes.json. The output is a table. The 7B shape needs 9 GB of disk space.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import derive
import limits
import machine
from contenders import THREADS, Contender
from processes import Worker, wait_for_quiet
from shapes import SHAPES, VOCAB

RESULTS = Path(__file__).parents[1] / "results" / "sizes.json"
MIXTURES = ("q4_0", "q4_k_m", "q8_0")
LENGTHS, STEPS = (128, 1900), 32
PATIENCE_S = 30.0
ENGINES = {"precast": ("precast_worker", "precast"), "llama.cpp": ("llama_cpp_worker", "peers")}


def prompt(length: int) -> list[int]:
    return [i * 7919 % VOCAB for i in range(1, length + 1)]


def obtain(shape: str, mixture: str, interpreters: Mapping[str, str]) -> Mapping[str, Path]:
    """Make the GGUF file if it is missing, and export it; return the path of each engine's model."""
    gguf, artifact = (derive.cache(f"{shape}-{mixture}{suffix}") for suffix in (".gguf", ""))
    gguf.parent.mkdir(parents=True, exist_ok=True)
    if not gguf.exists():
        script = [interpreters["precast"], str(Path(__file__).parent / "shapes.py")]
        with tempfile.TemporaryDirectory(dir=gguf.parent, prefix=".making-") as folder:
            subprocess.run([*script, shape, mixture, str(Path(folder) / "made")], check=True)
            (Path(folder) / "made").rename(gguf)
    options = ["--weights", "source", "--buckets", "128,512", "--overwrite", "-o", str(artifact)]
    subprocess.run(
        [interpreters["precast"], "-m", "precast.cli", "export", str(gguf), *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {"precast": artifact, "llama.cpp": gguf}


def measure(
    models: Mapping[str, Path], interpreters: Mapping[str, str], lengths: Sequence[int], rounds: int
) -> dict:
    """Return the speeds of each engine, and the share of the memory bandwidth that precast's steps use."""
    manifest = json.loads((models["precast"] / "manifest.json").read_text())
    with tempfile.TemporaryDirectory(prefix="precast-bench-") as folder:
        workers = {}
        for name, (module, whose) in ENGINES.items():
            contender = Contender(label=name, group="int4", worker=module, interpreter=whose, model="")
            log = Path(folder) / f"{name}.log"
            workers[name] = Worker(contender, models[name], interpreters[whose], log)
            workers[name].ask(run=prompt(16), steps=2)
        runs: dict = {str(length): {name: [] for name in ENGINES} for length in lengths}
        for number in range(rounds):
            for length in lengths:
                for name in sorted(ENGINES, reverse=number % 2 == 1):
                    wait_for_quiet(PATIENCE_S)
                    bandwidth = machine.read_bandwidth() if name == "precast" else None
                    answer = workers[name].ask(run=prompt(length), steps=STEPS)
                    found = dict(answer.values) | {"others": answer.others}
                    if bandwidth is not None:
                        filled = length + STEPS / 2
                        found["share"] = limits.decode_share(manifest, found["step_s"], filled, bandwidth)
                    runs[str(length)][name].append(found)
        for worker in workers.values():
            worker.close()
    return {length: {name: _summary(each) for name, each in named.items()} for length, named in runs.items()}


def _summary(runs: Sequence[Mapping]) -> dict:
    summary = {
        "prefill_s": limits.spread([run["prefill_s"] for run in runs]),
        "decode_tokens_per_s": limits.spread([1 / run["step_s"] for run in runs]),
        "others": limits.spread([run["others"] for run in runs]),
    }
    if "share" in runs[0]:
        summary["decode_share"] = limits.spread([run["share"] for run in runs])
    return summary


def table(found: Mapping) -> str:
    """Return the medians as a table."""
    lines = [
        "model            prompt   prefill, ms            decode, tokens/s",
        "                          precast  llama.cpp     precast  llama.cpp  ratio  of the limit",
    ]
    for model, lengths in found.items():
        for length, named in lengths.items():
            ours, theirs = named["precast"], named["llama.cpp"]
            prefill = [1e3 * each["prefill_s"]["median"] for each in (ours, theirs)]
            decode = [each["decode_tokens_per_s"]["median"] for each in (ours, theirs)]
            lines.append(
                f"{model:15}  {length:>6}  {prefill[0]:8.0f}  {prefill[1]:9.0f}   {decode[0]:9.1f}  {decode[1]:9.1f}"
                f"  {decode[0] / decode[1]:5.2f}  {ours['decode_share']['median']:.0%}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precast-python", default=".venv/bin/python", help="a Python with precast[export]")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.2b"])
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, default=["q4_0", "q4_k_m"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    interpreters = {"peers": sys.executable, "precast": str(Path(arguments.precast_python).absolute())}
    found = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}
    for shape in arguments.shapes:
        for mixture in arguments.mixtures:
            models = obtain(shape, mixture, interpreters)
            found[f"{shape} {mixture}"] = measure(models, interpreters, arguments.lengths, arguments.rounds)
            described = machine.describe(("numpy", "jaxlib"))
            RESULTS.write_text(
                json.dumps({"benchmark": "sizes", "threads": THREADS, "models": found} | described, indent=1)
                + "\n"
            )
    print(table(found))


if __name__ == "__main__":
    main()
