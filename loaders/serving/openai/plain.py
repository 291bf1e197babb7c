"""Chats that consist of texts, with the most frequent parameters, checked without pydantic.

Importing pydantic and building its validators would delay the first answer of a server by 80 ms.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeGuard

from ..answers import Ask

# Roles that chat templates know by another name.
ROLES = {"developer": "system"}
# Bytes of the longest body that is checked here, because a body that does not pass is parsed again.
_MOST = 1 << 16
_SPOKEN = ("system", "developer", "user", "assistant")
# The type and the range of each number, as in `ChatRequest`.
_NUMBERS: Mapping[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "top_k": (int, 0, 2**31),
    "seed": (int, 0, 2**63 - 1),
    "max_tokens": (int, 1, 2**31),
}
_FLAGS = ("stream", "ignore_eos")
_KNOWN = {"model", "messages", "stream_options", *_FLAGS, *_NUMBERS}


class ChatAsk(NamedTuple):
    """A request for chat completions.

    Attributes:
        ask: the work.
        is_streamed: True if the answer is streamed.
        has_usage: True if the stream ends with the numbers of tokens.
    """

    ask: Ask
    is_streamed: bool
    has_usage: bool


def plain_chat(body: bytes) -> ChatAsk | None:
    """Return a request; None if only the complete check can accept or refuse it."""
    if len(body) > _MOST or b"\\u" in body:  # pydantic refuses an escaped lone surrogate
        return None
    try:
        # A repeated key hides its earlier values, so check while parsing.
        given = json.loads(body.decode(), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or not given.keys() <= _KNOWN:
        return None
    given = {name: value for name, value in given.items() if value is not None}
    model, messages = given.get("model"), given.get("messages")
    has_flags = all(isinstance(given.get(name, False), bool) for name in _FLAGS)
    has_numbers = all(_is_number(given[name], *_NUMBERS[name]) for name in given.keys() & _NUMBERS.keys())
    if not (isinstance(model, str) and _are_texts(messages) and has_flags and has_numbers):
        return None
    is_streamed, has_usage = given.get("stream", False), "stream_options" in given
    if has_usage and not (is_streamed and _asks_for_usage(given["stream_options"])):
        return None
    return ChatAsk(_ask(model, messages, given), is_streamed, has_usage)


def _refuse(number: str) -> NoReturn:
    raise ValueError(number)


def _finite(number: str) -> float:
    return value if math.isfinite(value := float(number)) else _refuse(number)


def _is_number(value: object, kind: type, low: float, high: float) -> bool:
    return type(value) in (int, kind) and low <= value <= high  # type: ignore[operator]


def _asks_for_usage(options: object) -> bool:
    return (
        isinstance(options, dict) and options.keys() == {"include_usage"} and options["include_usage"] is True
    )


def _are_texts(messages: object) -> TypeGuard[list[dict[str, str]]]:
    """Return True if each message consists of a role and a text."""
    return isinstance(messages, list) and all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in _SPOKEN
        and isinstance(message["content"], str)
        for message in messages
    )


def _ask(model: str, messages: Sequence[Mapping[str, str]], given: Mapping[str, Any]) -> Ask:
    numbers = {name: kind(given[name]) for name, (kind, _, _) in _NUMBERS.items() if name in given}
    flags = {"ignore_eos": given["ignore_eos"]} if "ignore_eos" in given else {}
    said = [{"role": ROLES.get(each["role"], each["role"]), "content": each["content"]} for each in messages]
    return Ask(model=model, fields=numbers | flags, messages=said)
