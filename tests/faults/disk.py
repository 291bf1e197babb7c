"""A disk that fails at its n-th operation. Operations create or write files, make folders, rename, link, or fsync.

A write counts when it leaves Python's buffer, and a failing write leaves half of its bytes.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

ONCE, FOR_GOOD, KILLED = "once", "for good", "killed"


class Disk:
    """A failing disk.

    Attributes:
        operations: number of operations so far.
        failed: number of failed operations.
    """

    def __init__(self, fails_at: int, how: str = ONCE) -> None:
        self.fails_at, self.how = fails_at, how
        self.operations = self.failed = 0

    def fails(self) -> bool:
        self.operations += 1
        if self.operations < self.fails_at or (self.operations > self.fails_at and self.how == ONCE):
            return False
        self.failed += 1
        return True

    def stop(self) -> None:
        if self.how == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def step(self) -> None:
        if self.fails():
            self.stop()

    def _before(self, original):
        def guarded(*arguments, **options):
            self.step()
            return original(*arguments, **options)

        return guarded

    def _open_handle(self, original):
        def guarded(path, flags, *rest, **options):
            if flags & os.O_CREAT:
                self.step()
            return original(path, flags, *rest, **options)

        return guarded

    def _open(self, original):
        def guarded(
            file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None
        ):
            if not set(mode) & set("wxa+"):
                return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not isinstance(file, int):
                self.step()
            raw = _Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            raw.disk = self
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return guarded

    @contextmanager
    def at_work(self) -> Iterator["Disk"]:
        """Count all operations of this process while the block runs."""
        patches = [
            mock.patch.object(owner, name, wrap(getattr(owner, name)))
            for owner, names, wrap in (
                (os, ("mkdir", "rename", "replace", "link", "fsync"), self._before),
                (os, ("open",), self._open_handle),
                (io, ("open",), self._open),
                (builtins, ("open",), self._open),
            )
            for name in names
        ]
        for patch in patches:
            patch.start()
        try:
            yield self
        finally:
            for patch in reversed(patches):
                patch.stop()


class _Raw(io.FileIO):
    disk: Disk

    def write(self, data, /):
        if not self.disk.fails():
            return super().write(data)
        view = memoryview(data).cast("B")
        super().write(view[: len(view) // 2])
        self.disk.stop()
        raise AssertionError
