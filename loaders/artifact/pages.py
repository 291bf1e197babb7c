"""Huge pages for files in the page cache.

Linux caches a file in folios as large as the writes or reads that filled them, and maps a folio of 2 MiB with one TLB
entry. Weights that are written tensor by tensor end up in 4 KiB pages, where TLB misses reduce the reading speed from
30 to 25 GB/s. On a file system without large folios, this module has no effect.
"""

import mmap
from contextlib import suppress
from typing import BinaryIO

HUGE_PAGE = 2 << 20


class HugePageWriter:
    """A writer that fills a file of known size in any order, one huge page at a time.

    Args:
        file: an empty file, open for writing.
        size: the final size, in bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._begun: set[int] = set()
        self._zeros = bytes(min(HUGE_PAGE, size))

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset.

        Raises:
            OSError: the write fails.
        """
        for page in range(at // HUGE_PAGE, -(-(at + len(data)) // HUGE_PAGE)):
            begin = page * HUGE_PAGE
            # A write that covers a whole huge page allocates that page. Before a smaller write, write zeros to allocate
            # it.
            whole = at <= begin and begin + HUGE_PAGE <= at + len(data)
            if page not in self._begun and not whole:
                self._file.seek(begin)
                self._file.write(self._zeros[: self._size - begin])
            self._begun.add(page)
        self._file.seek(at)
        self._file.write(data)


def advise_huge_pages(mapping: mmap.mmap, begin: int, end: int) -> None:
    """Advise Linux to read the bytes from `begin` to `end` into huge pages; pages cached already stay small."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        begin -= begin % mmap.PAGESIZE
        with suppress(OSError):  # this Linux does not support huge pages for files
            mapping.madvise(mmap.MADV_HUGEPAGE, begin, end - begin)
