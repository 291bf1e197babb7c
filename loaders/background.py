"""A function call in a separate thread."""

from collections.abc import Callable
from threading import Thread
from time import monotonic
from typing import Generic, TypeVar, cast

_Result = TypeVar("_Result")


class BackgroundCall(Thread, Generic[_Result]):
    """A function call in a separate thread. Importing concurrent.futures for this would take 5 ms.

    Args:
        call: the function.
        daemon: True if the process may end before the call does.

    Attributes:
        began: time of `time.monotonic` at which the call began.
    """

    def __init__(self, call: Callable[[], _Result], *, daemon: bool = True) -> None:
        super().__init__(daemon=daemon)
        self._call, self.began = call, monotonic()
        self._error: BaseException | None = None
        self._result: _Result | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> _Result:
        """Wait for the end of the call; return its result and forget it, or raise its error. Call this once."""
        self.join()
        if self._error is not None:
            raise self._error
        found, self._result = self._result, None  # or a result would live as long as the thread's object
        return cast(_Result, found)
