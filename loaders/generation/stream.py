"""A running generation: its pieces of text, and the result so far."""

import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence, Set
from threading import RLock
from types import TracebackType
from typing import Self

from ..artifact.frozen import Frozen
from ..text.tokenizer import TextStream
from .stopping import StopStrings

# `__anext__` cannot raise StopIteration.
_END = object()


class Timing(Frozen):
    """Seconds, from the start of the call.

    Attributes:
        prefill_s: time to process the prompt and choose the first token.
        decode_s: time from the first token to the last, without time spent by the reader of a stream.
        decode_tokens_per_s: tokens after the first over `decode_s`; 0 where there were none.
    """

    prefill_s: float
    decode_s: float
    decode_tokens_per_s: float


class Completion(Frozen):
    """A prompt's continuation.

    Attributes:
        text: without special tokens and without the stop string.
        token_ids: every token generated, the end token or those of the stop string included.
        prompt_token_ids: the model's input.
        finish_reason: "stop" (an end token or a stop string), "length" (max_tokens, or the cache is full), or
            "unfinished" (a stream that was closed, or has not come to its end).
        timing: of this call.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    timing: Timing


class GenerationState:
    """The state of one generation.

    Attributes:
        text: the pieces yielded so far.
        ids: the generated tokens.
        reason: the `finish_reason` of the `Completion`.
        closing: set from any thread to end the generation before its next token.
    """

    def __init__(self) -> None:
        self.text, self.reason, self.closing = "", "unfinished", False
        self.ids: list[int] = []
        self._started = self._first = self._last = time.perf_counter()
        self._elsewhere = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self._started = self._first = self._last = time.perf_counter()

    def add(self, token: int) -> None:
        """Record a token that was just generated."""
        self._last = time.perf_counter() - self._elsewhere
        if not self.ids:
            self._first = self._last
        self.ids.append(token)

    def give(self, piece: str) -> Iterator[str]:
        """Yield a piece of text, unless it is empty. Exclude its reader's time from the timing."""
        self.text += piece
        if piece:
            given = time.perf_counter()
            yield piece
            self._elsewhere += time.perf_counter() - given

    def completion(self, prompt: Sequence[int]) -> Completion:
        """The result so far."""
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
    """Yield the text of a generation.

    Args:
        tokens: begins the generation, and returns an iterator of ids.
        decoder: converts ids to text.
        stops: the stop strings.
        ends: ids that end the generation.
        state: updated with each token.
    """
    if state.closing:  # by a task that was cancelled before the first step
        return
    state.begin()
    for token in tokens():
        state.add(token)
        if token in ends:
            state.reason = "stop"
            break
        piece, stopped = stops.push(decoder.push(token))
        yield from state.give(piece)
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
    yield from state.give(tail if stopped else tail + stops.flush())


class Stream(Iterator[str], AsyncIterator[str]):
    """A running generation: iterate it for pieces of text, then read `completion`.

    No piece holds a broken character or a part of a stop string. The first piece starts the work, and each piece is
    computed when it is asked for. The memory of the cache is freed at the end, by `close`, at the end of a ``with``
    block, or with the last reference to the stream, whichever comes first.

    ``async for`` computes in a worker thread of the event loop's default executor, and so never blocks the loop.
    A cancelled task ends the generation before its next token.

    A stream may be passed between threads. Two threads that read at once get different pieces, one after the other;
    `close` waits for the current step.
    """

    # The generator must not refer to the stream: a cycle would keep the cache until the next garbage collection.
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
        """End the generation and free its cache; do nothing if called again."""
        self._state.closing = True
        with self._lock:
            self._pieces.close()

    def finish(self) -> Completion:
        """Generate the rest, and return the whole result."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The result so far, without generating more.

        The `finish_reason` of a stream that has not come to its end is "unfinished".
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
        """Do as `close`, without blocking the event loop."""
        import asyncio

        self._state.closing = True
        await asyncio.to_thread(self.close)
