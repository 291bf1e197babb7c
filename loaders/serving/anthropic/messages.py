"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from ...artifact.errors import PrecastError
from ...text.answer_parser import ContentDelta, ReasoningDelta, ToolCallDelta
from ..answers import Answers, Ask, Services, answering, reasoning_tokens
from ..errors import ApiError, anthropic_error
from ..requests import EventReply, Reply, Request, event, json_reply
from ..schema import parse
from .schemas import CountRequest, MessagesRequest
from .translate import messages_ask

if TYPE_CHECKING:
    from ...generation.model import Model
    from ...generation.stream import Completion
    from ...text.answer_parser import Delta
    from ...text.tool_calls import ToolCall


async def messages(services: Services, request: Request, body: bytes) -> Reply | EventReply:
    """Answer a chat."""
    given, ask = await services.prepare(request, lambda: _read(body))
    async with AsyncExitStack() as stack:
        answers = await stack.enter_async_context(answering(services, request, ask))
        head: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": ask.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
        }
        if given.stream:
            return EventReply(events=_events(answers, head, ask), closing=stack.pop_all())
        content: list[dict[str, Any]] = []
        async for _, delta in answers.deltas():
            if delta is not None:
                _extend(content, delta)
        done = answers.completion()
        # In a thread, because reasoning is tokenised.
        return await asyncio.to_thread(
            lambda: json_reply({**head, "content": content, **_ended(done, answers.model, ask)})
        )


async def count_tokens(services: Services, request: Request, body: bytes) -> Reply:
    """Count the tokens of a chat's prompt."""
    ask = await services.prepare(request, lambda: messages_ask(parse(CountRequest, body)))
    async with services.lease(request, ask.model) as model:
        work = partial(_count, model, ask, is_literal=services.settings.literal)
        return json_reply({"input_tokens": await services.prepare(request, work)})


def _read(body: bytes) -> tuple[MessagesRequest, Ask]:
    given = parse(MessagesRequest, body)
    return given, messages_ask(given)


def _count(model: "Model", ask: Ask, *, is_literal: bool) -> int:
    try:
        prompt = model.chat_prompt(
            ask.messages, tools=ask.tools, literal=is_literal, template_variables=ask.template_variables
        )
    except PrecastError as error:
        raise ApiError(400, str(error)) from None
    return len(prompt)


def _extend(blocks: list[dict[str, Any]], delta: "Delta") -> None:
    """Add a piece of the answer to its blocks."""
    if isinstance(delta, ToolCallDelta):
        blocks.append(_tool_use(delta.call, json.loads(delta.call.arguments)))
        return
    kind = "text" if isinstance(delta, ContentDelta) else "thinking"
    if not blocks or blocks[-1]["type"] != kind:
        blocks.append(_text("") if kind == "text" else _thinking(""))
    blocks[-1][kind] += delta.text


def _thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def _tool_use(call: "ToolCall", arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": call.id,
        "name": call.name,
        "input": arguments,
        "caller": {"type": "direct"},
    }


def _stop(done: "Completion", model: "Model", ask: Ask) -> dict[str, Any]:
    """Return the reason for the end of an answer, and the stop string that ended it."""
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    is_end = bool(done.token_ids) and done.token_ids[-1] in model.eos_token_ids
    if done.finish_reason != "stop" or is_end:
        return {"stop_reason": reasons.get(done.finish_reason, "end_turn"), "stop_sequence": None}
    text = model.tokenizer.decode(done.token_ids)
    # The match that ends first ended the answer; of two that end together, the longer one.
    ends = [
        (place + len(stop), place, stop)
        for stop in ask.fields.get("stop", ())
        if (place := text.find(stop)) >= 0
    ]
    return {"stop_reason": "stop_sequence", "stop_sequence": min(ends)[2] if ends else None}


def _ended(done: "Completion", model: "Model", ask: Ask) -> dict[str, Any]:
    """Return the parts of a message that the end of its answer decides."""
    rest = {"stop_details": None, "container": None, "usage": _usage(done, model)}
    return _stop(done, model, ask) | rest


def _usage(done: "Completion", model: "Model") -> dict[str, Any]:
    cached = done.timing.cached_tokens
    return {
        "input_tokens": len(done.prompt_token_ids) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "cache_creation": None,
        "output_tokens": len(done.token_ids),
        "output_tokens_details": {"thinking_tokens": reasoning_tokens(done, model)},
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
    }


# --- streams ------------------------------------------------------------------------------------------------


async def _events(answers: Answers, head: Mapping[str, Any], ask: Ask) -> AsyncIterator[bytes]:
    """Yield the events of a streamed answer."""
    blocks = _Blocks()
    try:
        yield _named(
            {
                "type": "message_start",
                "message": {**head, "usage": _usage(answers.completion(), answers.model)},
            }
        )
        async for _, delta in answers.deltas():
            if delta is not None:
                for each in blocks.take(delta):
                    yield _named(each)
        for each in blocks.close():
            yield _named(each)
        done = answers.completion()
        # In a thread, because reasoning is tokenised.
        ended = await asyncio.to_thread(_ended, done, answers.model, ask)
        usage = ended.pop("usage")
        yield _named({"type": "message_delta", "delta": ended, "usage": usage})
        yield _named({"type": "message_stop"})
    except ApiError as error:
        yield _named(anthropic_error(error))


def _named(value: Mapping[str, Any]) -> bytes:
    return event(value, value["type"])


class _Blocks:
    """The blocks of a streamed answer. A block is open while pieces of its kind arrive."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""

    def take(self, delta: "Delta") -> Iterator[dict[str, Any]]:
        """Yield the events for a piece of the answer."""
        if isinstance(delta, ContentDelta):
            yield from self._open("text", _text(""))
            yield self._delta({"type": "text_delta", "text": delta.text})
        elif isinstance(delta, ReasoningDelta):
            yield from self._open("thinking", _thinking(""))
            yield self._delta({"type": "thinking_delta", "thinking": delta.text})
        else:
            yield from self.close()
            yield from self._open("tool_use", _tool_use(delta.call, {}))
            yield self._delta({"type": "input_json_delta", "partial_json": delta.call.arguments})

    def close(self) -> Iterator[dict[str, Any]]:
        """Yield the event for the end of the open block, if there is one."""
        if self._kind:
            self._kind = ""
            yield {"type": "content_block_stop", "index": self._index}

    def _open(self, kind: str, block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if kind != self._kind:
            yield from self.close()
            self._index, self._kind = self._index + 1, kind
            yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
