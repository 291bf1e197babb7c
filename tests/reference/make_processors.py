"""Write processors.json: logits after transformers' logits processors, for tests where torch is missing.

Run by hand where torch is installed::

    python tests/reference/make_processors.py            # write everything again
    python tests/reference/make_processors.py --check    # compute everything again and compare
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parent / "processors.json"
V = 12
PROMPT = (3, 1, 4, 1, 5)
ANSWER = (9, 2, 1)
ENDS = (0, 7)
# The parameters of `SamplingParams` for each case. The processors run for the token after PROMPT and ANSWER.
CASES: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "bias": {"logit_bias": {"1": 2.5, "7": -100.0, "11": 100.0}},
    "repetition": {"repetition_penalty": 1.3},
    "repetition-below-1": {"repetition_penalty": 0.7},
    "bias-and-repetition": {"logit_bias": {"1": -4.0, "5": 3.0, "8": 1.0}, "repetition_penalty": 1.7},
    "ngram": {"no_repeat_ngram_size": 2},
    "ngram-1": {"no_repeat_ngram_size": 1},
    "bad-words": {"bad_words_ids": [[6], [2, 1, 8], [4, 11], [1, 10], [0]]},
    "min_length": {"min_length": 9},
    "min_length-reached": {"min_length": 8},
    "min_tokens": {"min_tokens": 4},
    "suppress": {"suppress_tokens": [2, 10]},
    "everything": {
        "logit_bias": {"3": 1.25, "6": -0.5},
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[8], [1, 6]],
        "min_tokens": 5,
        "suppress_tokens": [11],
    },
}


def logits() -> np.ndarray:
    """Return the logits before the processors, float32 [V]."""
    return (np.random.default_rng(3).standard_normal(V) * 4).astype(np.float32)


def scores(said: Mapping[str, Any]) -> list[float | None]:
    """Return the logits [V] after transformers' processors; None for each forbidden token."""
    import torch
    from transformers.generation import logits_process as process

    ends = torch.tensor(ENDS)
    makers = {
        "logit_bias": lambda value: process.SequenceBiasLogitsProcessor(
            [[[int(token)], bias] for token, bias in value.items()]
        ),
        "repetition_penalty": process.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": process.NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda value: process.NoBadWordsLogitsProcessor(value, ends),
        "min_length": lambda value: process.MinLengthLogitsProcessor(value, ends),
        "min_tokens": lambda value: process.MinNewTokensLengthLogitsProcessor(len(PROMPT), value, ends),
        "suppress_tokens": process.SuppressTokensLogitsProcessor,
    }
    assert said.keys() <= makers.keys()
    ids, found = torch.tensor([[*PROMPT, *ANSWER]]), torch.from_numpy(logits())[None]
    for name, make in makers.items():
        if name in said:
            found = make(said[name])(ids, found)
    return [None if score == -np.inf else score for score in found[0].tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    records = [{"name": name, "said": said, "scores": scores(said)} for name, said in CASES.items()]
    if not check:
        lines = ",\n".join(json.dumps(record) for record in records)
        FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    elif json.loads(FILE.read_text(encoding="utf-8")) != records:
        raise SystemExit(f"{FILE}: differs from the scores of transformers now")
    print(json.dumps({"cases": len(records), "checked": check}))


if __name__ == "__main__":
    main()
