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


class AsyncReaders:
    """The asynchronous readers of one scheduler's sequences. The readers may belong to several event loops."""

    def __init__(self) -> None:
        # Reentrant, because the garbage collector may close a waiting coroutine in the thread that holds the lock, and
        # `wait` then acquires the lock again. This changes no entry, because entries keep their readers alive.
        self._lock = RLock()
        # The waiting readers of each event loop. A loop has an entry from the submission to the end of its job, which
        # runs the steps for its readers.
        self._waiting: dict[asyncio.AbstractEventLoop, dict[asyncio.Future[None], TokenSequence]] = {}

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
            for closed in [other for other in self._waiting if other.is_closed()]:
                del self._waiting[closed]
            needs_thread = loop not in self._waiting
            self._waiting.setdefault(loop, {})[news] = sequence
        try:
            if needs_thread:
                self._start(scheduler, loop)
            await news
        finally:
            with self._lock:
                self._waiting.get(loop, {}).pop(news, None)

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
        """Run steps while any reader of the loop is waiting."""
        try:
            while not self._is_idle(loop):
                scheduler.advance(lambda: self._wake(loop))
        except BaseException as error:
            readers = self._drop(loop)
            if not loop.is_closed():
                loop.call_soon_threadsafe(_fail, readers, error)

    def _is_idle(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return True if no reader of the loop is waiting.

        In this case, also remove the loop's entry, so that the next reader starts a new job.
        """
        with self._lock:
            if not self._waiting.get(loop):
                self._waiting.pop(loop, None)
            return loop not in self._waiting

    def _wake(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Wake the readers whose sequence has an unread piece or has ended; return True if no reader still waits."""
        with self._lock:
            readers = self._waiting.get(loop, {})
            for news in [news for news, sequence in readers.items() if sequence.has_news()]:
                loop.call_soon_threadsafe(_finish, news)
                del readers[news]
            return not readers

    def _drop(self, loop: asyncio.AbstractEventLoop) -> list[asyncio.Future[None]]:
        with self._lock:
            return list(self._waiting.pop(loop, {}))


def _finish(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)


def _fail(readers: list[asyncio.Future[None]], error: BaseException) -> None:
    for news in readers:
        if not news.done():
            news.set_exception(error)
