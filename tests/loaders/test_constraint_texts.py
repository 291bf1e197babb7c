"""The texts of constraints in the sampling parameters: their storage, and the refusal of invalid texts."""

from dataclasses import replace
from typing import Any

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.constraint_texts import ConstraintText
from precast.loaders.generation.sampling_params import SamplingParams


def test_parameters_are_stored_as_immutable_text() -> None:
    params = SamplingParams(json_schema={"type": "object", "properties": {"b": {}, "a": {}}})
    assert params.json_schema == '{"type":"object","properties":{"b":{},"a":{}}}'
    text = ConstraintText("json_schema", params.json_schema)
    assert replace(params, seed=1).constraint == params.constraint == text
    assert SamplingParams(choice=["a", "b", "a"]).constraint == ConstraintText("choice", ("a", "b"))
    assert SamplingParams().constraint is None


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"regex": "a", "choice": ["a"]},
            "regex and choice cannot be combined; give one of them, or a grammar that covers both.",
        ),
        (
            {"regex": "a", "ignore_eos": True},
            "ignore_eos must be false with regex, because only an end token can follow a complete answer.",
        ),
        ({"regex": ""}, "regex must be a non-empty string, found ''."),
        ({"grammar": b"x"}, "grammar must be a non-empty string, found b'x'."),
        ({"choice": "yes"}, "choice must be a list of non-empty strings, found 'yes'."),
        ({"choice": ["a", ""]}, "choice must be a list of non-empty strings, found ['a', '']."),
        (
            {"choice": ["\ud800"]},
            "choice must be valid Unicode, found the lone surrogate '\\ud800'; remove it.",
        ),
        (
            {"regex": "a" * 10_001},
            "regex must have at most 10,000 characters, found 10,001; shorten it.",
        ),
        (
            {"grammar": "&" * 13},
            (
                "grammar must contain & at most 12 times, found 13; use fewer intersections, and write & inside a"
                " schema as \\u0026."
            ),
        ),
        (  # it looks like a schema, but consists of two regular expressions and an intersection
            {"grammar": 'start: T\nT: /[%json {"a":"]/ ' + "& /b/ " * 13 + '& /["}]/'},
            (
                "grammar must contain & at most 12 times, found 14; use fewer intersections, and write & inside a"
                " schema as \\u0026."
            ),
        ),
        (
            {"grammar": 'start: %json {"multipleOf": 1e9}'},
            (
                "grammar: without decimal points, multipleOf must be at most 1,000,000; use a number with fewer"
                " digits than 1000000000.0."
            ),
        ),
        (
            {"json_schema": "[]"},
            "json_schema must be a JSON object, given as a mapping or a string, found '[]'.",
        ),
        (
            {"json_schema": "{"},
            (
                "json_schema is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2"
                " (char 1); correct it."
            ),
        ),
        (
            {"json_schema": '{"a": 1, "a": 2}'},
            'json_schema is not valid JSON: an object has the key "a" twice; correct it.',
        ),
        (
            {"json_schema": '{"const": NaN}'},
            "json_schema is not valid JSON: NaN is not a JSON number; correct it.",
        ),
        (
            {"json_schema": {"const": {1, 2}}},
            "json_schema is not valid JSON: Object of type set is not JSON serializable; correct it.",
        ),
        (
            {"json_schema": deep(101)},
            "json_schema must be nested at most 100 levels deep; move parts to $defs.",
        ),
        (
            {"json_schema": deep(900)},
            "json_schema must be nested at most 100 levels deep; move parts to $defs.",
        ),
        (
            {"json_schema": '{"items":' * 90_000},
            "json_schema must have at most 100,000 characters, found 810,000; shorten it.",
        ),
        (
            {"json_schema": {"allOf": [{"pattern": str(i)} for i in range(13)]}},
            (
                "json_schema: expected at most 12 patterns and formats in a schema with allOf, or with $ref, anyOf or"
                " oneOf beside other keys, found 13; use fewer."
            ),
        ),
        (
            {"json_schema": {"pattern": "a" * 10_001}},
            "json_schema: a pattern must have at most 10,000 characters, found 10,001; shorten it.",
        ),
        (
            {"json_schema": {"properties": {"a": {"multipleOf": 5}, "b": {"multipleOf": 0.1234567}}}},
            (
                "json_schema: without decimal points, multipleOf must be at most 1,000,000; use a number with fewer"
                " digits than 0.1234567."
            ),
        ),
        (
            {"json_schema": {"allOf": [{"multipleOf": 1009}, {"multipleOf": 0.25}, {"multipleOf": 3}]}},
            (
                "json_schema: without decimal points, the product of all multipleOf values must be at most 1,000,000;"
                " use a number with fewer digits than 1009."
            ),
        ),
        (
            {"json_schema": {"multipleOf": 2**31}},
            (
                "json_schema: without decimal points, multipleOf must be at most 1,000,000; use a number with fewer"
                " digits than 2147483648."
            ),
        ),
        (
            {"json_schema": {"x-guidance": {"lenient": True}}},
            (
                'json_schema: x-guidance must be an object that does not set "lenient", found {"lenient": true}; remove'
                ' x-guidance, because "lenient" ignores parts of the schema.'
            ),
        ),
    ],
)
def test_unsuitable_parameters_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(PrecastError) as refused:
        SamplingParams(**given)
    assert str(refused.value) == f"Sampling parameters: {text}"


@pytest.mark.parametrize(
    "given",
    [
        {"grammar": 'start: %json {"multipleOf": 1e999}'},
        {"grammar": "start: /%json [{]/"},
        {"grammar": 'start: %json {"multipleOf": 7}'},
        {"json_schema": {"multipleOf": True}},
    ],
)
def test_other_faults_are_the_library_s_to_find(given: dict[str, Any]) -> None:
    assert SamplingParams(**given).constraint is not None
