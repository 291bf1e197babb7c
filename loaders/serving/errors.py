"""Errors of requests, and their format in each API."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..artifact.errors import printable

if TYPE_CHECKING:
    from pydantic import ValidationError

_OPENAI_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_INVALID = "invalid_request_error"
# pydantic puts the branches of a union into the location of an error, by these names.
_BRANCHES = frozenset({"str", "int", "float", "bool", "none", "dict", "list"})
# After the index of an item, the location also names the item's type, if the type decides the schema.
_TAGS = frozenset(
    {
        "message",
        "function_call",
        "function_call_output",
        "reasoning",
        "text",
        "thinking",
        "tool_use",
        "tool_result",
    }
)

# pydantic takes microseconds for each fault, and holds Python's lock meanwhile.
_MOST_FAULTS = 100


class ApiError(Exception):
    """An error that is the answer to a request.

    Args:
        status: the HTTP status.
        message: one sentence.
        param: the parameter at fault, such as ``messages[0].content``.
        code: OpenAI's code of the error.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(printable(message))
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def openai_error(error: ApiError) -> dict[str, Any]:
    """Return an error in the format of OpenAI's API."""
    kind = _OPENAI_TYPES.get(error.status, _INVALID)
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Return an error in the format of Anthropic's API."""
    kind = _ANTHROPIC_TYPES.get(error.status, _INVALID)
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def invalid(error: "ValidationError") -> ApiError:
    """Return the error for a body that does not fit its schema; it names the first fault."""
    if (count := error.error_count()) > _MOST_FAULTS:
        text = f"The body must have at most {_MOST_FAULTS} unknown or invalid parameters, found {count:,}."
        return ApiError(400, text, code="invalid_value")
    faults = error.errors(include_url=False, include_context=False)
    fault = faults[0]
    # A union has a fault for each branch; the deepest one belongs to the branch that fits best.
    rivals = [other for other in faults if other["loc"][:1] == fault["loc"][:1]]
    fault = max(rivals, key=lambda other: len(other["loc"]))
    place, kind, message = _place(fault["loc"]), fault["type"], fault["msg"]
    if kind == "json_invalid":
        return ApiError(400, f"The body must be JSON: {message.removeprefix('Invalid JSON: ')}.")
    if kind == "extra_forbidden":
        return ApiError(
            400, f"Unknown or unsupported parameter: {place!r}.", param=place, code="unknown_parameter"
        )
    if kind == "missing":
        text = f"Missing required parameter: {place!r}."
        return ApiError(400, text, param=place, code="missing_required_parameter")
    expected = message.replace("Input should be", "expected", 1).replace("Value error, ", "", 1)
    found = "" if kind == "value_error" else f", found {_shown(fault['input'])}"
    return ApiError(400, f"{place or 'body'}: {expected}{found}.", param=place or None, code="invalid_value")


def _place(location: Sequence[str | int]) -> str:
    """Return the path of a parameter, such as ``messages[0].content``."""
    path = ""
    for number, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        is_tag = part in _TAGS and 0 < number < len(location) - 1 and isinstance(location[number - 1], int)
        if (
            part not in _BRANCHES
            and part[:1].islower()
            and "[" not in part
            and "-" not in part
            and not is_tag
        ):
            path += f".{part}" if path else part
    return path


def _shown(value: object) -> str:
    text = repr(value[:60] if isinstance(value, str | list) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
