"""Write ``architectures/``: the answers of transformers with torch for tiny checkpoints of every architecture.

Run by hand where torch is installed::

    python tests/reference/make_architectures.py                 # write everything again
    python tests/reference/make_architectures.py gemma2 phi3     # write these architectures again
    python tests/reference/make_architectures.py --check         # compute everything again and compare

``architectures.json`` lists the checkpoints. Instead of weights, a record contains a seed, and the names and shapes of
the tensors as ``save_pretrained`` writes them. From these, `write_checkpoint` recreates the same files without torch,
so the tests also run where torch is not installed. All computations are in float32.

In every step, the largest logit leads by more than `MARGIN`, so that another order of summation cannot change an
answer. The script tries seeds until it finds one for which this is true.
"""

import argparse
import hashlib
import itertools
import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import make_reference
import numpy as np

HERE = Path(__file__).parent
RECORDS = HERE / "architectures"
MUTATIONS = HERE / "mutations.json"

MARGIN = 1e-3
# Some prompts exceed the windows.
LENGTHS = (3, 8, 21, 32)
BUCKETS, CAPACITY, TOKENS = (4, 8), 96, 64
# Only every n-th logit, and every n-th position of a long pass, is stored, to keep the files small.
STRIDE, POSITIONS = 6, 8
# The minimum number of distinct tokens in an answer. A broken model might give the same answer with fewer.
DIFFERENT = 8
PROMPTS = 12  # candidates for each set of weights

TOKEN_IDS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
SHAPE = {"intermediate_size": 52, "num_hidden_layers": 3, "max_position_embeddings": 256}

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TinyCheckpoint:
    """The description of a checkpoint to make.

    Attributes:
        config: config keys that differ from `SHAPE`.
        dtype: type of the stored weights.
        shards: number of weight files.
        lengths: lengths of the prompts.
        old_spelling: True if config.json spells RoPE and layers as transformers 4 did.
        with_head: True if the file contains an output head although the head is tied.
        with_buffers: True if the file contains the buffers of old checkpoints.
        bare: True if tensor names lack the model's prefix ("h.0.…"), as in the original GPT-2.
    """

    name: str
    model_type: str
    config: Mapping[str, Any]
    dtype: str = "float32"
    shards: int = 1
    lengths: Sequence[int] = field(default=LENGTHS)
    old_spelling: bool = False
    with_head: bool = False
    with_buffers: bool = False
    bare: bool = False


def tiny_checkpoints() -> list[TinyCheckpoint]:
    """Return the checkpoints in ``architectures.json``."""
    return [
        TinyCheckpoint(**row) for row in json.loads((HERE / "architectures.json").read_text(encoding="utf-8"))
    ]


# --- checkpoints, without torch -----------------------------------------------------------------------------


def read_records() -> dict[str, Record]:
    """Return all records by name."""
    files = sorted(RECORDS.glob("*.json"))
    return {r["name"]: r for f in files for r in json.loads(f.read_text(encoding="utf-8"))["checkpoints"]}


def read_logits(record: Record) -> dict[str, np.ndarray]:
    """Return every `STRIDE`-th of transformers' logits.

    ``first`` and ``last`` ``[cases, …]`` are the logits for the first and the last token of each answer. ``uncached``
    ``[…, …]`` are the logits at every `POSITIONS`-th position of the last prompt and its answer, from one pass.
    """
    with np.load(RECORDS / f"{record['config']['model_type']}.npz") as arrays:
        return {kind: arrays[f"{record['name']}.{kind}"] for kind in ("first", "last", "uncached")}


def subject(model_type: str) -> Record:
    """Return the checkpoint whose config keys are changed: the architecture's last one without buffers."""
    records = [r for r in read_records().values() if r["config"]["model_type"] == model_type]
    return [r for r in records if not r["buffers"]][-1]


def read_mutations(name: str) -> list[dict[str, Any]]:
    """Return the recorded changes of a checkpoint's config, with transformers' results (see ``make_mutations.py``)."""
    rows = json.loads(MUTATIONS.read_text(encoding="utf-8"))
    return [row for row in rows if row["name"] == name]


def make_tensors(record: Record) -> dict[str, np.ndarray]:
    """Make a checkpoint's tensors, with the same bits on every machine."""
    import ml_dtypes  # noqa: F401 - NumPy then knows bfloat16

    kind = np.dtype(record["dtype"])
    arrays = {
        name: _values(record, name, tuple(shape)).astype(kind) for name, shape in record["tensors"].items()
    }
    copies = {name: arrays[of] for name, of in record["copies"].items()}
    return arrays | copies | {name: np.zeros(shape, kind) for name, shape in record["buffers"].items()}


def _values(record: Record, name: str, shape: tuple[int, ...]) -> np.ndarray:
    # The numbers are uniform, because other distributions need functions whose rounding differs between machines.
    random = np.random.RandomState(zlib.crc32(f"{record['seed']} {name}".encode()))
    spread, centre = _scale(record, name, shape)
    return (2 * random.random_sample(shape) - 1) * (spread * 3**0.5) + centre


def _scale(record: Record, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the standard deviation and mean of a tensor, such that every tensor affects the logits."""
    config = record["config"]
    gemma = config["model_type"].startswith("gemma")
    tied = config.get("tie_word_embeddings", True)
    # Large scaled embeddings would dominate the layers, so the model would repeat the latest token.
    scale = config["hidden_size"] ** 0.5 if gemma else max(config.get("embedding_multiplier", 1.0), 1.0)
    if name.endswith("bias"):
        return 0.15, 0.0  # with larger values, the answer would not depend on the prompt
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.3, 0.7 if gemma else 1.7
    if "norm" in name or "ln_" in name:
        mean = scale if name == "model.norm.weight" and tied else 1.0
        return 0.3, mean - 1.0 if gemma else mean
    if "embed_tokens" in name or "wte" in name or "wpe" in name:
        return (0.25 if tied else 0.5) / scale, 0.0
    if "lm_head" in name:
        return 0.5, 0.0
    inputs = shape[0] if ".c_" in name else shape[-1]  # GPT-2 has [in, out]
    return (2.5 if name.endswith(".gate.weight") else 1.2) * inputs**-0.5, 0.0


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 of the tensors' names and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].tobytes())
    return found.hexdigest()


def write_checkpoint(folder: Path, record: Record, config: Mapping[str, Any] | None = None) -> None:
    """Write a record's checkpoint as a Hugging Face folder; `config` replaces the record's config."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = make_tensors(record)
    make_reference.write_json(
        folder / "config.json", record["config"] if config is None else config, indent=2
    )
    (folder / "tokenizer.json").write_bytes((make_reference.TINY / "tokenizer.json").read_bytes())
    if (count := record["shards"]) == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    places = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(places.values())):
        part = {n: t for n, t in tensors.items() if places[n] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    make_reference.write_json(folder / "model.safetensors.index.json", index, indent=2)


# --- records, with torch ------------------------------------------------------------------------------------


def make_record(tiny: TinyCheckpoint, seed: int) -> dict[str, Any]:
    """Return the record of a checkpoint, without answers."""
    config, shapes = _skeleton(tiny)
    if tiny.bare:
        shapes = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    if tiny.old_spelling:
        config = respell(config)
    return {
        "name": tiny.name,
        "seed": seed,
        "dtype": tiny.dtype,
        "shards": tiny.shards,
        "config": config,
        "tensors": shapes,
        "copies": {"lm_head.weight": "model.embed_tokens.weight"} if tiny.with_head else {},
        "buffers": _buffers(tiny, config) if tiny.with_buffers else {},
    }


def _skeleton(tiny: TinyCheckpoint) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return config.json and the shapes of all tensors, as transformers saves them."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = TOKEN_IDS | ({} if tiny.model_type == "gpt2" else SHAPE)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(tiny.model_type, **(shape | dict(tiny.config)))
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    return config | {"dtype": tiny.dtype}, shapes


def respell(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite the keys of RoPE, layers and type as transformers 4 wrote them."""
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("layer_types").index("full_attention") + 1
        rope = rope["full_attention"]
    kind = rope.pop("rope_type")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    rope.pop("partial_rotary_factor", None)
    if "original_max_position_embeddings" in config:
        rope.pop("original_max_position_embeddings", None)
    spelt = "type" if kind in ("yarn", "longrope") else "rope_type"
    config["rope_scaling"] = None if kind == "default" else {spelt: kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    return config | {"transformers_version": "4.46.0"}


def _buffers(tiny: TinyCheckpoint, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of the buffers. The buffers contain zeros, so that a reader that uses them is detected."""
    if tiny.model_type == "gpt2":
        n = config["n_positions"]
        return {f"h.{i}.attn.bias": [1, 1, n, n] for i in range(config["n_layer"])}
    pairs = config["head_dim"] // 2
    return {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": [pairs] for i in range(config["num_hidden_layers"])
    }


@dataclass(frozen=True, kw_only=True)
class Answers:
    """transformers' answers to prompts, the smallest lead of a token, and logits as in `read_logits`."""

    cases: list[dict[str, Any]]
    margin: float
    logits: dict[str, np.ndarray]


def load_reference(record: Record, config: Mapping[str, Any] | None = None) -> Any:
    """Load the model with transformers and eager attention, because its other attention kernels omit soft caps."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), record, config)
        return make_reference.load_reference(Path(folder), attn_implementation="eager")


def answer(record: Record, prompts: Sequence[Iterator[list[int]]]) -> Answers | None:
    """Answer the first prompt of each length that is far from ties; return None if a length has none."""
    model = load_reference(record)
    found = [_answer(model, candidates) for candidates in prompts]
    cases = [case for case in found if case is not None]
    if len(cases) < len(found):
        return None
    sequence = [*cases[-1][0], *cases[-1][1].tokens]
    return Answers(
        cases=[{"prompt_token_ids": prompt, "token_ids": run.tokens} for prompt, run in cases],
        margin=min(run.margin for _, run in cases),
        logits={
            "first": np.stack([run.logits[0, ::STRIDE] for _, run in cases]),
            "last": np.stack([run.logits[-1, ::STRIDE] for _, run in cases]),
            "uncached": make_reference.uncached_logits(model, sequence)[::POSITIONS, ::STRIDE],
        },
    )


def _answer(model: Any, candidates: Iterator[list[int]]) -> tuple[list[int], Any] | None:
    for prompt in candidates:
        run = make_reference.generate(model, prompt, TOKENS)
        if run.margin > MARGIN and len(set(run.tokens)) >= DIFFERENT:
            return prompt, run
    return None


def candidates(seed: int, length: int) -> Iterator[list[int]]:
    random = np.random.RandomState(1000 * seed + length)
    for _ in range(PROMPTS):
        yield random.randint(3, TOKEN_IDS["vocab_size"], length).tolist()


def make(tiny: TinyCheckpoint) -> tuple[dict[str, Any], Answers]:
    """Return a record with answers, for the first seed that has an answer for every length."""
    for seed in itertools.count(1):
        record = make_record(tiny, seed)
        answers = answer(record, [candidates(seed, length) for length in tiny.lengths])
        if answers is not None:
            break
    print(f"{tiny.name}: seed {seed}, margin {answers.margin:.2g}")
    facts = {"sha256": digest(make_tensors(record)), "margin": answers.margin, "cases": answers.cases}
    return record | facts, answers


def write_architecture(model_type: str) -> None:
    made = [make(tiny) for tiny in tiny_checkpoints() if tiny.model_type == model_type]
    lines = ",\n".join(json.dumps(record) for record, _ in made)
    head = json.dumps({"transformers": make_reference.versions()})
    path = RECORDS / f"{model_type}.json"
    path.write_text(f'{head[:-1]}, "checkpoints": [\n{lines}\n]}}\n', encoding="utf-8")
    arrays = {f"{record['name']}.{kind}": a for record, answers in made for kind, a in answers.logits.items()}
    np.savez_compressed(RECORDS / f"{model_type}.npz", **arrays)


def differences(record: Record) -> list[str]:
    """Return the differences between a record and transformers' current answers."""
    now = answer(record, [iter([case["prompt_token_ids"]]) for case in record["cases"]])
    name = record["name"]
    if now is None:
        return [f"{name}: an answer is close to a tie, or monotonous"]
    found = [f"{name}: {a} is now {b}" for a, b in zip(record["cases"], now.cases, strict=True) if a != b]
    for kind, expected in read_logits(record).items():
        if (off := float(np.abs(expected - now.logits[kind]).max())) > 1e-4:
            found.append(f"{name}: logits {kind!r} are off by {off:.2g}")
    return found


def main() -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    parser = argparse.ArgumentParser(description="Write or check the reference of the architectures.")
    parser.add_argument("model_types", nargs="*", help="only these")
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower on such small matrices
    wanted = options.model_types or list(dict.fromkeys(tiny.model_type for tiny in tiny_checkpoints()))
    if options.check:
        records = [r for r in read_records().values() if r["config"]["model_type"] in wanted]
        found = [line for record in records for line in differences(record)]
        print("\n".join(found) or "the reference files are up to date")
        raise SystemExit(bool(found))
    RECORDS.mkdir(exist_ok=True)
    for model_type in wanted:
        write_architecture(model_type)


if __name__ == "__main__":
    main()
