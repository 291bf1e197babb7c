"""Measure the effect of stored prefixes on the time to the first token, and the speed of batches and of drafts.

Computing a prompt is bound by arithmetic. Copying the keys and values of a stored prefix is bound by memory bandwidth,
and takes about a hundredth of the time. Each part compares two or more ways alternately:

    chat      time to the first token in each turn of a chat with ten turns, with and without prefixes in memory
    start     time from the start of a process to its first token. The prompt has 8 tokens, or it is long. The keys and
              values of the long prompt are computed, or come from a prefix in the artifact or from a state file
    batch     eight sequences of 128 + 128 tokens, together and one after the other
    lookup    decoding with and without drafts from the prompt, for a task that rewrites a text and for prose

    python benchmarks/prefixes.py [ARTIFACT] [--rounds 5] [--only chat,start,batch,lookup] [--prefix 2000]

Without an artifact, the script exports the demo model. The output is a table for each part, and one line of JSON.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import machine

PARTS = ("chat", "start", "batch", "lookup")
TURNS = (
    "I want to grow vegetables on a small balcony that faces east. Which three would you start with, and why?",
    "How deep must the pots for those be, and how many plants fit into each of them?",
    "Which soil would you buy, and can I use it again next year for the same vegetables?",
    "How often do I water in June, and how do I notice that I water too much?",
    "What can I sow between the larger plants to use the space while they are small?",
    "Aphids have found the balcony. What helps that I would have in the kitchen anyway?",
    "I am away for ten days in July. What is the simplest way to keep the plants alive?",
    "When do I harvest each of the three, and how do I see that it is ripe?",
    "What do I do with the pots and the soil in November?",
    "Write me a short calendar, month by month, of everything that we have said so far.",
)
ANSWER_TOKENS = 40


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def prompt(length: int, seed: int = 1, vocab: int = 49152) -> list[int]:
    """Return arbitrary token ids, without repetitions."""
    return [(i * 7919 + seed * 104729) % vocab for i in range(1, length + 1)]


def chat(artifact: Path, rounds: int) -> dict:
    """Time the first token of each turn with and without prefixes, and check that the answers are the same."""
    import precast

    models = {"reused": precast.load(artifact), "read": precast.load(artifact, prefix_memory=0)}
    params = precast.SamplingParams(max_tokens=ANSWER_TOKENS)
    first: dict[str, list[list[float]]] = {name: [[] for _ in TURNS] for name in models}
    tokens: list[int] = []
    new: list[int] = []
    for round_ in range(rounds):
        answers: dict[str, list[tuple[int, ...]]] = {}
        for name, model in models.items():
            # The system message differs between rounds, so that no round reuses the prefixes of an earlier one.
            messages = [{"role": "system", "content": f"You are a gardener. Conversation {round_}."}]
            answers[name], lengths, unread = [], [], []
            for turn, text in enumerate(TURNS):
                messages.append({"role": "user", "content": text})
                answer = model.chat(messages, params)
                messages.append({"role": "assistant", "content": answer.text})
                first[name][turn].append(answer.timing.prefill_s)
                answers[name].append(answer.token_ids)
                lengths.append(len(answer.prompt_token_ids))
                unread.append(len(answer.prompt_token_ids) - answer.timing.cached_tokens)
            if name == "reused":
                tokens, new = lengths, unread
        if answers["reused"] != answers["read"]:
            raise SystemExit("chat: the answers differ with and without prefixes")
    return {
        "prompt_tokens": tokens,
        "new_tokens": new,
        **{f"{name}_first_token_s": [median(times) for times in turns] for name, turns in first.items()},
    }


def _precast(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "precast.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"precast {' '.join(arguments[:3])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _text(model, length: int) -> str:
    """Return a text of about `length` tokens, from the text that measures fidelity."""
    from precast.loaders.audit import evaluate

    tokens = model.tokenizer.encode(evaluate.read_text(evaluate.SHIPPED_TEXT, length))
    # The text is repeated if it is too short.
    return model.tokenizer.decode((tokens * -(-length // len(tokens)))[:length])


def start(artifact: Path, rounds: int, length: int, folder: Path) -> dict:
    """Time new processes from their start to the first token, with and without a stored prefix of `length` tokens."""
    import precast

    model = precast.load(artifact)
    text = folder / "prefix.txt"
    text.write_text(_text(model, length))
    prefix = model.tokenizer.encode(text.read_text())
    long = ",".join(map(str, [*prefix, *prompt(8)]))
    stored, state = folder / "stored", folder / "chat.state"
    shutil.copytree(artifact, stored)
    _precast("add-prefix", str(stored), "benchmark", "--text", str(text))
    model.save_state(state, prefix)
    commands = {
        "short": (artifact, ["--ids", ",".join(map(str, prompt(8)))]),
        "read": (artifact, ["--ids", long]),
        "artifact": (stored, ["--ids", long]),
        "state": (artifact, ["--ids", ",".join(map(str, prompt(8))), "--state", str(state)]),
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    texts: dict[str, str] = {}
    for _ in range(rounds + 1):
        for name, (path, arguments) in commands.items():
            model.save_state(state, prefix)  # restore the file, which run --state replaces
            answer = json.loads(_precast("run", str(path), *arguments, "-n", "1", "--json"))
            times[name].append(answer["timing"]["first_token_s"])
            texts[name] = answer["text"]
    if not texts["read"] == texts["artifact"] == texts["state"]:
        raise SystemExit(f"start: the first tokens differ: {texts}")
    ratios = [a / b for a, b in zip(times["artifact"][1:], times["short"][1:], strict=True)]
    return {
        "prefix_tokens": len(prefix),
        **{f"{name}_s": median(t[1:]) for name, t in times.items()},
        "ratio": median(ratios),
    }


def batch(artifact: Path, rounds: int, sequences: int = 8, length: int = 128, tokens: int = 128) -> dict:
    """Measure the tokens per second of several sequences, run together and run one after the other."""
    import precast

    model = precast.load(artifact, prefix_memory=0)
    # Drafts speed up only a sequence that runs alone, so they would distort the gain of a batch.
    params = precast.SamplingParams(max_tokens=tokens, ignore_eos=True, prompt_lookup=False)
    prompts = [prompt(length, seed) for seed in range(sequences)]

    def together() -> list[tuple[int, ...]]:
        return [c.token_ids for c in model.generate_many(prompts, params)]

    def alone() -> list[tuple[int, ...]]:
        return [model.generate(ids, params).token_ids for ids in prompts]

    speeds: dict[str, list[float]] = {"together": [], "alone": []}
    answers = {}
    for _ in range(rounds):
        for name, work in (("together", together), ("alone", alone)):
            began = time.perf_counter()
            answers[name] = work()
            speeds[name].append(sequences * tokens / (time.perf_counter() - began))
    if answers["together"] != answers["alone"]:
        raise SystemExit("batch: the answers differ together and alone")
    ratios = [a / b for a, b in zip(speeds["together"], speeds["alone"], strict=True)]
    return {f"{name}_tokens_per_s": median(v) for name, v in speeds.items()} | {"ratio": median(ratios)}


REWRITE = """def area(width, height):
    result = width * height
    return result

def volume(width, height, depth):
    result = width * height * depth
    return result

def surface(width, height, depth):
    result = 2 * (width * height + height * depth + width * depth)
    return result

"""


def lookup(artifact: Path, rounds: int, tokens: int = 160) -> dict:
    """Measure the decoding speed with and without drafts, for a task that repeats its prompt and for prose."""
    import precast

    model = precast.load(artifact)
    again = "This is the same file again, in which the variable is called `value`:\n\n"
    rewriting = f"This is a Python file:\n\n{REWRITE}{again}"
    tasks = {"rewriting": rewriting, "prose": _text(model, 200)}
    facts = {}
    for task, text in tasks.items():
        speeds: dict[bool, list[float]] = {True: [], False: []}
        answers = {}
        for _ in range(rounds):
            for drafts in (True, False):
                params = precast.SamplingParams(max_tokens=tokens, ignore_eos=True, prompt_lookup=drafts)
                answer = model.generate(text, params)
                answers[drafts] = answer.token_ids
                speeds[drafts].append(answer.timing.decode_tokens_per_s)
        if answers[True] != answers[False]:
            raise SystemExit(f"lookup: the answers differ with and without drafts on {task}")
        facts[task] = {
            "with_tokens_per_s": median(speeds[True]),
            "without_tokens_per_s": median(speeds[False]),
            "ratio": median([a / b for a, b in zip(speeds[True], speeds[False], strict=True)]),
        }
    return facts


def _table(facts: dict) -> str:
    lines = []
    if "chat" in facts:
        c = facts["chat"]
        lines += [
            "| turn | prompt, tokens | new | first token, ms | without prefixes, ms |",
            "|---:|---:|---:|---:|---:|",
        ]
        rows = zip(
            c["prompt_tokens"],
            c["new_tokens"],
            c["reused_first_token_s"],
            c["read_first_token_s"],
            strict=True,
        )
        lines += [
            f"| {i} | {length} | {new} | {reused * 1e3:.0f} | {read * 1e3:.0f} |"
            for i, (length, new, reused, read) in enumerate(rows, 1)
        ]
        lines.append("")
    if "start" in facts:
        s = facts["start"]
        lines += [
            f"| process start to first token | s |\n|---|---:|\n| 8 tokens | {s['short_s']:.3f} |",
            f"| {s['prefix_tokens']} + 8 tokens, all computed | {s['read_s']:.3f} |",
            f"| the same, prefix in the artifact | {s['artifact_s']:.3f} |",
            f"| the same, state file | {s['state_s']:.3f} |\n",
        ]
    if "batch" in facts:
        b = facts["batch"]
        lines += [
            "| 8 sequences of 128 + 128 tokens | tokens/s |\n|---|---:|",
            f"| together | {b['together_tokens_per_s']:.0f} |",
            f"| one after the other | {b['alone_tokens_per_s']:.0f} |\n",
        ]
    if "lookup" in facts:
        lines.append("| decoding, tokens/s | with drafts | without | ratio |\n|---|---:|---:|---:|")
        lines += [
            f"| {task} | {f['with_tokens_per_s']:.0f} | {f['without_tokens_per_s']:.0f} | {f['ratio']:.2f} |"
            for task, f in facts["lookup"].items()
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run")
    parser.add_argument("--prefix", type=int, default=2000, help="tokens of the stored prefix")
    parser.add_argument("--weights", default="int8", help="format of the export, if no artifact is given")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    with tempfile.TemporaryDirectory(prefix="precast-benchmark-") as name:
        folder, artifact = Path(name), arguments.artifact
        if artifact is None:
            artifact = folder / "demo"
            _precast("export", "--weights", arguments.weights, "--context", "4096", "--output", str(artifact))
        parts: dict[str, Callable[[], dict]] = {
            "chat": lambda: chat(artifact, arguments.rounds),
            "start": lambda: start(artifact, arguments.rounds, arguments.prefix, folder),
            "batch": lambda: batch(artifact, arguments.rounds),
            "lookup": lambda: lookup(artifact, arguments.rounds),
        }
        facts = {part: parts[part]() for part in PARTS if part in only}
    print(_table(facts) + "\n")
    print(json.dumps({"benchmark": "prefixes", **facts} | machine.describe()))


if __name__ == "__main__":
    main()
