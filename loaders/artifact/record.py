"""Frozen dataclasses to and from JSON, strictly: every key known, every type checked, every error with its place."""

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

# More than any manifest needs; less than it takes to hurt a machine.
MAX_JSON_BYTES = 16 << 20


def to_json(record: Any) -> str:
    """JSON text of a dataclass, keys in field order, with a newline at the end."""
    return json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(data: bytes, where: str) -> Any:
    """Parses JSON text of at most `MAX_JSON_BYTES`.

    Raises:
        PrecastError: naming `where`, for text that is too long, too deep, not UTF-8, not JSON, or has a key twice.
    """
    if len(data) > MAX_JSON_BYTES:
        raise PrecastError(f"{where}: expected at most {MAX_JSON_BYTES} bytes of JSON, found {len(data)}.")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        # An escape may stand for half of a surrogate pair, which no file name and no terminal takes.
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise PrecastError(f"{where}: the JSON is nested too deeply.") from None
    except ValueError as error:
        raise PrecastError(f"{where}: expected JSON, found something else ({error}).") from None


def from_json(kind: type[Record], value: Any, where: str) -> Record:
    """Builds a dataclass from parsed JSON.

    Raises:
        PrecastError: naming the place (``manifest.json: targets[0].programs[2].name``), what was expected and what
            was found.
    """
    convert: _Converter = _converter(typing.cast(Hashable, kind))
    return typing.cast(Record, convert(value, where))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


# Where a value stands: the text of the whole, or a place and a field's name or an item's number or key in brackets.
# Put into words only when something is wrong with the value.
_Place = str | tuple[Any, str]


def _words(place: _Place) -> str:
    if isinstance(place, str):
        return place
    outer, piece = _words(place[0]), place[1]
    if piece.startswith("["):
        return outer + piece
    return f"{outer}{'.' if '[' in outer or ': ' in outer else ': '}{piece}"


def _wrong(place: _Place, expected: str, value: Any) -> PrecastError:
    # Lists and objects are named, not shown: showing one that is nested deeply may fail itself.
    found = (
        "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else f"{value!r:.60}"
    )
    return PrecastError(f"{_words(place)}: expected {expected}, found {found}.")


_Converter = Callable[[Any, _Place], Any]


@cache
def _converter(kind: Any) -> _Converter:
    """What turns parsed JSON into a value of `kind`, or refuses it."""
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


def _wrong_keys(place: _Place, found: Set[str], expected: Set[str]) -> PrecastError:
    if unknown := sorted(found - expected):
        return PrecastError(
            f"{_words(place)}: key {unknown[0]!r} is not known to this format version; did a newer precast write it?"
        )
    return PrecastError(f"{_words(place)}: key {min(expected - found)!r} is missing.")


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
    expected = {int: "a whole number", str: "a text", bool: "true or false"}[kind]

    def convert(value: Any, place: _Place) -> Any:
        # bool is a subclass of int, and never meant where a number is.
        if type(value) is not kind:
            raise _wrong(place, expected, value)
        if isinstance(value, int) and not 0 <= value < 2**63:
            raise _wrong(place, "a whole number from 0 to 2^63 - 1", value)
        return value

    return convert


def _number(value: Any, place: _Place) -> float:
    if type(value) not in (int, float):
        raise _wrong(place, "a number", value)
    # JSON has no infinity, but numbers such as 1e999 become one.
    with suppress(OverflowError):
        if math.isfinite(value):
            return float(value)
    raise PrecastError(f"{_words(place)}: expected a number that a float holds, found a larger one.")
