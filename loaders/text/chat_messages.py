"""Check the values that a chat template receives, and copy them as plain JSON in the form that transformers uses."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen

# Variables that other arguments set, or that callers cannot set.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
# Keys of a message's reasoning. Most templates read the first key, and the templates of gpt-oss read the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# A message without content needs a key other than these.
_COMMON_KEYS = frozenset({"role", "content", "name"})


class ChatOptions(Frozen):
    """The inputs of a chat template besides the messages.

    Attributes:
        add_generation_prompt: end the prompt with the opening of the assistant's turn, so that the model answers.
        tools: JSON schemas of functions, for templates that support tools.
        documents: documents on which to base the answer, for templates that support documents. A document usually has
            the keys `title` and `text`.
        variables: further variables of the template (`enable_thinking`, `date_string`, …).
    """

    add_generation_prompt: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] | None = None


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages as transformers passes them to a template.

    Omit keys whose value is null, because OpenAI's API returns such keys. Store the reasoning under both keys that
    templates read. Parse the arguments of tool calls, as vLLM does.

    Raises:
        PrecastError: the value is not a list of messages.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "an empty list" if messages in ([], ()) else type(messages).__name__
        raise PrecastError(f"Chat: expected a list of at least one message, found {found}.")
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain_message(message: Any, where: str) -> dict[str, Any]:
    wanted = 'a message {"role": string, "content": string or list of parts}'
    if not isinstance(message, Mapping):
        raise PrecastError(f"Chat: expected {where} to be {wanted}, found {type(message).__name__}.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise PrecastError(
            f"Chat: expected {where} to be {wanted}, found a role of type {type(role).__name__}."
        )
    has_other_keys = any(value is not None for key, value in message.items() if key not in _COMMON_KEYS)
    if not isinstance(content, (str, list)) and not (content is None and has_other_keys):
        raise PrecastError(
            f"Chat: expected {where} to be {wanted}, found content of type {type(content).__name__}."
        )
    plain = {key: value for key, value in plain_json(message, where).items() if value is not None}
    if isinstance(calls := plain.get("tool_calls"), list):
        plain["tool_calls"] = [_with_object(call) for call in calls]
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _with_object(call: Any) -> Any:
    """Return a tool call with its arguments parsed from a JSON string into an object, as templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(text := function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def plain_objects(values: Any, where: str) -> list[dict[str, Any]]:
    """Return documents as a list of plain JSON objects.

    Raises:
        PrecastError: the value is not a list of JSON objects.
    """
    if not isinstance(values, (list, tuple)):
        raise PrecastError(f"Chat: expected {where} to be a list of objects, found {type(values).__name__}.")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise PrecastError(
                f"Chat: expected {where}[{index}] to be a JSON object, found {type(value).__name__}."
            )
    plain: list[dict[str, Any]] = plain_json(values, where)
    return plain


def plain_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the caller's variables for a template as plain JSON.

    Raises:
        PrecastError: a name is reserved, or JSON cannot represent a value.
    """
    if not isinstance(variables, Mapping):
        raise PrecastError(
            f"Chat: expected template variables to be an object, found {type(variables).__name__}."
        )
    for name in variables:
        if name in _RESERVED:
            raise PrecastError(
                f"Chat: the template variable {name!r} is reserved; choose another name, or use the argument of that"
                " name."
            )
    plain: dict[str, Any] = plain_json(variables, "template variables")
    return plain


def plain_json(value: Any, where: str, source: str = "Chat", depth: int = 0) -> Any:
    """Copy a value as plain JSON types, because a template could call methods of other types.

    Args:
        value: the value.
        where: the name of the value in error texts.
        source: the beginning of error texts.
        depth: number of lists and objects that enclose the value.

    Raises:
        PrecastError: JSON cannot represent the value, or the value is nested more than 64 levels deep.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > 64:
        raise PrecastError(
            f"{source}: expected {where} to be nested at most 64 levels deep, found more; flatten it."
        )
    if isinstance(value, (list, tuple)):
        return [plain_json(item, where, source, depth + 1) for item in value]
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: plain_json(item, where, source, depth + 1) for key, item in value.items()}
    raise PrecastError(
        f"{source}: expected {where} to be plain JSON, found a value of type {type(value).__name__}"
        f"{' with keys that are not strings' if isinstance(value, Mapping) else ''}."
    )


# Content in parts


def has_parts(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if the content of any message is a list of parts."""
    return any(isinstance(message.get("content"), list) for message in messages)


def join_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join the parts of each message's content with newlines, for templates that accept only text.

    Raises:
        PrecastError: a part is not text.
    """
    return [
        {**message, "content": "\n".join(_part_texts(message["content"], f"messages[{index}]"))}
        if isinstance(message.get("content"), list)
        else dict(message)
        for index, message in enumerate(messages)
    ]


def _part_texts(parts: Sequence[Any], where: str) -> Iterator[str]:
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise PrecastError(
                f"Chat: {where} has a part of type {kind!r:.40}, but the model's chat template accepts only text;"
                " remove the part."
            )
        yield text


def as_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turn text content into a list of one part, for templates that accept only parts."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]
