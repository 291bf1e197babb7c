"""The depth of the JSON that a schema describes, and the indentation that an answer may have for this reason."""

import json
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest

from precast.loaders.generation import schema_levels
from precast.loaders.generation.grammars import Grammars
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.generation.schema_levels import levels

INTEGER = {"type": "integer"}
LIST = {"type": "array", "items": INTEGER}
PAIR = {"properties": {"a": INTEGER, "b": LIST}}


@pytest.mark.parametrize(
    ("schema", "depth"),
    [
        ({}, 0),
        (INTEGER, 0),
        ({"enum": [1, "a"]}, 0),
        ({"type": "object"}, 1),
        ({"type": ["null", "array"]}, 1),
        ({"items": True}, 1),
        (LIST, 1),
        (PAIR, 2),
        ({"type": "array", "items": PAIR}, 3),
        ({"type": "array", "prefixItems": [INTEGER, PAIR]}, 3),
        ({"type": "object", "additionalProperties": LIST}, 2),
        ({"type": "object", "patternProperties": {"^a": PAIR}}, 3),
        ({"anyOf": [INTEGER, PAIR, LIST]}, 2),
        ({"allOf": [{"oneOf": [LIST]}]}, 1),
        ({"properties": {"anyOf": LIST, "$ref": INTEGER}}, 2),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": PAIR}}, 2),
        ({"properties": {"x": {"$ref": "#/$defs/p"}, "y": {"$ref": "#/$defs/p"}}, "$defs": {"p": PAIR}}, 3),
        ({"$ref": "#/$defs/missing"}, 0),
        ({"$ref": "elsewhere"}, 0),
        ({"type": "array", "items": {"$ref": "#"}}, 1),
        ({"$ref": "0/$defs/a", "$defs": {"a": PAIR}}, 0),
        ({"const": {"a": [1, [2]], "b": 1}}, 3),
        ({"enum": [1, [], [{"a": 1}]]}, 2),
        ({"properties": {"a": {"type": "array", "const": [[[1]]]}}}, 4),
        (
            {"$ref": "#/$defs/t", "$defs": {"t": {"properties": {"next": {"$ref": "#/$defs/t"}, "a": LIST}}}},
            2,
        ),
    ],
)
def test_the_levels_that_a_schema_spells_out(schema: dict[str, Any], depth: int) -> None:
    assert levels(schema) == depth


def nested(depth: int, schema: Any) -> Any:
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_the_order_of_keys_does_not_change_the_levels_of_a_recursive_schema() -> None:
    a, b = {"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}
    root, first = {"x": a, "y": nested(2, b)}, {"b": b, "deep": nested(7, INTEGER)}
    for outer in permutations(root.items()):
        for inner in permutations(first.items()):
            defs = {"A": {"properties": dict(inner)}, "B": {"properties": {"a": a}}}
            assert levels({"properties": dict(outer), "$defs": defs}) == 12


def test_a_recursive_const_counts_after_the_parts_of_the_cycle() -> None:
    assert levels({"properties": {"a": {"anyOf": [{"$ref": "#"}, {"const": [[1]]}]}}}) == 3


@pytest.mark.parametrize("refers", ["{}/$defs/X", "#{}/$defs/X", "#/$defs/X", "#/{}/X"])
def test_a_part_is_read_once_however_many_references_lead_to_it(
    refers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    children = schema_levels._children
    monkeypatch.setattr(
        schema_levels, "_children", lambda part, keys: read.append(id(part)) or children(part, keys)
    )
    shared = {"properties": {f"a{i}": {} for i in range(800)}}
    names = [str(i) for i in range(2000)]
    schema = {
        "anyOf": [{"$ref": refers.format(name)} for name in names],
        "$defs": {"X": shared},
        **{name: {"X": shared} for name in names},
    }
    assert levels(schema) in (0, 1)
    assert len(read) <= 2 * (1 + 2000 + 801)


def test_many_references_take_linear_time_and_little_stack() -> None:
    """Without a record of the references that were followed, this would take for ever."""
    names = [f"n{i}" for i in range(3000)]
    defs = {
        a: {"properties": {"l": {"$ref": f"#/$defs/{b}"}, "r": {"$ref": f"#/$defs/{b}"}}}
        for a, b in pairwise(names)
    }
    assert levels({"$ref": "#/$defs/n0", "$defs": defs | {names[-1]: LIST}}) == 3000


@pytest.mark.parametrize("depth", [1, 8, 9, 14])
@pytest.mark.parametrize("indent", [2, 4, "\t"])
def test_json_may_be_indented_at_every_level_of_its_schema(
    scripted_model: Any, depth: int, indent: int | str
) -> None:
    pytest.importorskip("llguidance")
    tokenizer = scripted_model("", "").tokenizer
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [1])
    schema: dict[str, Any] = INTEGER
    value: Any = 7
    for level in range(depth):
        kinds = {"type": "array", "items": schema}, {"type": "object", "properties": {"a": schema}}
        schema, value = kinds[level % 2], [value] if level % 2 == 0 else {"a": value}

    def accepts(text: str) -> bool:
        constraint = SamplingParams(json_schema=schema).constraint
        assert constraint is not None
        answer = grammars.start(constraint)
        for token in tokenizer.encode(text, add_special_tokens=False):
            if not answer.mask()[token // 32] >> np.uint32(token % 32) & 1:
                return False
            answer.accept(token)
        return True

    text = json.dumps(value, indent=indent)
    space, width = ("\t", 1) if indent == "\t" else (" ", 4)
    most = max(depth, 8) * width
    assert accepts(text)
    assert accepts(text[:1] + "\n" + most * space)
    assert not accepts(text[:1] + "\n" + (most + 1) * space)
