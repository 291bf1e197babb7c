"""Threads that check requests, render chat templates and tokenise."""

import asyncio
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import TypeVar

from .errors import ApiError

_Result = TypeVar("_Result")
# Each request needs milliseconds.
_THREADS = 2
# Bytes of a body after which freed memory is given back.
LARGE = 100_000


class Preparing:
    """Threads for short work outside the event loop.

    Args:
        most: maximum number of calls that wait or run.
    """

    def __init__(self, most: int) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "precast-prepare")
        self._free = BoundedSemaphore(most)
        self._is_tidying = False

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Call a function in a thread.

        Raises:
            ApiError: too many calls wait.
        """
        if not self._free.acquire(blocking=False):
            raise ApiError(
                429, "Too many requests are waiting; try again later.", code="queue_full", retry_after=1
            )
        try:
            future = self._threads.submit(work)
        except RuntimeError:  # the threads have ended
            self._free.release()
            raise
        future.add_done_callback(lambda _: self._free.release())
        return await asyncio.wrap_future(future)

    def tidy(self) -> None:
        """Give freed memory back to the system, in a thread.

        A tokenizer takes 100 times the size of a text. glibc keeps this memory for the thread that has freed it.
        """
        if self._is_tidying:
            return
        self._is_tidying = True
        try:
            self._threads.submit(self._trim)
        except RuntimeError:  # the threads have ended
            return

    def _trim(self) -> None:
        self._is_tidying = False
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # only glibc has it
            trim(0)

    def close(self) -> None:
        """Drop the calls that wait, and let the threads end without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)
