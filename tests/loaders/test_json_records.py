"""Records from JSON: strict parsing, and errors that name the place."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.json_records import MAX_JSON_BYTES, from_json, parse_json, to_json


@dataclass(frozen=True, kw_only=True)
class Leaf:
    count: int
    label: str | None


@dataclass(frozen=True, kw_only=True)
class Tree:
    name: str
    ratio: float
    flag: bool
    numbers: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    by_name: Mapping[str, Leaf]
    extra: Leaf | None


GOOD = {
    "name": "höhe 日本",
    "ratio": 0.5,
    "flag": True,
    "numbers": [1, 2],
    "leaves": [{"count": 1, "label": None}, {"count": 2, "label": "b"}],
    "by_name": {"a b": {"count": 3, "label": "c"}},
    "extra": None,
}


def read(text: str | bytes) -> Tree:
    data = text if isinstance(text, bytes) else text.encode()
    return from_json(Tree, parse_json(data, "m.json"), "m.json")


def error(value: object) -> str:
    with pytest.raises(PrecastError) as raised:
        read(json.dumps(value))
    return str(raised.value)


def test_round_trip():
    tree = read(json.dumps(GOOD))
    assert tree.leaves == (Leaf(count=1, label=None), Leaf(count=2, label="b"))
    assert tree.by_name["a b"].count == 3
    text = to_json(tree)
    assert "höhe 日本" in text
    assert text.endswith("}\n")
    assert read(text) == tree
    assert json.loads(text) == GOOD


def test_keys_are_written_in_field_order():
    assert list(json.loads(to_json(read(json.dumps(GOOD))))) == [f.name for f in dataclasses.fields(Tree)]


def test_an_integer_is_accepted_as_a_float():
    assert read(json.dumps(GOOD | {"ratio": 2})).ratio == 2.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": 1}, "m.json: name: expected a string, found 1"),
        ({"name": None}, "m.json: name: expected a string, found None"),
        ({"ratio": "x"}, "m.json: ratio: expected a number, found 'x'"),
        ({"ratio": True}, "m.json: ratio: expected a number, found True"),
        ({"ratio": 10**400}, "m.json: ratio: expected a number in the range of a float, found a larger one"),
        ({"flag": 1}, "m.json: flag: expected true or false, found 1"),
        ({"flag": "true"}, "m.json: flag: expected true or false, found 'true'"),
        ({"numbers": 3}, "m.json: numbers: expected a list, found 3"),
        ({"numbers": {}}, "m.json: numbers: expected a list, found an object"),
        ({"numbers": [1, "2"]}, "m.json: numbers[1]: expected a whole number, found '2'"),
        ({"numbers": [1.0]}, "m.json: numbers[0]: expected a whole number, found 1.0"),
        ({"numbers": [True]}, "m.json: numbers[0]: expected a whole number, found True"),
        ({"numbers": [-1]}, "m.json: numbers[0]: expected a whole number from 0 to 2^63 - 1, found -1"),
        (
            {"numbers": [2**63]},
            "numbers[0]: expected a whole number from 0 to 2^63 - 1, found 9223372036854775808",
        ),
        ({"leaves": [[]]}, "m.json: leaves[0]: expected an object, found a list"),
        ({"leaves": [{"count": 1, "label": 5}]}, "m.json: leaves[0].label: expected a string, found 5"),
        ({"by_name": []}, "m.json: by_name: expected an object, found a list"),
        ({"by_name": {"q": 1}}, "m.json: by_name['q']: expected an object, found 1"),
        ({"by_name": {"q": {"count": 1}}}, "m.json: by_name['q']: key 'label' is missing"),
        (
            {"extra": {"count": "1", "label": None}},
            "m.json: extra.count: expected a whole number, found '1'",
        ),
        ({"extra": False}, "m.json: extra: expected an object, found False"),
    ],
)
def test_every_wrong_value_is_named_with_its_place(change, text):
    assert error(GOOD | change).endswith(f"{text}; export the model again.")


@pytest.mark.parametrize("key", GOOD)
def test_every_missing_key_is_named(key):
    assert error({k: v for k, v in GOOD.items() if k != key}) == (
        f"m.json: key {key!r} is missing; export the model again."
    )


def test_unknown_keys_are_named():
    text = "m.json: key 'rope' is not known to this format version; update precast, or "
    assert error(GOOD | {"rope": 1}) == f"{text}export the model again."
    with pytest.raises(PrecastError) as raised:
        from_json(Tree, GOOD | {"rope": 1}, "m.json", "push it again")
    assert str(raised.value) == f"{text}push it again."
    nested = GOOD | {"leaves": [{"count": 1, "label": None, "scale": 2}]}
    assert error(nested).startswith("m.json: leaves[0]: key 'scale' is not known")


def test_a_repeated_key_is_refused():
    with pytest.raises(PrecastError, match=r"m\.json: .*a key occurs twice"):
        read(json.dumps(GOOD)[:-1] + ', "flag": false}')


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(PrecastError, match=r"^m\.json: "):
        read(json.dumps(GOOD | {"ratio": 7.25}).replace("7.25", value))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "m.json: expected JSON"),
        (b"{", "m.json: expected JSON"),
        (b"\xff\xfe{}", "m.json: expected JSON"),
        (b"[" * 100_000, "m.json: the JSON is nested too deeply; copy or export the artifact again."),
        (b'{"a":' * 100_000, "m.json: the JSON is nested too deeply; copy or export the artifact again."),
        (b"9" * 10_000, "m.json: expected JSON"),
        (b" " * (MAX_JSON_BYTES + 1), f"m.json: expected at most {MAX_JSON_BYTES} bytes of JSON"),
        (b"null", "m.json: expected an object, found None; export the model again."),
    ],
)
def test_anything_but_a_json_object_is_refused(data, text):
    with pytest.raises(PrecastError) as raised:
        read(data)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize("depth", [*range(900, 1000, 5), 2000])
def test_a_deep_value_in_a_wrong_place_is_refused_at_any_depth(depth):
    """At some depths, parsing succeeds, but repr of the value exceeds the recursion limit."""
    text = json.dumps(GOOD | {"name": "@"}).replace('"@"', "[" * depth + "]" * depth)
    with pytest.raises(PrecastError, match=r"^m\.json: "):
        read(text)


def test_numbers_that_json_lacks_are_not_written():
    with pytest.raises(ValueError, match="JSON"):
        to_json(dataclasses.replace(read(json.dumps(GOOD)), ratio=float("nan")))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.fixed_dictionaries({key: st.just(value) | ANYTHING for key, value in GOOD.items()}))
@settings(deadline=None)
def test_any_json_is_a_record_or_raises_precast_error(value):
    text, tree = "m.json", None
    try:
        tree = read(json.dumps(value))
    except PrecastError as error:
        text = str(error)
    assert text.startswith("m.json")
    assert tree is None or read(to_json(tree)) == tree


@given(st.binary())
@settings(deadline=None)
def test_any_bytes_are_a_record_or_raise_precast_error(data):
    with pytest.raises(PrecastError, match=r"^m\.json"):
        read(data)
