"""Schemas that double at each level when llguidance merges their parts are refused; ordinary schemas are not."""

from typing import Any

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.generation.schema_merges import merged_size

ARRAYS: Any = [{}, {"type": "array"}]


def nested(levels: int, **keys: Any) -> dict[str, Any]:
    """Return a schema that contains itself as `items`, with further keys at each level."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema, **keys}
    return schema


def referring(levels: int) -> dict[str, Any]:
    parts: dict[str, Any] = {
        f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}", "anyOf": ARRAYS}}
        for i in range(levels)
    }
    return {"$ref": "#/$defs/a0", "$defs": parts | {f"a{levels}": {"type": "array"}}}


def chained(references: Any, levels: int = 40) -> dict[str, Any]:
    """Return parts that double at each level; `references` makes the reference to a part from its number."""
    parts = {
        f"a{i}": {"$anchor": f"a{i}", "type": "array", "items": {"$ref": references(i + 1), "anyOf": ARRAYS}}
        for i in range(levels)
    }
    last = {"$anchor": f"a{levels}", "type": "array"}
    listed = [{**part, "$anchor": f"b{i}"} for i, part in enumerate([*parts.values(), last])]
    defined = {**parts, f"a{levels}": last, "list": {"anyOf": listed}}
    return {"$id": "http://a/b", "$ref": references(0), "$defs": defined}


def product(levels: int) -> dict[str, Any]:
    return {"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": 99 + i}]} for i in range(levels)]}


@pytest.mark.parametrize(
    "schema",
    [nested(60, anyOf=ARRAYS), nested(60, oneOf=ARRAYS), referring(40), product(30), referring(1000)],
    ids=["anyOf", "oneOf", "references", "allOf", "long"],
)
def test_fault_15_a_schema_that_doubles_at_each_level(schema) -> None:
    with pytest.raises(PrecastError) as caught:
        SamplingParams(json_schema=schema)
    assert str(caught.value).startswith("Sampling parameters: json_schema: expected ")


@pytest.mark.parametrize(
    "references",
    [
        lambda i: f"#/$defs/%61{i}",
        lambda i: f"#a{i}",
        lambda i: f"http://a/b#/$defs/a{i}",
        lambda i: f"b#/$defs/a{i}",
        lambda i: f"#/$defs/list/anyOf/{i}",
    ],
    ids=["escaped", "anchor", "absolute", "relative", "list"],
)
def test_fault_15_every_form_of_reference_is_followed(references) -> None:
    with pytest.raises(PrecastError, match="objects in a schema after merging"):
        SamplingParams(json_schema=chained(references))


def test_a_part_with_an_identifier_of_its_own() -> None:
    """The reference leads to the inner part `a`, although the root has another `a`."""
    inner = {"$id": "http://a/c", "$ref": "#/$defs/a", "minItems": 1, "$defs": {"a": nested(9)}}
    schema = {"items": inner, "$defs": {"a": {}}}
    assert merged_size(schema) > 20_000
    assert merged_size(schema | {"items": {**inner, "$id": None}}) < 20


def test_references_through_lists_are_accepted() -> None:
    schema = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#/anyOf/0", "minLength": 1}}]
    }
    SamplingParams(json_schema=schema)
    assert merged_size(schema) < 10


@pytest.mark.parametrize(
    ("schema", "size"),
    [
        (nested(60), 61),
        ({"anyOf": [nested(3), nested(4)]}, 10),
        (nested(1, anyOf=ARRAYS), 8),
        (nested(2, anyOf=ARRAYS), 22),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}},
            },
            5,
        ),
        (product(3), 8 * 10),
    ],
)
def test_sizes(schema, size) -> None:
    assert merged_size(schema) == size


def test_recursive_schemas_are_accepted() -> None:
    node = {
        "type": "object",
        "properties": {"next": {"$ref": "#", "description": "the next node"}, "value": {"type": "integer"}},
        "anyOf": [{"required": ["next"]}, {"required": ["value"]}],
    }
    SamplingParams(json_schema=node)
    assert merged_size(node) < 40
