"""A running generation: its pieces of text, and the result so far."""

from collections.abc import AsyncIterator, Iterator, Sequence
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..artifact.frozen import Frozen
from .scheduler import Scheduler
from .sequence import TokenSequence

if TYPE_CHECKING:
    from .logprobs import TokenLogprob

# Marks the end for `__anext__`, where StopIteration is not allowed.
_END = object()


class Timing(Frozen):
    """The duration of a generation. It is immutable.

    The time that the reader of a stream takes is not counted, except in `queue_s`. Generations that run together share
    their steps, and each of them counts the whole step.

    Attributes:
        prefill_s: seconds from the start of reading the prompt to the first token.
        decode_s: seconds from the first token to the last.
        decode_tokens_per_s: number of tokens after the first, divided by `decode_s`; 0 without such tokens.
        queue_s: seconds from the first read of the stream to the start of reading the prompt.
        cached_tokens: tokens of the prompt whose keys and values were known, so that the model did not read them.
    """

    prefill_s: float
    decode_s: float
    decode_tokens_per_s: float
    queue_s: float = 0.0
    cached_tokens: int = 0


class Completion(Frozen):
    """The continuation of a prompt. It is immutable.

    Attributes:
        text: the text, without special tokens and the stop string.
        token_ids: all generated tokens, including the end token and those of the stop string.
        prompt_token_ids: tokens of the prompt.
        finish_reason: "stop" (an end token or a stop string), "length" (max_tokens, max_length or a full context),
            "timeout" (timeout_s), or "unfinished" (a stream that was closed or is still running).
        timing: duration of the generation.
        logprobs: log-probability of each of `token_ids`; empty without `SamplingParams.logprobs`.
        prompt_logprobs: log-probability of each of `prompt_token_ids` read so far, None for the first, which the model
            does not predict; empty without `SamplingParams.prompt_logprobs`.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    timing: Timing
    logprobs: "tuple[TokenLogprob, ...]" = ()
    prompt_logprobs: "tuple[TokenLogprob | None, ...]" = ()


def completion_of(sequence: TokenSequence, text: str, token_ids: Sequence[int]) -> Completion:
    """Return the result of a sequence.

    Args:
        sequence: the sequence, which may still run.
        text: the text of the pieces read so far.
        token_ids: their tokens.
    """
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
        finish_reason=sequence.reason if sequence.ended and not sequence.unread else "unfinished",
        timing=timing,
        logprobs=tuple(sequence.sampler.logprobs[: len(token_ids)]),
        prompt_logprobs=() if sequence.prompt_logprobs is None else sequence.prompt_logprobs.result(),
    )


class Stream(Iterator[str], AsyncIterator[str]):
    """A running generation: iterate over its pieces of text, then read `completion`.

    A piece contains no incomplete character and no part of a stop string. The generation starts when the first piece is
    read. While the reader waits for a piece, its thread computes, or waits for another thread that computes: streams of
    one model advance together, each by up to 64 tokens ahead of its reader. The place in the KV cache is freed at the
    end of the generation, by `close`, at the end of a ``with`` block, or with the last reference to the stream,
    whichever comes first.

    ``async for`` computes in a worker thread of the event loop's default executor, so it never blocks the loop. A
    cancelled task ends the generation before its next token.

    A stream is thread-safe: threads that read concurrently get different pieces, one after the other. `close` may be
    called from any thread, and waits for the current step. After a failure every read raises its error.
    """

    # The scheduler and the sequence must not refer to the stream: its last reference frees the slot.
    def __init__(self, scheduler: Scheduler, sequence: TokenSequence) -> None:
        self._scheduler, self._sequence = scheduler, sequence
        self._lock = Lock()
        self._text: list[str] = []
        self._ids: list[int] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        sequence = self._sequence
        if sequence.closing:
            raise StopIteration
        self._start()
        while (piece := self._take()) is None:
            if sequence.ended and not sequence.unread:
                if sequence.error is not None:
                    raise sequence.error
                raise StopIteration
            self._scheduler.advance(sequence.has_news)
        return piece

    def _start(self) -> None:
        with self._lock:
            if not self._sequence.submitted:
                self._scheduler.submit(self._sequence)

    def _take(self) -> str | None:
        """Return the next piece of text that is ready; None if there is none."""
        with self._lock:
            unread = self._sequence.unread
            while unread:
                token, text = unread.popleft()
                if token is not None:
                    self._ids.append(token)
                if text:
                    self._text.append(text)
                    return text
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._sequence.submitted and not self._sequence.ended:
            self._scheduler.cancel(self._sequence)

    def close(self) -> None:
        """End the generation and free its place in the KV cache; further calls have no effect."""
        self._scheduler.close(self._sequence)

    def finish(self) -> Completion:
        """Generate the rest, and return the complete result."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The result of the pieces read so far; reading it generates nothing.

        The `finish_reason` of a running stream is "unfinished".
        """
        with self._lock:
            return completion_of(self._sequence, "".join(self._text), self._ids)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        import asyncio

        if self._sequence.closing:
            raise StopAsyncIteration
        self._start()
        if (ready := self._take()) is not None:
            return ready
        try:
            piece = await asyncio.to_thread(next, self, _END)
        except asyncio.CancelledError:
            self._scheduler.cancel(self._sequence)
            raise
        if piece is _END:
            raise StopAsyncIteration
        return str(piece)

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
