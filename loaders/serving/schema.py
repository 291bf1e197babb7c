"""The base of all schemas of requests: unknown parameters and values of the wrong type are errors."""

import json
from math import isfinite
from threading import Lock
from typing import Annotated, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, ValidationError

from .errors import ApiError, invalid

_Schema = TypeVar("_Schema", bound="Schema")
_Item = TypeVar("_Item")
# Numbers that may exceed the largest float, with 0 for each digit and e for E.
_LARGE = (b"e000", b"e+000", b"0" * 200)
_SHAPES = bytes.maketrans(b"123456789E", b"000000000e")

_BUILDING = Lock()


class _FailFast(FailFast):
    """pydantic's marker, which a union accepts only if it has a hash."""

    __hash__ = object.__hash__


# A list that is refused at its first wrong item. Without it, a body can cause millions of errors.
Items = Annotated[list[_Item], _FailFast()]


def _refuse_number(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"expected a boolean, found {value}")
    return value


# Literals of Python also accept 0 and 1.
Off = Annotated[Literal[False], BeforeValidator(_refuse_number)]


class Schema(BaseModel):
    """A JSON object of a request. Null is the same as a missing key, as in OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, defer_build=True)


def built(schema: type[_Schema]) -> type[_Schema]:
    """Return a schema after building its validator, which would take milliseconds for each schema at the start."""
    if not schema.__pydantic_complete__:
        with _BUILDING:  # pydantic removes parts of the class while it builds
            schema.model_rebuild()
    return schema


def parse(schema: type[_Schema], body: bytes) -> _Schema:
    """Return a request's body as an instance of its schema.

    Raises:
        ApiError: the body is not JSON, does not fit the schema, or contains a number that is not finite.
    """
    try:
        found = built(schema).model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None
    # pydantic accepts such numbers where a schema allows any value.
    if is_suspect(body):
        json.loads(body, parse_constant=_refuse, parse_float=_check, parse_int=len)
    return found


def is_suspect(body: bytes) -> bool:
    """Return True if a text of JSON may contain a number that is not finite.

    A regular expression would take 120 ms for 4 MB, and would hold Python's lock.
    """
    shapes = body.translate(_SHAPES)
    return any(name in body for name in (b"NaN", b"Infinity")) or any(large in shapes for large in _LARGE)


def _check(number: str) -> None:
    if not isfinite(float(number)):
        _refuse(number)


def _refuse(number: str) -> NoReturn:
    raise ApiError(400, f"The body must be JSON with finite numbers only, found {number:.60}.")
