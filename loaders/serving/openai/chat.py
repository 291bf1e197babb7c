"""``/v1/chat/completions``."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from ...text.answer_parser import ContentDelta, ReasoningDelta, ToolCallDelta
from ..answers import Answers, Ask, Services, answering
from ..errors import ApiError, openai_error
from ..requests import EventReply, Reply, Request, event, json_reply, text_event
from .plain import ChatAsk, plain_chat
from .usage import DONE, fingerprint, timings, with_usage

if TYPE_CHECKING:
    from ...generation.logprobs import TokenLogprob
    from ...generation.model import Model
    from ...generation.stream import Completion
    from ...text.answer_parser import Delta


async def chat(services: Services, request: Request, body: bytes) -> Reply | EventReply:
    """Answer a chat."""
    ask, is_streamed, has_usage = await services.prepare(request, lambda: plain_chat(body) or _checked(body))
    async with AsyncExitStack() as stack:
        answers = await stack.enter_async_context(answering(services, request, ask))
        head = _head("chat.completion", answers.model, ask)
        if is_streamed:
            events = _events(answers, head | {"object": "chat.completion.chunk"}, ask, has_usage=has_usage)
            return EventReply(events=events, closing=stack.pop_all())
        # In a thread, because log-probabilities can make megabytes.
        return await asyncio.to_thread(_reply, await answers.completions(), head, answers.model, ask)


def _checked(body: bytes) -> ChatAsk:
    """Check a request completely.

    Raises:
        ApiError: the body does not fit the schema, or parameters contradict each other.
    """
    # Lazy imports, because the first answer rarely needs pydantic, whose import takes 60 ms.
    from ..schema import parse
    from .schemas import ChatRequest
    from .translate import chat_ask

    given = parse(ChatRequest, body)
    has_usage = bool(given.stream_options and given.stream_options.include_usage)
    return ChatAsk(chat_ask(given), bool(given.stream), has_usage)


def _reply(done: "Sequence[Completion]", head: Mapping[str, Any], model: "Model", ask: Ask) -> Reply:
    choices = [_choice(index, completion, model, ask) for index, completion in enumerate(done)]
    return json_reply(with_usage(head, choices, done, ask.count))


def _head(kind: str, model: "Model", ask: Ask) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": ask.model,
        "system_fingerprint": fingerprint(model),
    }


def _choice(index: int, completion: "Completion", model: "Model", ask: Ask) -> dict[str, Any]:
    message = completion.message() | {"refusal": None, "annotations": []}
    if completion.tool_calls and not completion.text:
        message["content"] = None
    found = {"index": index, "message": message, "finish_reason": completion.finish_reason}
    return found | {"logprobs": _logprobs(_shown(completion, model)) if "logprobs" in ask.fields else None}


def _shown(completion: "Completion", model: "Model") -> "Sequence[TokenLogprob]":
    """Return the log-probabilities without that of the end token, which has no text."""
    known = completion.logprobs
    is_end = completion.finish_reason in ("stop", "tool_calls") and bool(known)
    return known[:-1] if is_end and known[-1].token_id in model.eos_token_ids else known


def _logprobs(tokens: "Sequence[TokenLogprob]") -> dict[str, Any]:
    """Return log-probabilities as the chat completions endpoint returns them."""
    return {
        "content": [_token(token) | {"top_logprobs": [_token(top) for top in token.top]} for token in tokens],
        "refusal": None,
    }


def _token(token: "TokenLogprob") -> dict[str, Any]:
    # JSON has no infinity; OpenAI's API has -9999 for very unlikely tokens.
    return {
        "token": token.text,
        "logprob": max(token.logprob, -9999.0),
        "bytes": list(token.text.encode(errors="replace")),
    }


# --- streams ------------------------------------------------------------------------------------------------


async def _events(
    answers: Answers, head: Mapping[str, Any], ask: Ask, *, has_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the events of a streamed answer."""
    spare = {"usage": None} if has_usage else {}
    sent = [0] * len(answers.streams)

    def chunk(index: int, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        logprobs = None
        if "logprobs" in ask.fields:
            known = _shown(answers.completion(index), answers.model)
            logprobs, sent[index] = _logprobs(known[sent[index] :]), len(known)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice], **spare}

    indexes, is_plain = range(len(answers.streams)), "logprobs" not in ask.fields
    content_events = [
        text_event(lambda text, i=index: chunk(i, {"content": text}))  # type: ignore[misc]
        for index in (indexes if is_plain else ())
    ]
    try:
        for index in indexes:
            yield event(chunk(index, {"role": "assistant", "content": ""}))
        async for index, delta in answers.deltas():
            if is_plain and isinstance(delta, ContentDelta):
                yield content_events[index](delta.text)
                continue
            if delta is not None:
                yield event(chunk(index, _delta(delta)))
                continue
            completion = answers.completion(index)
            yield event(chunk(index, {}, completion.finish_reason) | {"timings": timings([completion])})
        if has_usage:
            done = answers.so_far()
            yield event(with_usage(head, [], done, ask.count))
        yield DONE
    except ApiError as error:
        yield event(openai_error(error))


def _delta(delta: "Delta") -> dict[str, Any]:
    if isinstance(delta, ReasoningDelta):
        return {"reasoning_content": delta.text}
    if isinstance(delta, ToolCallDelta):
        function = {"name": delta.call.name, "arguments": delta.call.arguments}
        call = {"index": delta.number, "id": delta.call.id, "type": "function", "function": function}
        return {"tool_calls": [call]}
    return {"content": delta.text}
