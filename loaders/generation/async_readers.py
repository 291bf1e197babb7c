"""Asynchronous readers of sequences. In each event loop, a single thread runs the steps for all readers.

With one thread for each reader, the readers of sequences that wait for a slot could occupy all threads of the event
loop's executor. The readers of the sequences in the slots would then never get a thread.
"""

import asyncio
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scheduler import Scheduler
    from .sequence import TokenSequence


class _Readers:
    """The readers of one event loop.

    Attributes:
        waiting: the readers that wait, each with its sequence.
        running: the sequences that have been read and have not ended.
    """

    def __init__(self) -> None:
        self.waiting: dict[asyncio.Future[None], TokenSequence] = {}
        self.running: set[TokenSequence] = set()


class AsyncReaders:
    """The asynchronous readers of one scheduler's sequences. The readers may belong to several event loops.

    The thread of a loop does not stop when all readers have their pieces. It goes on as long as a sequence can advance,
    so that the model computes while the loop handles the pieces. A sequence can be ahead of its reader only as far as
    `TokenSequence.is_paused` allows.
    """

    def __init__(self) -> None:
        # Reentrant, because the garbage collector may close a waiting coroutine in the thread that holds the lock, and
        # `wait` then acquires the lock again. This changes no entry, because entries keep their readers alive.
        self._lock = RLock()
        # A loop has an entry from the submission to the end of its job, which runs the steps for its readers.
        self._loops: dict[asyncio.AbstractEventLoop, _Readers] = {}

    async def wait(self, scheduler: "Scheduler", sequence: "TokenSequence") -> None:
        """Return once an unread piece is available, or the sequence has ended.

        Args:
            scheduler: the scheduler of the sequence.
            sequence: a sequence that has been submitted.

        Raises:
            BaseException: a step was interrupted, or the event loop's executor has been shut down.
        """
        loop = asyncio.get_running_loop()
        news = loop.create_future()
        with self._lock:
            # A closed loop does not call `_end`, so its entry could remain after its job was cancelled.
            for closed in [other for other in self._loops if other.is_closed()]:
                del self._loops[closed]
            needs_thread = loop not in self._loops
            readers = self._loops.setdefault(loop, _Readers())
            readers.waiting[news] = sequence
            readers.running.add(sequence)
        try:
            if needs_thread:
                self._start(scheduler, loop)
            await news
        finally:
            with self._lock:
                if (entry := self._loops.get(loop)) is not None:
                    entry.waiting.pop(news, None)

    def _start(self, scheduler: "Scheduler", loop: asyncio.AbstractEventLoop) -> None:
        try:
            job = loop.run_in_executor(None, self._run, scheduler, loop)
        except RuntimeError as error:  # the executor has been shut down
            _fail(self._drop(loop), error)
        else:
            job.add_done_callback(partial(self._end, loop))

    def _end(self, loop: asyncio.AbstractEventLoop, job: asyncio.Future[None]) -> None:
        """Fail the readers if the job was cancelled while it waited in the executor's queue."""
        if job.cancelled():
            _fail(self._drop(loop), RuntimeError("the event loop's executor was shut down"))

    def _run(self, scheduler: "Scheduler", loop: asyncio.AbstractEventLoop) -> None:
        """Run steps until no reader of the loop waits and no sequence that has been read can advance."""
        try:
            while not self._is_idle(loop):
                scheduler.advance(lambda: self._wake(loop))
        except BaseException as error:
            readers = self._drop(loop)
            if not loop.is_closed():
                loop.call_soon_threadsafe(_fail, readers, error)

    def _is_idle(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return True if there is no work for the loop.

        In this case, also remove the loop's entry, so that the next reader starts a new job.
        """
        with self._lock:
            if is_idle := self._wake(loop):
                self._loops.pop(loop, None)
            return is_idle

    def _wake(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Wake the readers whose sequence has an unread piece or has ended; return True if there is no work left."""
        with self._lock:
            readers = self._loops.get(loop)
            if readers is None:
                return True
            waiting = readers.waiting
            if ready := [news for news, sequence in waiting.items() if sequence.has_news()]:
                # One call for all of them, because each call writes to the loop's pipe.
                loop.call_soon_threadsafe(_finish, ready)
                for news in ready:
                    del waiting[news]
            if ended := [sequence for sequence in readers.running if sequence.ended]:
                readers.running.difference_update(ended)
            return not waiting and all(sequence.is_paused for sequence in readers.running)

    def _drop(self, loop: asyncio.AbstractEventLoop) -> list[asyncio.Future[None]]:
        with self._lock:
            readers = self._loops.pop(loop, None)
            return [] if readers is None else list(readers.waiting)


def _finish(ready: list[asyncio.Future[None]]) -> None:
    for news in ready:
        if not news.done():
            news.set_result(None)


def _fail(readers: list[asyncio.Future[None]], error: BaseException) -> None:
    for news in readers:
        if not news.done():
            news.set_exception(error)
