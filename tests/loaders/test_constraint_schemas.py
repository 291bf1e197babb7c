"""Constraints on a sample of JSONSchemaBench: the instances that they allow, and answers from random logits."""

import json
import lzma
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.constraint_texts import ConstraintText, checked_constraint
from precast.loaders.generation.grammars import Grammars
from precast.loaders.generation.sampling import Sampler
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.text.tokenizer import Tokenizer

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

SAMPLE = Path(__file__).parent.parent / "schemas" / "sample.jsonl.xz"
VOCABULARY = 2_000
END = 0
LONGEST_ANSWER = 150

# The features that llguidance refuses, as named in its errors.
REFUSED = {
    '["uniqueItems"]': 9,
    "oneOf constraints are not supported": 7,
    '["propertyNames"]': 3,
    "Unknown format": 3,
    '["dependencies"]': 1,
    '["if", "then"]': 1,
    '["not"]': 1,
    "circular references with sibling keys": 1,
    "min/maxProperties only supported": 1,
}

Row = Mapping[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    with lzma.open(SAMPLE, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def tokenizer(rows: list[Row]) -> Tokenizer:
    """Return a byte-level tokenizer trained on the instances."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["</s>"],
        show_progress=False,
    )
    texts = (json.dumps(instance["data"]) for row in rows for instance in row["instances"])
    library.train_from_iterator(texts, trainer)
    return Tokenizer.from_json(
        library.to_str().encode(), chat_template=None, bos_token=None, eos_token="</s>"
    )


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCABULARY, [END])


@pytest.fixture(scope="module")
def refusals(rows: list[Row], grammars: Grammars) -> dict[str, str]:
    """Return the error text of each refused schema, by the schema's name."""
    found = {}
    for row in rows:
        try:
            grammars.start(text_of(row))
        except PrecastError as error:
            found[row["name"]] = str(error)
    return found


def text_of(row: Row) -> ConstraintText:
    return checked_constraint({"json_schema": row["schema"]})


def test_llguidance_refuses_few_and_names_the_reason(rows: list[Row], refusals: dict[str, str]) -> None:
    assert len(rows) == 420
    counted = Counter(next((words for words in REFUSED if words in text), text) for text in refusals.values())
    assert counted == REFUSED


def test_valid_instances_are_allowed_token_by_token_and_invalid_ones_are_not(
    rows: list[Row], refusals: dict[str, str], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    wrong, tried = [], Counter[bool]()
    for row in accepted(rows, refusals):
        for instance in row["instances"]:
            ids = [*tokenizer.encode(json.dumps(instance["data"], ensure_ascii=False)), END]
            tried[instance["valid"]] += 1
            if allows(grammars, text_of(row), ids) != instance["valid"]:
                wrong.append((row["name"], instance))
    assert not wrong
    assert tried[True] > 400
    assert tried[False] > 400


def test_random_logits_generate_valid_json(
    rows: list[Row], refusals: dict[str, str], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    bias = closing_bias(tokenizer)
    complete = 0
    for seed, row in enumerate(accepted(rows, refusals)):
        ids = random_answer(grammars, row["schema"], bias, seed)
        if ids[-1] == END:
            complete += 1
            validate(json.loads(tokenizer.decode(ids)), row["schema"])
        else:  # an answer that was cut must be the beginning of a valid one
            assert len(ids) == LONGEST_ANSWER
    assert complete > 300


def accepted(rows: list[Row], refusals: Mapping[str, str]) -> Iterator[Row]:
    return (row for row in rows if row["name"] not in refusals)


def allows(grammars: Grammars, text: ConstraintText, ids: list[int]) -> bool:
    constraint = grammars.start(text)
    for token in ids:
        if not np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[token]:
            return False
        constraint.accept(token)
    return True


def random_answer(grammars: Grammars, schema: Mapping[str, Any], bias: np.ndarray, seed: int) -> list[int]:
    params = SamplingParams(json_schema=schema, temperature=1.0, seed=seed)
    assert params.constraint is not None
    sampler = Sampler(params, [], VOCABULARY, [END], constraint=grammars.start(params.constraint))
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < LONGEST_ANSWER and (not ids or ids[-1] != END):
        ids.append(sampler.sample(rng.standard_normal(VOCABULARY, np.float32) + bias))
    return ids


def closing_bias(tokenizer: Tokenizer) -> np.ndarray:
    """Return a bias towards tokens that end strings, arrays, objects and answers, because random answers rarely end."""
    bias = np.zeros(VOCABULARY, np.float32)
    for token in range(VOCABULARY):
        text = tokenizer.token_text(token)
        bias[token] = 8 * (token == END) + 5 * text.startswith(('"', "]", "}")) - 5 * text.isspace()
    return bias


def validate(instance: object, schema: Mapping[str, Any]) -> None:
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator(schema).validate(instance)
