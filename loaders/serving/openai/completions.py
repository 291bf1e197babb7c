"""``/v1/completions``."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ...text.answer_parser import ContentDelta
from ..answers import Answers, Ask, Services, answering
from ..errors import ApiError, openai_error
from ..requests import EventReply, Reply, Request, event, json_reply, text_event
from ..schema import parse
from .schemas import CompletionRequest
from .translate import completion_ask
from .usage import DONE, fingerprint, timings, with_usage

if TYPE_CHECKING:
    from ...generation.logprobs import TokenLogprob
    from ...generation.stream import Completion

_LEAST = -9999.0


async def completions(services: Services, request: Request, body: bytes) -> Reply | EventReply:
    """Continue prompts."""
    given, ask = await services.prepare(request, lambda: _read(body))
    async with AsyncExitStack() as stack:
        answers = await stack.enter_async_context(answering(services, request, ask))
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": ask.model,
            "system_fingerprint": fingerprint(answers.model),
        }
        if given.stream:
            return EventReply(events=_events(answers, head, ask, given), closing=stack.pop_all())
        # In a thread, because log-probabilities can make megabytes.
        done = await answers.completions()
        return await asyncio.to_thread(_reply, done, head, answers, ask, given)


def _read(body: bytes) -> tuple[CompletionRequest, Ask]:
    given = parse(CompletionRequest, body)
    return given, completion_ask(given)


def _reply(
    completions: "Sequence[Completion]",
    head: Mapping[str, Any],
    answers: Answers,
    ask: Ask,
    given: CompletionRequest,
) -> Reply:
    done = [_trimmed(completion, answers, given) for completion in completions]
    choices = [_choice(index, completion, answers, given) for index, completion in enumerate(done)]
    return json_reply(with_usage(head, choices, done, ask.count))


def _trimmed(completion: "Completion", answers: Answers, given: CompletionRequest) -> "Completion":
    """If the request asks for no tokens, return the answer without the one token that was generated."""
    if given.max_tokens != 0:
        return completion
    text = answers.model.tokenizer.decode(completion.prompt_token_ids)
    return replace(completion, text=text, token_ids=(), logprobs=(), finish_reason="length")


def _choice(
    index: int, completion: "Completion", answers: Answers, given: CompletionRequest
) -> dict[str, Any]:
    known = (
        None if given.logprobs is None else _Logprobs(answers.model.tokenizer.token_text).further(completion)
    )
    return {
        "index": index,
        "text": completion.text,
        "logprobs": known,
        "finish_reason": completion.finish_reason,
    }


class _Logprobs:
    """The log-probabilities of one answer, as the completions endpoint returns them.

    Args:
        text_of: a function from a token to its text.
    """

    def __init__(self, text_of: Callable[[int], str]) -> None:
        self._text_of = text_of
        self._sent = self._offset = 0

    def further(self, completion: "Completion") -> dict[str, Any]:
        """Return the log-probabilities of the tokens since the last call."""
        tokens = (*completion.prompt_logprobs, *completion.logprobs)[self._sent :]
        self._sent += len(tokens)
        # The model does not predict the first token of the prompt.
        texts = [
            self._text_of(completion.prompt_token_ids[0]) if token is None else token.text for token in tokens
        ]
        *offsets, self._offset = accumulate(map(len, texts), initial=self._offset)
        return {
            "tokens": texts,
            "token_logprobs": [None if token is None else max(token.logprob, _LEAST) for token in tokens],
            "top_logprobs": [None if token is None else _top(token) for token in tokens],
            "text_offset": offsets,
        }


def _top(token: "TokenLogprob") -> dict[str, float]:
    """Return the log-probabilities of the likeliest tokens and of the chosen one, by text.

    If several tokens have the same text, the likeliest of them counts.
    """
    found: dict[str, float] = {}
    for each in (*token.top, token):
        found.setdefault(each.text, max(each.logprob, _LEAST))
    return found


async def _events(
    answers: Answers, head: Mapping[str, Any], ask: Ask, given: CompletionRequest
) -> AsyncIterator[bytes]:
    """Yield the events of streamed answers."""
    has_usage = bool(given.stream_options and given.stream_options.include_usage)
    spare = {"usage": None} if has_usage else {}
    known = [_Logprobs(answers.model.tokenizer.token_text) for _ in answers.streams]

    def chunk(index: int, text: str, reason: str | None) -> dict[str, Any]:
        found = None if given.logprobs is None else known[index].further(answers.completion(index))
        choice = {"index": index, "text": text, "logprobs": found, "finish_reason": reason}
        return {**head, "choices": [choice], **spare}

    is_plain = given.logprobs is None
    text_events = [
        text_event(lambda text, i=index: chunk(i, text, None))  # type: ignore[misc]
        for index in (range(len(answers.streams)) if is_plain else ())
    ]
    try:
        async for index, delta in answers.deltas():
            if is_plain and isinstance(delta, ContentDelta):
                yield text_events[index](delta.text)
            elif delta is None:
                completion = answers.completion(index)
                yield event(chunk(index, "", completion.finish_reason) | {"timings": timings([completion])})
            elif isinstance(delta, ContentDelta):
                yield event(chunk(index, delta.text, None))
        if has_usage:
            done = answers.so_far()
            yield event(with_usage(head, [], done, ask.count))
        yield DONE
    except ApiError as error:
        yield event(openai_error(error))
