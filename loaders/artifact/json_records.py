"""Convert frozen dataclasses to and from JSON, with strict checks of keys and types."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Set
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

from .errors import PrecastError

Record = TypeVar("Record")

# A limit far above the size of any manifest, and small enough to parse safely.
MAX_JSON_BYTES = 16 << 20


class _Mismatch(Exception):
    """A value that does not fit its field. The message states the place, the expected value and the value found.

    Attributes:
        other_remedy: text before the remedy in the message: empty, or a further remedy that ends with ", or ".
    """

    other_remedy = ""


class _UnknownKey(_Mismatch):
    """A key that a later version may know."""

    other_remedy = "update precast, or "


def to_json(record: Any) -> str:
    """Return a dataclass as JSON text, with keys in field order and a final newline."""
    return json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(data: bytes, where: str, remedy: str = "copy or export the artifact again") -> Any:
    """Parse untrusted JSON text.

    Args:
        data: the text, in UTF-8.
        where: the source of the text, for messages.
        remedy: advice to the user about invalid JSON, for messages.

    Raises:
        PrecastError: the text is longer than `MAX_JSON_BYTES`, nested too deeply, not UTF-8, not JSON, or repeats a
            key within an object.
    """
    if len(data) > MAX_JSON_BYTES:
        raise PrecastError(
            f"{where}: expected at most {MAX_JSON_BYTES} bytes of JSON, found {len(data)}; {remedy}."
        )
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        # An escape may encode a lone surrogate, which cannot be part of a file name or be printed.
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise PrecastError(f"{where}: the JSON is nested too deeply; {remedy}.") from None
    except ValueError as error:
        raise PrecastError(f"{where}: expected JSON, found something else ({error}); {remedy}.") from None


def from_json(kind: type[Record], value: Any, where: str, remedy: str = "export the model again") -> Record:
    """Build a dataclass from parsed JSON.

    Args:
        kind: the dataclass.
        value: the parsed JSON.
        where: the source of the JSON, for messages.
        remedy: advice to the user about an invalid value, for messages.

    Raises:
        PrecastError: a key is unknown or missing, or a value has the wrong type. The message names the place
            (``manifest.json: targets[0].programs[2].name``).
    """
    convert: _Converter = _converter(typing.cast(Hashable, kind))
    try:
        return typing.cast(Record, convert(value, where))
    except _Mismatch as error:
        raise PrecastError(f"{error}; {error.other_remedy}{remedy}.") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


# The position of a value in the JSON. The position of the outermost value is the name of the source. Any other position
# is a pair: the position of the enclosing value, and a field's name or a bracketed index or key. A position becomes
# text only if there is an error.
_Place = str | tuple[Any, str]


def _formatted(place: _Place) -> str:
    if isinstance(place, str):
        return place
    outer, piece = _formatted(place[0]), place[1]
    if piece.startswith("["):
        return outer + piece
    return f"{outer}{'.' if '[' in outer or ': ' in outer else ': '}{piece}"


def _wrong(place: _Place, expected: str, value: Any) -> _Mismatch:
    # The message shows no lists or objects, because the repr of a deeply nested list can exceed the recursion limit.
    found = (
        "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else f"{value!r:.60}"
    )
    return _Mismatch(f"{_formatted(place)}: expected {expected}, found {found}")


_Converter = Callable[[Any, _Place], Any]


@cache
def _converter(kind: Any) -> _Converter:
    """Return a function that converts parsed JSON to a value of `kind`, or raises _Mismatch."""
    if dataclasses.is_dataclass(kind):
        return _record(typing.cast(type, kind))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return _optional(_converter(arguments[0]))
    if origin is tuple:
        return _list(_converter(arguments[0]))
    if origin is Mapping:
        return _mapping(_converter(arguments[1]))
    return _number if kind is float else _scalar(kind)


def _record(kind: type) -> _Converter:
    hints = typing.get_type_hints(kind)
    fields = {field.name: _converter(hints[field.name]) for field in dataclasses.fields(kind)}

    def convert(value: Any, place: _Place) -> Any:
        if not isinstance(value, dict):
            raise _wrong(place, "an object", value)
        if value.keys() != fields.keys():
            raise _wrong_keys(place, value.keys(), fields.keys())
        return kind(**{name: item(value[name], (place, name)) for name, item in fields.items()})

    return convert


def _wrong_keys(place: _Place, found: Set[str], expected: Set[str]) -> _Mismatch:
    if unknown := sorted(found - expected):
        return _UnknownKey(f"{_formatted(place)}: key {unknown[0]!r} is not known to this format version")
    return _Mismatch(f"{_formatted(place)}: key {min(expected - found)!r} is missing")


def _optional(item: _Converter) -> _Converter:
    return lambda value, place: None if value is None else item(value, place)


def _list(item: _Converter) -> _Converter:
    def convert(value: Any, place: _Place) -> Any:
        if not isinstance(value, list):
            raise _wrong(place, "a list", value)
        return tuple([item(v, (place, f"[{i}]")) for i, v in enumerate(value)])

    return convert


def _mapping(item: _Converter) -> _Converter:
    def convert(value: Any, place: _Place) -> Any:
        if not isinstance(value, dict):
            raise _wrong(place, "an object", value)
        return {key: item(v, (place, f"[{key!r}]")) for key, v in value.items()}

    return convert


def _scalar(kind: type) -> _Converter:
    expected = {int: "a whole number", str: "a string", bool: "true or false"}[kind]

    def convert(value: Any, place: _Place) -> Any:
        # Do not use isinstance, because bool is a subclass of int.
        if type(value) is not kind:
            raise _wrong(place, expected, value)
        if isinstance(value, int) and not 0 <= value < 2**63:
            raise _wrong(place, "a whole number from 0 to 2^63 - 1", value)
        return value

    return convert


def _number(value: Any, place: _Place) -> float:
    if type(value) not in (int, float):
        raise _wrong(place, "a number", value)
    # JSON has no infinity, but Python parses 1e999 as infinity.
    with suppress(OverflowError):
        if math.isfinite(value):
            return float(value)
    raise _Mismatch(f"{_formatted(place)}: expected a number in the range of a float, found a larger one")
