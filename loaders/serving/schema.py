"""The base of all schemas of requests: unknown parameters and values of the wrong type are errors."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import invalid

_Schema = TypeVar("_Schema", bound="Schema")


class Schema(BaseModel):
    """A JSON object of a request. Null is the same as a missing key, as in OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def parse(schema: type[_Schema], body: bytes) -> _Schema:
    """Return a request's body as an instance of its schema.

    Raises:
        ApiError: the body is not JSON, or does not fit the schema.
    """
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None
