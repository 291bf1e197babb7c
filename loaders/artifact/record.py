"""Frozen dataclasses to and from JSON, strictly: every key known, every type checked, every error with its place."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
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
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
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
    return typing.cast(Record, _convert(kind, value, where))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


@cache
def _fields(kind: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _wrong(where: str, expected: str, value: Any) -> PrecastError:
    # Lists and objects are named, not shown: showing one that is nested deeply may fail itself.
    found = (
        "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else f"{value!r:.60}"
    )
    return PrecastError(f"{where}: expected {expected}, found {found}.")


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _convert_record(typing.cast(type, kind), value, where)
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        return None if value is None else _convert(typing.get_args(kind)[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        item = typing.get_args(kind)[0]
        return tuple(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        item = typing.get_args(kind)[1]
        return {key: _convert(item, v, f"{where}[{key!r}]") for key, v in value.items()}
    return _convert_scalar(kind, value, where)


def _convert_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and type(value) in (int, float):
        return _convert_number(value, where)
    # bool is a subclass of int, and never meant where a number is.
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise _wrong(where, names[kind], value)
    if isinstance(value, int) and not 0 <= value < 2**63:
        raise _wrong(where, "a whole number from 0 to 2^63 - 1", value)
    return value


def _convert_number(value: int | float, where: str) -> float:
    # JSON has no infinity, but numbers such as 1e999 become one.
    with suppress(OverflowError):
        if math.isfinite(value):
            return float(value)
    raise PrecastError(f"{where}: expected a number that a float holds, found a larger one.")


def _convert_record(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    fields = _fields(kind)
    separator = "." if "[" in where or ": " in where else ": "
    if unknown := sorted(set(value) - set(fields)):
        raise PrecastError(
            f"{where}: key {unknown[0]!r} is not known to this format version; did a newer precast write it?"
        )
    if missing := sorted(set(fields) - set(value)):
        raise PrecastError(f"{where}: key {missing[0]!r} is missing.")
    return kind(
        **{name: _convert(hint, value[name], f"{where}{separator}{name}") for name, hint in fields.items()}
    )
