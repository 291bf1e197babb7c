"""A running generation: its pieces of text, and the result so far."""

import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..artifact.frozen import Frozen
from .scheduler import Scheduler
from .sequence import TokenSequence

if TYPE_CHECKING:
    from ..text.answer_parser import Delta, ReasoningDelta, ToolCallDelta
    from ..text.tool_calls import ToolCall
    from .logprobs import TokenLogprob

    # Content is a plain `str`, so that a stream without a parser need not import `ContentDelta`.
    _Part = str | ReasoningDelta | ToolCallDelta


class Timing(Frozen):
    """The duration of a generation. It is immutable.

    Only `queue_s` includes the time that readers spend between reads. Generations that run together share their steps,
    and each generation counts a shared step in full.

    Attributes:
        prefill_s: seconds from the start of reading the prompt to the first token.
        decode_s: seconds from the first token to the last.
        decode_tokens_per_s: number of tokens after the first, divided by `decode_s`; 0 if there are none.
        queue_s: seconds from submission to the start of reading the prompt. A stream is submitted at its first read.
        cached_tokens: number of tokens at the start of the prompt whose keys and values came from an earlier prompt or
            answer. The model did not read these tokens.
    """

    prefill_s: float
    decode_s: float
    decode_tokens_per_s: float
    queue_s: float = 0.0
    cached_tokens: int = 0


class Completion(Frozen):
    """The continuation of a prompt. It is immutable.

    Attributes:
        text: the text, without special tokens and the stop string. For a chat, it excludes reasoning and tool calls.
        token_ids: all generated tokens, including the end token and the tokens of the stop string.
        prompt_token_ids: tokens of the prompt.
        finish_reason: "stop" (an end token or a stop string), "tool_calls" (the same, with tool calls in the answer),
            "length" (max_tokens, max_length, a full context, or a constraint that no token of the vocabulary can
            continue), "timeout" (timeout_s), or "unfinished" (a stream that was closed or is still running).
        timing: duration of the generation.
        logprobs: log-probability of each token in `token_ids`; empty without `SamplingParams.logprobs`.
        prompt_logprobs: log-probability of each token of the prompt read so far; None for the first token, because the
            model does not predict it. Empty without `SamplingParams.prompt_logprobs`.
        reasoning: the reasoning before the answer to a chat.
        tool_calls: the tool calls of the answer to a chat.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    timing: Timing
    logprobs: "tuple[TokenLogprob, ...]" = ()
    prompt_logprobs: "tuple[TokenLogprob | None, ...]" = ()
    reasoning: str = ""
    tool_calls: "tuple[ToolCall, ...]" = ()

    def message(self) -> dict[str, Any]:
        """Return the answer as a message of the conversation, in OpenAI's form."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


def completion_of(
    sequence: TokenSequence,
    text: str,
    token_ids: Sequence[int],
    *,
    reasoning: str = "",
    tool_calls: "Sequence[ToolCall]" = (),
    is_read: bool = True,
) -> Completion:
    """Return the result of a sequence.

    Args:
        sequence: the sequence, which may still run.
        text: the text of the pieces read so far.
        token_ids: the tokens of these pieces.
        reasoning: the reasoning in these pieces.
        tool_calls: the tool calls in these pieces.
        is_read: True if the reader has taken all parts of the answer that the parser has found.
    """
    is_complete = is_read and sequence.ended and not sequence.unread
    reason = sequence.reason if is_complete else "unfinished"
    decode, tokens = sequence.last - sequence.first, sequence.generated
    timing = Timing(
        prefill_s=sequence.first - sequence.began,
        decode_s=decode,
        decode_tokens_per_s=(tokens - 1) / decode if tokens > 1 and decode else 0.0,
        queue_s=sequence.queue_s,
        cached_tokens=sequence.cached_tokens,
    )
    return Completion(
        text=text,
        token_ids=tuple(token_ids),
        prompt_token_ids=tuple(sequence.tokens[: sequence.prompt_tokens]),
        finish_reason="tool_calls" if tool_calls and reason == "stop" else reason,
        timing=timing,
        logprobs=tuple(sequence.sampler.logprobs[: len(token_ids)]),
        prompt_logprobs=() if sequence.prompt_logprobs is None else sequence.prompt_logprobs.result(),
        reasoning=reasoning,
        tool_calls=tuple(tool_calls),
    )


class Stream(Iterator[str], AsyncIterator[str]):
    """A running generation: iterate over its pieces of text, then read `completion`.

    For the answer to a chat, iteration yields the content alone; `events` yields reasoning and tool calls as well.

    A piece contains no incomplete character and no part of a stop string. The generation starts when the first piece is
    read. While a reader waits for a piece, its thread computes, or waits for another thread that computes. Streams of
    one model advance together. A stream pauses when 64 pieces wait for its reader, unless another stream waits and no
    slot is free; the last call before the pause may add the further tokens of a draft. The slot in the KV cache is
    freed at the end of the generation, by `close`, at the end of a ``with`` block, or with the last reference to the
    stream, whichever comes first.

    ``async for`` computes in a worker thread of the event loop's default executor, so it never blocks the loop. All
    streams of the loop share that thread, which computes ahead while the loop is busy. Cancelling the task ends the
    generation before its next token.

    A stream is thread-safe. Threads that read concurrently receive different pieces. `close` may be called from any
    thread, and waits for the current step. After a failure, every read raises the error of the failure.
    """

    # The scheduler and the sequence must not refer to the stream, so that dropping the last reference frees the slot.
    def __init__(self, scheduler: Scheduler, sequence: TokenSequence) -> None:
        self._scheduler, self._sequence, self._parser = scheduler, sequence, sequence.parser
        self._lock = Lock()
        self._text: list[str] = []
        self._ids: list[int] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._parsed: deque[_Part] = deque()  # parts that the parser has found and no reader has taken
        self._is_parsed = sequence.parser is None  # True once the parser has seen the end of the answer

    def end_within(self, seconds: float) -> None:
        """Set the time limit of a stream that has not started: seconds from its first read."""
        self._sequence.timeout_s = seconds

    @property
    def is_split(self) -> bool:
        """True if the answer is split into content, reasoning and tool calls."""
        return self._parser is not None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while (part := self._next()) is not None:
            if isinstance(part, str):
                return part
        raise StopIteration

    def events(self) -> "Iterator[Delta]":
        """Yield the unread part of the answer as pieces of content, pieces of reasoning, and complete tool calls."""
        while (part := self._next()) is not None:
            yield _event(part)

    async def aevents(self) -> "AsyncIterator[Delta]":
        """Yield the same pieces as `events`, without blocking the event loop."""
        while (part := await self._anext()) is not None:
            yield _event(part)

    def _next(self) -> "_Part | None":
        """Return the next part of the answer; None at the end of the answer."""
        sequence = self._sequence
        if sequence.closing:
            return None
        self._start()
        while (part := self._take()) is None and not self._is_over():
            self._scheduler.advance(sequence.has_news)
        return part

    def _is_over(self) -> bool:
        """Return True if all parts of the answer have been read; raise the error of a failed sequence."""
        sequence = self._sequence
        if not sequence.ended or sequence.unread or not self._is_parsed:
            return False
        if sequence.error is not None:
            raise sequence.error
        return True

    def _start(self) -> None:
        with self._lock:
            if not self._sequence.submitted:
                self._scheduler.submit(self._sequence)

    def _take(self) -> "_Part | None":
        """Return the next part that is ready; None if no part is ready."""
        with self._lock:
            while not self._parsed and self._parse_next():
                pass
            if not self._parsed:
                return None
            part = self._parsed.popleft()
            if isinstance(part, str):
                self._text.append(part)
            else:
                self._record(part)
            return part

    def _record(self, part: "ReasoningDelta | ToolCallDelta") -> None:
        # A lazy import, because answers of plain content do not need it.
        from ..text.answer_parser import ReasoningDelta

        if isinstance(part, ReasoningDelta):
            self._reasoning.append(part.text)
        else:
            self._calls.append(part.call)

    def _parse_next(self) -> bool:
        """Parse one unread piece, or the end of the answer; return False if there is neither."""
        sequence, parser = self._sequence, self._parser
        has_ended = sequence.ended  # read before `unread`, which may grow until the end
        if sequence.unread:
            token, text = sequence.unread.popleft()
            is_echo = token is None and not self._ids
            if token is not None:
                self._ids.append(token)
            if parser is None or is_echo:
                self._parsed.extend([text] if text else ())
            else:
                self._parsed.extend(map(_part, parser.push(text)))
            return True
        if parser is None or self._is_parsed or not has_ended:
            return False
        self._is_parsed = True
        self._parsed.extend(map(_part, parser.finish()))
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # While Python shuts down, do nothing, because imports fail and the end of the process frees the slot anyway.
        if self._sequence.submitted and not self._sequence.ended and not sys.is_finalizing():
            self._scheduler.cancel(self._sequence)

    def close(self) -> None:
        """End the generation and free its slot in the KV cache; further calls have no effect."""
        self._scheduler.close(self._sequence)

    def finish(self) -> Completion:
        """Generate the rest of the answer, and return the complete result."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The result of the pieces read so far; this property does not continue the generation.

        The `finish_reason` of a running stream is "unfinished".
        """
        with self._lock:
            return completion_of(
                self._sequence,
                "".join(self._text),
                self._ids,
                reasoning="".join(self._reasoning),
                tool_calls=self._calls,
                is_read=self._is_parsed and not self._parsed,
            )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while (part := await self._anext()) is not None:
            if isinstance(part, str):
                return part
        raise StopAsyncIteration

    async def _anext(self) -> "_Part | None":
        import asyncio

        if self._sequence.closing:
            return None
        self._start()
        try:
            while (part := self._take()) is None and not self._is_over():
                await self._scheduler.async_readers.wait(self._scheduler, self._sequence)
        except asyncio.CancelledError:
            self._scheduler.cancel(self._sequence)
            raise
        return part

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the stream as `close` does, without blocking the event loop."""
        import asyncio

        self._scheduler.cancel(self._sequence)
        await asyncio.to_thread(self.close)


def _part(delta: "Delta") -> "_Part":
    from ..text.answer_parser import ContentDelta

    return delta.text if isinstance(delta, ContentDelta) else delta


def _event(part: "_Part") -> "Delta":
    from ..text.answer_parser import ContentDelta

    return ContentDelta(part) if isinstance(part, str) else part
