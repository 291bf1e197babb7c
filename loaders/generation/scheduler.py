"""Run any number of sequences in the slots of KV caches; sequences join and leave between steps (continuous batching).

A step is one call of the engine. It reads a chunk of one prompt, or computes the next token of every decoding sequence
of one KV cache. A round consists of one chunk, and of one decode step for each KV cache, so a sequence waits for at
most one chunk between two of its tokens. Prompts are read one after the other, in the order of arrival.

The scheduler starts no threads. The threads that read sequences run its steps, one thread at a time. The other threads
wait, and a decode step advances their sequences as well.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen
from . import calls
from .engine import Engine, KVCache
from .sequence import Batch, TokenSequence
from .stopping import DeadEnd

if TYPE_CHECKING:
    from .async_readers import AsyncReaders
    from .drafts import CallTimes

# Maximum number of tokens of a prompt that are read between two tokens of other sequences.
_CHUNK = 128
# Seconds after which a thread that waits for another thread's step checks the lock again.
_LONGEST_WAIT_S = 1.0
# Seconds between a reader's attempts to run a step while no sequence can advance.
_IDLE_S = 0.005


class Prefixes(Protocol):
    """A store of the keys and values of earlier sequences.

    Attributes:
        every_chunk: True if each chunk of a prompt must be captured before the next chunk overwrites it.
        spare_bytes: the scheduler keeps an idle KV cache only if it takes at most this many bytes.
    """

    every_chunk: bool

    @property
    def spare_bytes(self) -> int: ...

    def restore(self, tokens: Sequence[int], cache: KVCache, slot: int) -> int:
        """Write the keys and values of the longest known prefix to a slot's first positions.

        Args:
            tokens: the prompt without its last token. The model must read the last token, to compute its logits.
            cache: the KV cache to write to.
            slot: the sequence's slot.

        Returns:
            The length of the prefix; 0 if none is known.
        """

    def capture(
        self, tokens: Sequence[int], cache: KVCache, slot: int, *, restored: int, written: int
    ) -> None:
        """Copy the keys and values of a slot to the store.

        Args:
            tokens: the tokens whose keys and values are in the slot's first positions.
            cache: the KV cache to read from.
            slot: the sequence's slot.
            restored: the result of `restore` for this sequence.
            written: number of positions that calls with drafts have filled. It exceeds ``len(tokens)`` if drafts were
                rejected.
        """


class SchedulerStats(Frozen):
    """Counts of a scheduler's sequences and slots, and of its work so far.

    Attributes:
        running: sequences that occupy a slot.
        waiting: sequences whose prompt the model has not begun to read.
        slots: slots of the KV caches in use.
        steps: calls of the engine.
        prompt_tokens: tokens of prompts that the model read.
        cached_tokens: tokens of prompts whose keys and values came from prefixes instead.
        tokens: generated tokens.
    """

    running: int
    waiting: int
    slots: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    tokens: int


class Scheduler:
    """The sequences of one engine, their KV caches, and the step that advances them.

    A KV cache is created when a sequence needs a slot and none is free. When the last sequence in a cache ends, the
    scheduler frees the cache, or keeps it for the next sequence. Writing to newly allocated memory takes several times
    as long as writing to a kept cache. Threads may share a scheduler.

    Args:
        engine: the engine to run.
        caches: maximum number of KV caches; further sequences wait for a slot. None sets no maximum, so the
            scheduler creates another KV cache whenever all slots are taken.
        prefixes: the store of keys and values to reuse; without one, the model reads every prompt from its start.
    """

    def __init__(
        self, engine: Engine, *, caches: int | None = None, prefixes: Prefixes | None = None
    ) -> None:
        self._engine, self._most_caches, self._prefixes = engine, caches, prefixes
        self._chunk = max((b for b in engine.buckets if b <= _CHUNK), default=engine.buckets[0])
        # Only the thread that holds the lock changes the state below, with one exception: any thread may append to the
        # first three deques, and remove waiters.
        self._lock = Lock()
        self._arrived: deque[TokenSequence] = deque()
        self._cancelled: deque[TokenSequence] = deque()
        self._waiters: deque[Lock] = deque()
        self._waiting: deque[TokenSequence] = deque()
        self._reading: tuple[TokenSequence, Batch] | None = None  # the sequence whose prompt is being read
        self._batches: list[Batch] = []
        self._spare: Batch | None = None  # an idle KV cache
        self._round: deque[Batch] = deque()  # the batches that have not decoded in this round yet
        self._timed: dict[TokenSequence, float] = {}
        self._broken: list[BaseException] = []
        self._times: CallTimes | None = None
        self._clock = 0.0
        self._steps = self._prompt_tokens = self._cached_tokens = self._tokens = 0

    @cached_property
    def async_readers(self) -> "AsyncReaders":
        """The asynchronous readers that wait for sequences."""
        # A lazy import, because few programs read asynchronously.
        from .async_readers import AsyncReaders

        return AsyncReaders()

    # --- for clients --------------------------------------------------------------------------------------------

    def submit(self, sequence: TokenSequence) -> None:
        """Append a sequence to the queue, and return without blocking."""
        sequence.submit()
        self._arrived.append(sequence)

    def cancel(self, sequence: TokenSequence) -> None:
        """End a sequence before its next token, without waiting.

        If another thread is running a step, that thread ends the sequence after the step.
        """
        sequence.closing = True
        self._cancelled.append(sequence)
        self._follow_up()

    def close(self, sequence: TokenSequence) -> None:
        """End a sequence, and return once its slot is free.

        The sequence's `notify` must not call this method.
        """
        sequence.closing = True
        if not sequence.ended:
            self._cancelled.append(sequence)
            self._work_until(lambda: sequence.ended, self._sweep)

    def advance(self, is_done: Callable[[], bool]) -> None:
        """Run steps, or wait while another thread runs them, until a condition holds.

        Args:
            is_done: a function that returns True once the submitted sequences have advanced far enough.
        """
        self._work_until(is_done, self._step)

    def step(self) -> bool:
        """Run one step; return False if no sequence could advance.

        An error in the engine fails all sequences of the KV cache. An error in a sampler fails only the sampler's
        sequence. The readers of the failed sequences raise these errors, and this method does not. An interruption such
        as KeyboardInterrupt fails all sequences that occupy a slot, and this method raises the interruption.
        """
        try:
            with self._lock:
                return self._step()
        finally:
            self._follow_up()

    def stats(self) -> SchedulerStats:
        """Return the current counts, without waiting for a running step."""
        batches = list(self._batches)
        return SchedulerStats(
            running=sum(len(batch.running()) for batch in batches),
            waiting=len(self._waiting) + len(self._arrived),
            slots=len(batches) * self._engine.slots,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            tokens=self._tokens,
        )

    # --- threads ------------------------------------------------------------------------------------------------

    def _work_until(self, is_done: Callable[[], bool], work: Callable[[], bool]) -> None:
        while not is_done():
            if self._lock.locked():
                self._wait()
                continue
            try:
                with self._lock:
                    is_idle = not is_done() and not work()
            finally:
                self._follow_up()
            if is_idle:  # every slot belongs to a sequence whose reader lags behind
                time.sleep(_IDLE_S)

    def _wait(self) -> None:
        """Wait until another thread releases the lock, or a timeout expires."""
        waiter = Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        # A thread that releases the lock after this check finds the waiter in the deque, and wakes it.
        if self._lock.locked():
            # The timeout is needed because Ctrl-C may interrupt that thread before it wakes the waiters.
            waiter.acquire(timeout=_LONGEST_WAIT_S)

    def _follow_up(self) -> None:
        """End sequences that were cancelled while the lock was held, and wake the waiting threads.

        A woken thread returns if its sequence has advanced. One of the other woken threads runs the next step.
        """
        # Acquire without blocking, because a finaliser may call this method in the thread that holds the lock.
        while self._cancelled and self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()
        for _ in range(len(self._waiters)):
            try:
                self._waiters.popleft().release()
            except IndexError:  # another thread woke them
                return

    # --- under the lock -----------------------------------------------------------------------------------------

    def _step(self) -> bool:
        began = time.perf_counter()
        try:
            self._sweep()
            is_busy = self._next_call(began)
            self._steps += is_busy
            return is_busy
        except BaseException:
            for batch in list(self._batches):
                self._break(batch, _interrupted())
            raise
        finally:
            self._clock += time.perf_counter() - began
            if self._broken:
                self._forget_frames()

    def _sweep(self) -> bool:
        """Queue the sequences that have arrived, and end the sequences that were cancelled or have run out of time.

        Always return True, as `_step` does after progress, so that `_work_until` does not sleep.
        """
        while self._arrived:
            sequence = self._arrived.popleft()
            if sequence.ended:
                continue
            self._waiting.append(sequence)
            if (expiry := sequence.expires_at()) is not None:
                self._timed[sequence] = expiry
        while self._cancelled:
            # Remove the sequence after `_end`, so that the next sweep tries again if Ctrl-C interrupts `_end`.
            self._end(self._cancelled[0])
            self._cancelled.popleft()
        if self._timed:
            now = time.perf_counter()
            for sequence in [s for s, expiry in self._timed.items() if expiry <= now]:
                self._guard(sequence, partial(sequence.cut, "timeout"))
                self._end(sequence)
        if self._broken:
            self._forget_frames()
        return True

    def _next_call(self, began: float) -> bool:
        """Decode the next batch of the round, or read a chunk of a prompt; return False if no sequence can advance."""
        is_full = self._lacks_slots()
        for _ in range(2):
            while self._round:
                batch = self._round.popleft()
                if sequences := batch.decoding(includes_paused=is_full):
                    self._decode(batch, sequences, began)
                    return True
            self._round.extend(self._batches)
            if self._reading is None:
                self._reading = self._begin_prompt(began)
            if self._reading is not None:
                self._read_chunk(*self._reading, began)
                return True
        return False

    def _lacks_slots(self) -> bool:
        """Return True if a sequence waits for a slot and none is free.

        In this case, no sequence may pause. The reader of the waiting sequence may run in the thread that also reads
        the sequences with a slot. If these sequences paused until that thread reads them, no slot would become free.
        """
        return (
            bool(self._waiting)
            and len(self._batches) == self._most_caches
            and all(None not in batch.sequences for batch in self._batches)
        )

    def _begin_prompt(self, began: float) -> tuple[TokenSequence, Batch] | None:
        """Give a slot to the first queued sequence; return the sequence and its batch, or None if either is missing."""
        while self._waiting:
            batch = next((b for b in self._batches if None in b.sequences), None)
            if batch is None and len(self._batches) == self._most_caches:
                return None
            # Dequeue the sequence at the end, because Ctrl-C may interrupt the creation of a cache.
            sequence = self._waiting[0]
            try:
                if batch is None:
                    batch = self._spare or Batch(self._engine.new_cache(), self._engine.slots)
                    self._batches.append(batch)
                    self._spare = None
                self._join(sequence, batch, began)
            except Exception as error:
                self._fail(sequence, error)
                continue
            self._waiting.popleft()
            return sequence, batch
        return None

    def _join(self, sequence: TokenSequence, batch: Batch, began: float) -> None:
        batch.add(sequence)
        sequence.queue_s = time.perf_counter() - sequence.submitted_at
        sequence.began = sequence.first = sequence.last = self._now(began)
        if self._prefixes is not None and sequence.prompt_logprobs is None:
            known = self._prefixes.restore(sequence.tokens[:-1], batch.cache, sequence.slot)
            sequence.filled = sequence.cached_tokens = known
            self._cached_tokens += known

    def _read_chunk(self, sequence: TokenSequence, batch: Batch, began: float) -> None:
        """Read the next chunk of a prompt; after the last chunk, choose the first token of the answer."""
        before, others_wait = sequence.filled, any(b.decoding() for b in self._batches)
        most = self._chunk if others_wait else self._engine.buckets[-1]
        try:
            results = calls.read_chunk(self._engine, sequence, batch, most)
        except Exception as error:
            self._break(batch, error)
            return
        self._prompt_tokens += sequence.filled - before
        if sequence.filled == sequence.prompt_tokens:
            self._reading = None
            sequence.first = self._now(began)
            self._take([sequence], results, began)
            if self._waiting and not sequence.ended:
                self._capture(sequence, batch)  # the next prompt may share a prefix with this one
        elif self._prefixes is not None and self._prefixes.every_chunk:
            self._capture(sequence, batch)

    def _decode(self, batch: Batch, sequences: list[TokenSequence], began: float) -> None:
        """Compute the next token of each sequence, or several tokens of a single sequence that has a draft."""
        draft = self._draft(sequences[0]) if len(sequences) == 1 else []
        started = time.perf_counter()
        try:
            if draft:
                results = calls.verify(self._engine, sequences[0], batch, draft)
            else:
                results = calls.decode(self._engine, sequences, batch)
        except Exception as error:
            self._break(batch, error)
            return
        if self._times is not None and len(sequences) == 1:
            self._times.add(1 + len(draft), time.perf_counter() - started)
        self._take(sequences, results, began, draft)

    def _draft(self, sequence: TokenSequence) -> list[int]:
        """Return a draft of the next tokens; empty if decoding one token is expected to be faster."""
        most = min(self._engine.score_tokens, sequence.tokens_left) - 1
        if not sequence.wants_drafts or most < 1:
            return []
        if sequence.drafts is None:
            # A lazy import, because an answer of one token needs no drafts.
            from .drafts import CallTimes, Drafts

            self._times = self._times or CallTimes(self._engine.score_tokens)
            sequence.drafts = Drafts(self._times)
        return sequence.drafts.propose(sequence.tokens, most)

    def _take(
        self, sequences: list[TokenSequence], results: calls.Results, began: float, draft: Sequence[int] = ()
    ) -> None:
        """Choose the next tokens of each sequence from its row of results; a draft requires a single sequence."""
        now = self._now(began)
        for row, sequence in enumerate(sequences):
            sequence.last, before = now, sequence.generated
            try:
                calls.take(sequence, results, row, draft)
            except DeadEnd:
                self._guard(sequence, partial(sequence.cut, "length"))
            except Exception as error:
                self._fail(sequence, error)
            self._tokens += sequence.generated - before
            if sequence.is_finished:
                self._end(sequence)

    def _now(self, began: float) -> float:
        """Return the current time on the scheduler's clock; `began` is the `time.perf_counter` at the step's start."""
        return self._clock + time.perf_counter() - began

    # --- ends ---------------------------------------------------------------------------------------------------

    def _end(self, sequence: TokenSequence) -> None:
        """Free a sequence's slot, remove the sequence from all queues, and notify its reader."""
        if sequence.ended:
            return
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if self._reading is not None and self._reading[0] is sequence:
            self._reading = None
        self._timed.pop(sequence, None)
        if (batch := sequence.batch) is not None:
            if sequence.error is None:
                self._capture(sequence, batch)
            batch.remove(sequence)
            if not batch.running():
                self._batches.remove(batch)
                if sequence.error is None and self._may_keep(batch):
                    self._spare = batch
                self._round = deque(b for b in self._round if b is not batch)
        sequence.ended = True
        self._guard(sequence, sequence.tell)

    def _may_keep(self, batch: Batch) -> bool:
        return (
            self._prefixes is not None
            and self._engine.filled_bytes(batch.filled) <= self._prefixes.spare_bytes
        )

    def _fail(self, sequence: TokenSequence, error: BaseException) -> None:
        sequence.error = error
        self._broken.append(error)
        self._end(sequence)

    def _break(self, batch: Batch, error: BaseException) -> None:
        """Fail all sequences of a KV cache, because a failed call may have consumed the cache's arrays."""
        for sequence in batch.running():
            self._fail(sequence, error)

    def _capture(self, sequence: TokenSequence, batch: Batch) -> None:
        if (prefixes := self._prefixes) is not None and sequence.filled:
            self._guard(
                sequence,
                lambda: prefixes.capture(
                    sequence.tokens[: sequence.filled],
                    batch.cache,
                    sequence.slot,
                    restored=sequence.cached_tokens,
                    written=sequence.written,
                ),
            )

    def _guard(self, sequence: TokenSequence, work: Callable[[], object]) -> None:
        """Call `work` for one sequence; an exception fails only this sequence."""
        try:
            work()
        except Exception as error:
            sequence.error = error
            self._broken.append(error)

    def _forget_frames(self) -> None:
        """Clear the local variables in the tracebacks of failures, because these variables keep KV caches in memory."""
        from traceback import clear_frames

        while self._broken:
            if (trace := self._broken.pop().__traceback__) is None:
                continue
            clear_frames(trace)
            caller = trace.tb_frame.f_back
            with suppress(RuntimeError):  # raised at the first frame that still runs
                while caller is not None:
                    caller.clear()
                    caller = caller.f_back


def _interrupted() -> PrecastError:
    return PrecastError(
        "generation: interrupted while the model computed, so the answer is incomplete; ask again."
    )
