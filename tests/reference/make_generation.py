"""Write generation.json: the answers of transformers' generate() for settings of generation_config.json, in float32.

Run by hand where torch is installed::

    python tests/reference/make_generation.py            # write everything again
    python tests/reference/make_generation.py --check    # compute everything again and compare

The model is the tiny checkpoint `MODEL`. In every step, the largest logit leads by more than `MARGIN`, so that another
order of summation cannot change an answer.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = HERE / "tiny" / "llama-tied-default"
FILE = HERE / "generation.json"
MARGIN = 1e-3

PROMPT = (101, 197, 110, 101, 197, 69)
TOKENS = 16
# The first tokens of the greedy answer to PROMPT. Most cases forbid these tokens, or end at one of them.
GREEDY = "greedy"


def cases(greedy: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return the settings of each case by name; the case `greedy` has no settings."""
    first, second, third = greedy[:3]
    ends = {"eos_token_id": first}
    return {
        GREEDY: {},
        "penalty": {"repetition_penalty": 1.5},
        "penalty-below-1": {"repetition_penalty": 0.7},
        "sampling-keys-without-do_sample": {"temperature": 0.2, "top_p": 0.5, "top_k": 3, "typical_p": 0.3},
        "do_sample-false": {"do_sample": False, "temperature": 0.2, "repetition_penalty": 1.2},
        "suppress": {"suppress_tokens": [first, third, *range(200, 331)]},
        "begin_suppress": {"begin_suppress_tokens": [first, second]},
        "bad-words": {"bad_words_ids": [[second], [third]]},
        "bad-sequences": {"bad_words_ids": [[first, second], [*PROMPT[-2:], first], [7, third], [7] * 50]},
        "bad-end": {"bad_words_ids": [[first], [second]], "eos_token_id": first},
        "ngram-1": {"no_repeat_ngram_size": 1},
        "ngram-2": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.5},
        "ngram-3": {"no_repeat_ngram_size": 3, "repetition_penalty": 0.5},
        "end": {**ends},
        "min_new_tokens": {**ends, "min_new_tokens": 7},
        "min_length": {**ends, "min_length": len(PROMPT) + 3},
        "min_length-in-the-prompt": {**ends, "min_length": 3},
        "both-minima": {**ends, "min_new_tokens": 2, "min_length": 20},
        "max_length": {"max_length": len(PROMPT) + 5, "max_new_tokens": None},
        "both-maxima": {"max_length": 8, "max_new_tokens": 11},
        "everything": {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "bad_words_ids": [[second], [third, 4]],
            "suppress_tokens": [first, 5, 6],
            "begin_suppress_tokens": [7, 8],
            "min_new_tokens": 5,
        },
    }


def settings(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of generation_config.json: those of the case, a limit, and an end token that never occurs."""
    return {"max_new_tokens": TOKENS, "eos_token_id": 330, **said}


def write_checkpoint(folder: Path, said: Mapping[str, Any], *, in_config: bool) -> None:
    """Write the checkpoint, with the settings in generation_config.json or, if `in_config`, in config.json."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("generation_config.json", "reference.*"))
    shutil.copy(HERE / "tiny" / "tokenizer.json", folder)
    if in_config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings(said)}))
    else:
        (folder / "generation_config.json").write_text(json.dumps(settings(said)))


def answer(folder: Path) -> tuple[list[int], float]:
    """Return transformers' answer, and the smallest lead of a chosen token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        found = model.generate(ids, pad_token_id=0, output_scores=True, return_dict_in_generate=True)
    leads = [float(s[0].topk(2).values.diff().abs()) for s in found.scores]
    return found.sequences[0, len(PROMPT) :].tolist(), min(leads)


def computed() -> list[dict[str, Any]]:
    """Return every case with its answer."""
    greedy: list[int] = []
    records = []
    with tempfile.TemporaryDirectory() as work:
        for in_config in (False, True):
            for name in cases(greedy or [0, 0, 0]):
                said = cases(greedy or [0, 0, 0])[name]
                folder = Path(work) / f"{name}-{in_config}"
                write_checkpoint(folder, said, in_config=in_config)
                tokens, lead = answer(folder)
                if lead <= MARGIN:
                    raise SystemExit(f"{name}: the best token leads by only {lead}; choose another prompt")
                greedy = greedy or tokens
                records.append({"name": name, "in_config": in_config, "said": said, "tokens": tokens})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    records = computed()
    if not check:
        lines = ",\n".join(json.dumps(record) for record in records)
        FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    elif json.loads(FILE.read_text(encoding="utf-8")) != records:
        raise SystemExit(f"{FILE}: differs from the answers of transformers now")
    print(json.dumps({"cases": len(records), "checked": check}))


if __name__ == "__main__":
    main()
