"""``golden.json``: strict parsing, and rejection of answers that the model cannot give."""

import json

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.golden import parse_golden
from precast.loaders.locate import read_manifest


@pytest.fixture(scope="module")
def manifest(tiny_artifact):
    return read_manifest(tiny_artifact)


@pytest.fixture
def value(tiny_artifact):
    return json.loads((tiny_artifact / "golden.json").read_text())


def parse(value, manifest):
    return parse_golden(json.dumps(value).encode(), manifest, "g")


def test_an_export_s_golden_answers_are_read(value, manifest, tiny_artifact):
    golden = parse(value, manifest)
    assert len(golden.greedy) == len(value["greedy"]) > 3
    for answer in golden.greedy:
        first = answer.first_logits
        assert len(first.token_ids) == len(set(first.token_ids)) == len(first.values) == 8
        assert list(first.values) == sorted(first.values, reverse=True)
        assert 0 < first.tolerance < 0.01
        # Without a tie, the greedy token is the most likely one.
        assert answer.token_ids[:1] in ((), first.token_ids[:1])
    assert (tiny_artifact / "golden.json").stat().st_size < 4000


def test_logits_match_the_reference(value, manifest, reference):
    for answer in parse(value, manifest).greedy:
        row = reference(answer.prompt_token_ids)[-1]
        found = row[list(answer.first_logits.token_ids)]
        assert abs(found - answer.first_logits.values).max() < answer.first_logits.tolerance
        assert abs(answer.first_logits.tolerance / row.std() - 1e-3) < 1e-5


@pytest.mark.parametrize(
    ("path", "new", "text"),
    [
        (["greedy"], [], "g: expected at least one answer, found none; export the model again."),
        (["more"], 1, "g: key 'more' is not known to this format version;"),
        (["greedy", 0, "more"], 1, "g: greedy[0]: key 'more' is not known"),
        (["greedy", 0, "first_logits", "more"], 1, "g: greedy[0].first_logits: key 'more' is not known"),
        (
            ["greedy", 0, "first_logits"],
            None,
            "g: greedy[0].first_logits: expected an object, found None; export the model again.",
        ),
        (
            ["greedy", 0, "prompt_token_ids"],
            [],
            "greedy[0]: expected a prompt of at least one token, found none;",
        ),
        (["greedy", 1, "prompt_token_ids"], [5] * 60, "answer of at most 64 tokens together, found 76;"),
        (
            ["greedy", 0, "prompt_token_ids"],
            [5] * 64,
            "greedy[0]: expected a prompt shorter than the context of 64 tokens, found 64;",
        ),
        (
            ["greedy", 0, "prompt_token_ids"],
            [320],
            "greedy[0]: expected token ids below 320, found a larger one;",
        ),
        (["greedy", 0, "token_ids"], [320], "greedy[0]: expected token ids below 320, found a larger one;"),
        (
            ["greedy", 0, "token_ids"],
            [-1],
            "expected a whole number from 0 to 2^63 - 1, found -1; export the model again.",
        ),
        (["greedy", 0, "first_logits", "token_ids"], [400], "expected a logit for each token"),
        (["greedy", 0, "first_logits", "values"], [1.0], "expected a logit for each token, found 1 for 8;"),
        (
            ["greedy", 0, "first_logits", "tolerance"],
            "x",
            "tolerance: expected a number, found 'x'; export the model again.",
        ),
    ],
)
def test_invalid_values_are_named(value, manifest, path, new, text):
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    if path[-1] == "token_ids" and "first_logits" in path:
        text = "greedy[0]: expected token ids below 320, found a larger one;"
    with pytest.raises(PrecastError) as raised:
        parse(value, manifest)
    assert text in str(raised.value)
