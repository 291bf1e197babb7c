"""A running generation: its pieces of text, and the result so far."""

import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence, Set
from threading import RLock
from types import TracebackType
from typing import Self

from ..artifact.frozen import Frozen
from ..text.tokenizer import TextStream
from .stopping import StopStrings

# Marks the end for `__anext__`, where StopIteration is not allowed.
_END = object()


class Timing(Frozen):
    """The duration of a generation. It is immutable.

    Attributes:
        prefill_s: seconds from the start to the first token.
        decode_s: seconds from the first token to the last, without the time spent by the reader of a stream.
        decode_tokens_per_s: number of tokens after the first, divided by `decode_s`; 0 without such tokens.
    """

    prefill_s: float
    decode_s: float
    decode_tokens_per_s: float


class Completion(Frozen):
    """The continuation of a prompt. It is immutable.

    Attributes:
        text: the text, without special tokens and the stop string.
        token_ids: all generated tokens, including the end token and those of the stop string.
        prompt_token_ids: tokens of the prompt.
        finish_reason: "stop" (an end token or a stop string), "length" (max_tokens, max_length or a full context), or
            "unfinished" (a stream that was closed or is still running).
        timing: duration of the generation.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    timing: Timing


class GenerationState:
    """The state of one generation. Only `closing` may be set from another thread.

    Attributes:
        text: the text yielded so far.
        ids: the tokens generated so far.
        reason: the `finish_reason` of the `Completion`.
        closing: request to end the generation before its next token.
    """

    def __init__(self) -> None:
        self.text, self.reason, self.closing = "", "unfinished", False
        self.ids: list[int] = []
        self._started = self._first = self._last = time.perf_counter()
        self._reader_s = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self._started = self._first = self._last = time.perf_counter()

    def add(self, token: int) -> None:
        """Record a token that was just generated."""
        self._last = time.perf_counter() - self._reader_s
        if not self.ids:
            self._first = self._last
        self.ids.append(token)

    def emit(self, piece: str) -> Iterator[str]:
        """Yield a piece of text, unless it is empty. The timing excludes the time that the reader takes."""
        self.text += piece
        if piece:
            emitted = time.perf_counter()
            yield piece
            self._reader_s += time.perf_counter() - emitted

    def completion(self, prompt: Sequence[int]) -> Completion:
        """Return the result so far."""
        decode, tokens = self._last - self._first, len(self.ids)
        timing = Timing(
            prefill_s=self._first - self._started,
            decode_s=decode,
            decode_tokens_per_s=(tokens - 1) / decode if tokens > 1 else 0.0,
        )
        return Completion(
            text=self.text,
            token_ids=tuple(self.ids),
            prompt_token_ids=tuple(prompt),
            finish_reason=self.reason,
            timing=timing,
        )


def pieces(
    tokens: Callable[[], Iterator[int]],
    decoder: TextStream,
    stops: StopStrings,
    ends: Set[int],
    state: GenerationState,
) -> Generator[str, None, None]:
    """Yield the text of a generation in pieces.

    Args:
        tokens: a function that starts the generation and returns an iterator of ids.
        decoder: the decoder of ids to text.
        stops: the filter for stop strings.
        ends: ids that end the generation.
        state: the state to update with each token.
    """
    if state.closing:  # a task was cancelled before the first step
        return
    state.begin()
    for token in tokens():
        state.add(token)
        if token in ends:
            state.reason = "stop"
            break
        piece, stopped = stops.push(decoder.push(token))
        yield from state.emit(piece)
        if stopped:
            state.reason = "stop"
            return
        if state.closing:
            return
    else:
        state.reason = "length"
    tail, stopped = stops.push(decoder.finish())
    if stopped:
        state.reason = "stop"
    yield from state.emit(tail if stopped else tail + stops.flush())


class Stream(Iterator[str], AsyncIterator[str]):
    """A running generation: iterate over its pieces of text, then read `completion`.

    A piece contains no incomplete character and no part of a stop string. Each piece is computed on demand. The KV
    cache is freed at the end of the generation, by `close`, at the end of a ``with`` block, or with the last reference
    to the stream, whichever comes first.

    ``async for`` computes in a worker thread of the event loop's default executor, so it never blocks the loop. A
    cancelled task ends the generation before its next token.

    A stream is thread-safe: threads that read concurrently get different pieces, one after the other. `close` may be
    called from any thread, and waits for the current step.
    """

    # The generator must not refer to the stream: a reference cycle would keep the KV cache until the next garbage
    # collection.
    def __init__(
        self, pieces: Generator[str, None, None], prompt_ids: Sequence[int], state: GenerationState
    ) -> None:
        self._pieces, self._prompt, self._state = pieces, tuple(prompt_ids), state
        self._lock = RLock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        with self._lock:
            return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the generation and free its KV cache; further calls have no effect."""
        self._state.closing = True
        with self._lock:
            self._pieces.close()

    def finish(self) -> Completion:
        """Generate the rest, and return the complete result."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The result so far; reading it generates nothing.

        The `finish_reason` of a running stream is "unfinished".
        """
        with self._lock:
            return self._state.completion(self._prompt)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        import asyncio

        try:
            piece = await asyncio.to_thread(next, self, _END)
        except asyncio.CancelledError:
            self._state.closing = True
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

        self._state.closing = True
        await asyncio.to_thread(self.close)
