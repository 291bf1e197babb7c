"""Files that memory holds in huge pages.

The system keeps a file in pieces as large as it was written or read in, and maps a piece of 2 MiB in one step. Weights
written tensor by tensor lie in hundreds of thousands of small pages instead, of which the processor remembers few: it
reads them at 25 GB/s where huge ones give 30. What a file system cannot do it leaves undone; the contents are the same.
"""

import mmap
from contextlib import suppress
from typing import BinaryIO

HUGE_PAGE = 2 << 20


class HugePageWriter:
    """Writes a file of known size in any order.

    Args:
        file: open for writing, empty.
        size: what it will have.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._begun: set[int] = set()
        self._zeros = bytes(min(HUGE_PAGE, size))

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Writes bytes at an offset.

        Raises:
            OSError: when the disk does not take them.
        """
        for page in range(at // HUGE_PAGE, -(-(at + len(data)) // HUGE_PAGE)):
            begin = page * HUGE_PAGE
            # What covers a huge page makes one itself; for a part of one, zeros make it first.
            whole = at <= begin and begin + HUGE_PAGE <= at + len(data)
            if page not in self._begun and not whole:
                self._file.seek(begin)
                self._file.write(self._zeros[: self._size - begin])
            self._begun.add(page)
        self._file.seek(at)
        self._file.write(data)


def advise_huge_pages(mapping: mmap.mmap, begin: int, end: int) -> None:
    """Asks that what of a range is not in memory yet be read from disk in huge pages."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        begin -= begin % mmap.PAGESIZE
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE, begin, end - begin)
