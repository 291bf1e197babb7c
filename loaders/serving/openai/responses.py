"""``/v1/responses``."""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from ...text.answer_parser import ContentDelta, ToolCallDelta
from ..answers import Answers, Ask, Services, answering, reasoning_tokens
from ..errors import ApiError
from ..requests import EventReply, Reply, Request, event, json_bytes, json_reply
from ..schema import parse
from .response_schemas import ResponseRequest
from .response_translate import new_messages, response_ask

if TYPE_CHECKING:
    from ...generation.model import Model
    from ...generation.stream import Completion
    from ...text.answer_parser import Delta


async def responses(services: Services, request: Request, body: bytes) -> Reply | EventReply:
    """Answer a chat, which may continue an earlier response."""
    given = await services.prepare(request, lambda: parse(ResponseRequest, body))
    previous = given.previous_response_id
    before = [] if previous is None else services.responses.messages(previous)
    ask, head = await services.prepare(request, lambda: (response_ask(given, before), _head(given)))

    def keep(done: "Completion", shown: bytes) -> None:
        if given.store is not False:
            messages = [*before, *new_messages(given.input), done.message()]
            services.responses.add(head["id"], messages, shown)

    async with AsyncExitStack() as stack:
        answers = await stack.enter_async_context(answering(services, request, ask))
        head |= _sampling(answers.model, ask)
        if given.stream:

            async def events() -> AsyncIterator[bytes]:
                async for each in _events(answers, head):
                    # Before the event is sent, because the client may then continue the response at once.
                    if each["type"] in ("response.completed", "response.incomplete"):
                        keep(answers.completion(), json_bytes(each["response"]))
                    yield event(each, each["type"])

            return EventReply(events=events(), closing=stack.pop_all())
        items = _Items()
        async for _, delta in answers.deltas():
            if delta is not None:
                deque(items.take(delta), maxlen=0)
        done = answers.completion()
        deque(items.close(done), maxlen=0)
        # In a thread, because the reply repeats the request's tools, and reasoning is tokenised.
        reply = await asyncio.to_thread(lambda: json_reply(head | _ended(done, items.items, answers)))
        keep(done, reply.body)
        return reply


async def show_response(services: Services, request: Request, body: bytes) -> Reply:
    """Show an earlier response."""
    return Reply(body=services.responses.body(request.path_params["response_id"]))


async def delete_response(services: Services, request: Request, body: bytes) -> Reply:
    """Forget an earlier response."""
    identifier = request.path_params["response_id"]
    services.responses.remove(identifier)
    return json_reply({"id": identifier, "object": "response", "deleted": True})


def _head(given: ResponseRequest) -> dict[str, Any]:
    """Return the response before its answer begins: it repeats the request's parameters."""
    shown = given.model_dump(by_alias=True)
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": given.instructions,
        "max_output_tokens": given.max_output_tokens,
        "max_tool_calls": None,
        "metadata": given.metadata or {},
        "model": given.model,
        "output": [],
        "parallel_tool_calls": given.parallel_tool_calls is not False,
        "previous_response_id": given.previous_response_id,
        "prompt_cache_key": given.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": given.safety_identifier,
        "service_tier": "default",
        "store": given.store is not False,
        "text": {"format": _format(given)},
        "tool_choice": shown["tool_choice"] or "auto",
        "tools": shown["tools"] or [],
        "top_logprobs": 0,
        "truncation": "disabled",
        "usage": None,
        "user": given.user,
    }


def _format(given: ResponseRequest) -> dict[str, Any]:
    """Return the form of the answer."""
    form = given.text.format if given.text else None
    if form is None or form.type != "json_schema":
        return {"type": "text" if form is None else form.type}
    return form.model_dump(by_alias=True) | {"strict": form.strict is not False}


def _sampling(model: "Model", ask: Ask) -> dict[str, Any]:
    """Return the sampling parameters of the answer: those of the request, and the model's defaults for the others."""
    defaults = model.default_sampling()
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    return {name: ask.fields.get(name, getattr(defaults, name)) for name in names}


def _ended(done: "Completion", items: Sequence[Mapping[str, Any]], answers: Answers) -> dict[str, Any]:
    """Return the parts of a response that its answer decides."""
    is_cut = done.finish_reason == "length"
    cached, prompt, tokens = done.timing.cached_tokens, len(done.prompt_token_ids), len(done.token_ids)
    return {
        "status": "incomplete" if is_cut else "completed",
        "completed_at": None if is_cut else int(time.time()),
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": items,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens(done, answers.model)},
            "total_tokens": prompt + tokens,
        },
    }


async def _events(answers: Answers, head: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a streamed response."""
    number = 0

    def numbered(kind: str, **fields: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": kind, "sequence_number": number - 1, **fields}

    items = _Items()
    yield numbered("response.created", response=head)
    yield numbered("response.in_progress", response=head)
    try:
        async for _, delta in answers.deltas():
            if delta is not None:
                for kind, fields in items.take(delta):
                    yield numbered(kind, **fields)
        done = answers.completion()
        for kind, fields in items.close(done):
            yield numbered(kind, **fields)
        # In a thread, because reasoning is tokenised.
        ended = {**head, **await asyncio.to_thread(_ended, done, items.items, answers)}
        yield numbered(f"response.{ended['status']}", response=ended)
    except ApiError as error:
        fault = {"code": "server_error", "message": str(error)}
        yield numbered("error", code=error.code, message=str(error), param=error.param)
        yield numbered("response.failed", response={**head, "status": "failed", "error": fault})


_Events = Iterator[tuple[str, dict[str, Any]]]


class _Items:
    """The output items of a response while its answer arrives.

    Attributes:
        items: the items so far; the last one may still grow.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False

    def take(self, delta: "Delta") -> _Events:
        """Add a piece of the answer, and yield the events for it."""
        if isinstance(delta, ToolCallDelta):
            yield from self._end("completed")
            yield from self._call(delta)
            return
        is_text = isinstance(delta, ContentDelta)
        kind, part, prefix = (
            ("message", "output_text", "msg") if is_text else ("reasoning", "reasoning_text", "rs")
        )
        if not self._is_open or self.items[-1]["type"] != kind:
            yield from self._end("completed")
            extra: dict[str, Any] = {"role": "assistant"} if is_text else {"summary": []}
            yield from self._begin(kind, prefix, {**extra, "content": []})
            shown: dict[str, Any] = {"annotations": [], "logprobs": []} if is_text else {}
            self.items[-1]["content"].append({"type": part, "text": "", **shown})
            yield "response.content_part.added", {**self._place(), "part": dict(self.items[-1]["content"][0])}
        self.items[-1]["content"][0]["text"] += delta.text
        more: dict[str, Any] = {"logprobs": []} if is_text else {}
        yield f"response.{part}.delta", {**self._place(), "delta": delta.text, **more}

    def close(self, done: "Completion") -> _Events:
        """Yield the events for the end of the answer."""
        yield from self._end("incomplete" if done.finish_reason == "length" else "completed")

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}

    def _begin(self, kind: str, prefix: str, fields: Mapping[str, Any]) -> _Events:
        item = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        self._is_open = True
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": shown}

    def _call(self, delta: ToolCallDelta) -> _Events:
        call = delta.call
        yield from self._begin(
            "function_call", "fc", {"call_id": call.id, "name": call.name, "arguments": ""}
        )
        item = self.items[-1]
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        yield "response.function_call_arguments.delta", {**place, "delta": call.arguments}
        item["arguments"] = call.arguments
        yield (
            "response.function_call_arguments.done",
            {**place, "name": call.name, "arguments": call.arguments},
        )
        yield from self._end("completed")

    def _end(self, status: str) -> _Events:
        """End the item that is open, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        if item["type"] != "function_call":
            (part,) = item["content"]
            more: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            yield f"response.{part['type']}.done", {**self._place(), "text": part["text"], **more}
            yield "response.content_part.done", {**self._place(), "part": dict(part)}
        item["status"] = status
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": dict(item)}
