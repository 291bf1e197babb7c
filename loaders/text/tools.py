"""Check the tools for a chat. A tool is a function that the model may call, described as in OpenAI's API."""

import json
from collections.abc import Mapping
from typing import Any

from ..artifact.errors import PrecastError
from .chat_messages import plain_json

_TOOL = (
    '{"type": "function", "function": {"name": string, "description": string, "parameters":'
    " JSON Schema of an object}}"
)
# The parser of tool calls accepts names of at most this length.
_LONGEST_NAME = 256


def checked_tools(tools: Any, source: str = "Chat") -> list[dict[str, Any]]:
    """Check tools, and return them as plain JSON objects.

    Args:
        tools: the tools, each with or without the outer key "function".
        source: the beginning of error texts.

    Raises:
        PrecastError: the value is not a list of tools, or two tools have the same name.
    """
    if not isinstance(tools, (list, tuple)):
        raise PrecastError(f"{source}: expected tools to be a list of tools, found {type(tools).__name__}.")
    plain: list[dict[str, Any]] = []
    names: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            found = "a function; give its JSON schema" if callable(tool) else type(tool).__name__
        else:
            plain.append(plain_json(tool, where, source))
            found = _fault(plain[-1], names)
        if found:
            raise PrecastError(f"{source}: expected {where} to be a tool {_TOOL}, found {found}.")
    try:
        json.dumps(plain, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise PrecastError(
            f"{source}: expected tools to be JSON, found a number that is not finite or has too many digits, or a"
            " string with a lone surrogate."
        ) from None
    return plain


def _fault(tool: dict[str, Any], names: set[str]) -> str:
    """Return the first fault of a tool, or "" if the tool is valid; add the tool's name to `names`."""
    kind = tool.get("type")
    if kind not in (None, "function"):
        return f"the type {kind!r:.60}"
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        return f"a function of type {type(function).__name__}"
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str):
        return f"a name of type {type(name).__name__}" if "name" in function else "no name"
    if not name.strip() or len(name) > _LONGEST_NAME:
        return f"a name of {len(name.strip()):,} characters; give it 1 to {_LONGEST_NAME}"
    if name in names:
        return f"the name {name!r:.60} for a second time"
    names.add(name)
    if not isinstance(description, str | None):
        return f"a description of type {type(description).__name__}"
    return _fault_of_parameters(function.get("parameters"))


def _fault_of_parameters(parameters: Any) -> str:
    if parameters is None:
        return ""
    if not isinstance(parameters, dict):
        return f"parameters of type {type(parameters).__name__}"
    if parameters.get("type", "object") != "object":
        return f"parameters for values of type {parameters['type']!r:.60}"
    properties = parameters.get("properties", {})
    return "" if isinstance(properties, dict) else f"properties of type {type(properties).__name__}"
