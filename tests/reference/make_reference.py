"""Write the reference files of this folder: the answers of transformers with torch, in float32.

Run by hand where torch and accelerate are installed::

    python tests/reference/make_reference.py            # write everything again
    python tests/reference/make_reference.py --check    # compute everything again and compare

The tests compare precast with these files, so they do not need these packages.

``tiny_checkpoints.json`` and ``demo_prompts.json`` list the checkpoints and prompts. ``tiny/<name>/`` contains a
checkpoint with random weights, as ``save_pretrained`` writes it, and its answers. All checkpoints use
``tiny/tokenizer.json``. ``demo.json`` contains the answers of the demo model. In every step, the largest logit leads by
more than `MARGIN`, so that another order of summation cannot change an answer. The script tries seeds for the tiny
models, and prompts for the demo model, until this is true.
"""

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TINY = HERE / "tiny"
DEMO = HERE / "demo.json"

MARGIN = 1e-3

# --- tiny checkpoints ---------------------------------------------------------------------------------------

BUCKETS, CAPACITY = (8, 16, 32), 160
LENGTHS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 70, 96, 143, 159)
TOKENS = 20
# The prompt length whose continuation fills the cache to its last position.
FILLED = 143
# For most steps, only every n-th logit is stored, to keep the files small.
STRIDE = 20

SHAPE = {
    "vocab_size": 331,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


@dataclass(frozen=True, kw_only=True)
class TinyCheckpoint:
    """The description of a checkpoint to make.

    Attributes:
        config: config keys that differ from `SHAPE`.
        rope: RoPE scaling in the spelling of transformers 5; empty for none.
        old_spelling: True if config.json has ``rope_theta`` and ``rope_scaling``, as transformers 4 wrote it.
        dtype: type of the stored weights.
        shard_size: maximum size of a file, as an argument of ``save_pretrained``.
    """

    name: str
    model_type: str
    tied: bool
    theta: float
    rope: Mapping[str, Any] = field(default_factory=dict)
    old_spelling: bool
    dtype: str
    config: Mapping[str, Any] = field(default_factory=dict)
    shard_size: str = "1GB"


def tiny_checkpoints() -> list[TinyCheckpoint]:
    """Return the checkpoints in ``tiny_checkpoints.json``."""
    return [
        TinyCheckpoint(**row)
        for row in json.loads((HERE / "tiny_checkpoints.json").read_text(encoding="utf-8"))
    ]


@dataclass(frozen=True, kw_only=True)
class TinyAnswers:
    """The answers of a tiny model.

    Attributes:
        prompts: token ids of each case.
        tokens: greedy continuation of each prompt.
        margin: smallest lead of any of these tokens over the second best.
        first: logits ``[cases, V]`` after each prompt.
        last: logits ``[cases, ceil(V / STRIDE)]`` of each continuation's last token.
        uncached: logits ``[T, ceil(V / STRIDE)]`` of every position of the prompt of `FILLED` tokens and its
            continuation, in one pass.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    margin: float
    first: np.ndarray
    last: np.ndarray
    uncached: np.ndarray

    @property
    def varied(self) -> bool:
        """True if the answers do not mostly repeat one token, as the answers of a broken model might."""
        return sum(len(set(t)) for t in self.tokens) * 2 > sum(map(len, self.tokens))


def tiny_prompts(seed: int, vocab: int) -> list[list[int]]:
    random = np.random.RandomState(seed)
    return [random.randint(3, vocab, length).tolist() for length in LENGTHS]


def answer_tiny(folder: Path, prompts: Sequence[Sequence[int]]) -> TinyAnswers:
    """Return transformers' answers for the checkpoint in `folder`."""
    model = load_reference(folder)
    runs = [generate(model, p, min(TOKENS, CAPACITY - len(p))) for p in prompts]
    filled = next(i for i, p in enumerate(prompts) if len(p) == FILLED)
    return TinyAnswers(
        prompts=[list(p) for p in prompts],
        tokens=[r.tokens for r in runs],
        margin=min(r.margin for r in runs),
        first=np.stack([r.logits[0] for r in runs]),
        last=np.stack([r.logits[-1, ::STRIDE] for r in runs]),
        uncached=uncached_logits(model, [*prompts[filled], *runs[filled].tokens])[:, ::STRIDE],
    )


def make_tiny(tiny: TinyCheckpoint) -> None:
    """Return the first seed whose answers are varied and far from ties."""
    folder = TINY / tiny.name
    for seed in itertools.count(1):
        save_tiny(tiny, folder, seed)
        answers = answer_tiny(folder, tiny_prompts(seed, SHAPE["vocab_size"]))
        print(f"{tiny.name}: seed {seed}: margin {answers.margin:.2g}, varied: {answers.varied}")
        if answers.margin > MARGIN and answers.varied:
            break
    record = {
        "transformers": versions(),
        "seed": seed,
        "margin": answers.margin,
        "cases": [
            {"prompt_token_ids": p, "token_ids": t}
            for p, t in zip(answers.prompts, answers.tokens, strict=True)
        ],
    }
    write_json(folder / "reference.json", record)
    np.savez(folder / "reference.npz", first=answers.first, last=answers.last, uncached=answers.uncached)


def save_tiny(tiny: TinyCheckpoint, folder: Path, seed: int) -> None:
    """Write a checkpoint with random weights, with transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = {"rope_type": "default", **tiny.rope, "rope_theta": tiny.theta}
    config = AutoConfig.for_model(
        tiny.model_type, **(SHAPE | tiny.config), rope_parameters=rope, tie_word_embeddings=tiny.tied
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread, centre = scale(name, parameter, tied=tiny.tied)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + centre)
    shutil.rmtree(folder, ignore_errors=True)
    model.to(getattr(torch, tiny.dtype)).save_pretrained(folder, max_shard_size=tiny.shard_size)
    if tiny.old_spelling:
        respell(folder / "config.json")


def scale(name: str, parameter: Any, *, tied: bool) -> tuple[float, float]:
    """Return the standard deviation and mean of a parameter, such that every parameter affects the logits."""
    if tied and "embed_tokens" in name:
        return 0.25, 0.0  # with a larger one, the model would repeat the latest token
    if "norm" in name:
        return 0.3, 1.0
    if name.endswith("bias"):
        return 0.3, 0.0
    if "embed_tokens" in name or "lm_head" in name:
        return 0.5, 0.0
    return 1.2 * parameter.shape[1] ** -0.5, 0.0


def respell(path: Path) -> None:
    """Rewrite the RoPE keys and the type as transformers 4 wrote them."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    write_json(path, config, indent=2)


def write_tokenizer(path: Path) -> None:
    """Write a byte-level tokenizer that is small enough for every tiny vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("Ġ", "t"),
        ("h", "e"),
        ("Ġt", "he"),
        ("i", "n"),
        ("e", "r"),
        ("Ġ", "a"),
        ("o", "n"),
        ("r", "e"),
    ]
    specials = ["<s>", "<unk>", "</s>"]
    words = [*specials, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    tokenizer.save(str(path), pretty=False)


# --- the reference ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """Return a greedy continuation: tokens, their logits ``[tokens, V]``, and the smallest lead."""

    tokens: list[int]
    logits: np.ndarray
    margin: float


def load_reference(folder: Path, **options: Any) -> Any:
    """Load the model in `folder` with transformers in float32, without end tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def generate(model: Any, prompt: Sequence[int], tokens: int) -> Run:
    import torch

    with torch.no_grad():
        result = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(result.logits).numpy()
    found = result.sequences[0, len(prompt) :].tolist()
    assert len(found) == tokens, f"expected {tokens} tokens, found {len(found)}"
    best = np.partition(logits, -2, axis=-1)
    return Run(tokens=found, logits=logits, margin=float((best[:, -1] - best[:, -2]).min()))


def uncached_logits(model: Any, sequence: Sequence[int]) -> np.ndarray:
    """Return logits ``[T, V]`` of one pass over the whole sequence."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(sequence)]), use_cache=False).logits[0].numpy()


def load_demo_reference() -> Any:
    from precast.exporter.sources import demo

    path = demo.fetch(demo.DEMO, demo.cache_folder() / "demo")
    return load_reference(path.parent, gguf_file=path.name)


# --- the demo model -----------------------------------------------------------------------------------------

DEMO_TOKENS = 24
DEMO_LENGTHS = (2, 63, 64, 65, 127, 128, 129, 511, 512, 513, 600, 1000)


def demo_candidates(encode: Any, render: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the prompts, each with alternatives for the case that an answer is close to a tie."""
    prompts = json.loads((HERE / "demo_prompts.json").read_text(encoding="utf-8"))
    for text in prompts["texts"]:
        # The alternatives to a text are the text with short additions.
        variants = [text, *(text + more for more in (" ", " so", " and"))]
        yield [{"text": t, "prompt_token_ids": encode(t)} for t in variants]
    for messages in prompts["chats"]:
        yield [{"messages": messages, "prompt_token_ids": render(messages)}]
    document = encode("\n\n".join(prompts["paragraphs"]))
    stream = list(itertools.islice(itertools.cycle(document), 4 * len(document)))
    for length in DEMO_LENGTHS:
        starts = range(7 * length % 100, 200)
        yield [{"prompt_token_ids": stream[s : s + length]} for s in starts]


def demo_tokenizer() -> tuple[Any, Any]:
    """Return ``encode`` and ``render`` of the tokenizer and chat template that transformers reads from the file."""
    from transformers import AutoTokenizer

    from precast.exporter.sources import demo

    path = demo.fetch(demo.DEMO, demo.cache_folder() / "demo")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def render(messages: Sequence[Mapping[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)

    return tokenizer.encode, render


def make_demo() -> None:
    from precast.exporter.sources.demo import DEMO as demo_file

    model = load_demo_reference()
    cases = []
    for candidates in demo_candidates(*demo_tokenizer()):
        for candidate in candidates:
            run = generate(model, candidate["prompt_token_ids"], DEMO_TOKENS)
            print(f"{len(candidate['prompt_token_ids'])} tokens: margin {run.margin:.2g}")
            if run.margin > MARGIN:
                cases.append({**candidate, "token_ids": run.tokens, "margin": round(run.margin, 5)})
                break
        else:
            raise SystemExit(f"every candidate comes close to a tie: {candidates[0]}")
    record = {
        "model": demo_file.member,
        "sha256": demo_file.sha256,
        "transformers": versions(),
        "cases": cases,
    }
    write_json(DEMO, record)


# --- writing and checking -----------------------------------------------------------------------------------


def versions() -> str:
    import torch
    import transformers

    return f"{transformers.__version__}, torch {torch.__version__}"


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write JSON with one case per line, so that diffs are readable."""
    if indent is None and isinstance(value, dict) and "cases" in value:
        lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in value["cases"])
        head = json.dumps({k: v for k, v in value.items() if k != "cases"}, ensure_ascii=False)
        path.write_text(f'{head[:-1]}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    else:
        path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def tiny_differences(folder: Path) -> list[str]:
    """Return the differences between a tiny checkpoint's files and transformers' current answers."""
    cases = json.loads((folder / "reference.json").read_text(encoding="utf-8"))["cases"]
    now = answer_tiny(folder, [case["prompt_token_ids"] for case in cases])
    found = [
        f"{folder.name}: {len(case['prompt_token_ids'])} tokens: {case['token_ids']} is now {tokens}"
        for case, tokens in zip(cases, now.tokens, strict=True)
        if case["token_ids"] != tokens
    ]
    with np.load(folder / "reference.npz") as arrays:
        for name in ("first", "last", "uncached"):
            if (off := float(np.abs(arrays[name] - getattr(now, name)).max())) > 5e-5:
                found.append(f"{folder.name}: logits {name!r} are off by {off:.2g}")
    if now.margin <= MARGIN:
        found.append(f"{folder.name}: the smallest margin is {now.margin:.2g}, expected more than {MARGIN}")
    return found


def demo_differences(model: Any, cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the differences between some of the demo model's recorded answers and transformers' current answers."""
    found = []
    for case in cases:
        run = generate(model, case["prompt_token_ids"], len(case["token_ids"]))
        if run.tokens != case["token_ids"]:
            found.append(f"{case.get('text')!r}: {case['token_ids']} is now {run.tokens}")
        if run.margin <= MARGIN:
            found.append(f"{case.get('text')!r}: the smallest margin is {run.margin:.2g}")
    return found


def check() -> list[str]:
    found = [line for tiny in tiny_checkpoints() for line in tiny_differences(TINY / tiny.name)]
    cases = json.loads(DEMO.read_text(encoding="utf-8"))["cases"]
    return found + demo_differences(load_demo_reference(), cases)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description="Write or check the reference files.")
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    parser.add_argument("--only", choices=("tiny", "demo"), help="write only these")
    options = parser.parse_args()
    if options.check:
        found = check()
        print("\n".join(found) or "the reference files are up to date")
        raise SystemExit(bool(found))
    if options.only != "demo":
        torch.set_num_threads(1)  # more threads are slower on such small matrices
        write_tokenizer(TINY / "tokenizer.json")
        for tiny in tiny_checkpoints():
            make_tiny(tiny)
    if options.only != "tiny":
        torch.set_num_threads(os.cpu_count() or 1)
        make_demo()


if __name__ == "__main__":
    main()
