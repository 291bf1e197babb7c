"""HugePageWriter: contents are the same in any order of writes, and in huge pages if the system allows."""

import mmap
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.pages import HUGE_PAGE, HugePageWriter, advise_huge_pages


def contents(size: int) -> bytes:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()


def write(path: Path, data: bytes, cuts: list[int], order: list[int]) -> None:
    parts = list(pairwise([0, *sorted(cuts), len(data)]))
    with path.open("xb") as file:
        writer = HugePageWriter(file, len(data))
        for i in order:
            begin, end = parts[i]
            writer.write(begin, memoryview(data)[begin:end])


SIZES = [0, 1, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE + 4711]


@given(st.data())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_in_any_order_make_the_file(tmp_path_factory, data):
    size = data.draw(st.sampled_from(SIZES))
    near = [b + d for b in range(0, size + 1, HUGE_PAGE) for d in (-1, 0, 1) if 0 <= b + d <= size]
    cuts = data.draw(st.lists(st.sampled_from(near) | st.integers(0, size), max_size=6))
    order = data.draw(st.permutations(range(len(cuts) + 1)))
    path = tmp_path_factory.mktemp("pages") / "file"
    write(path, contents(size), cuts, order)
    assert path.read_bytes() == contents(size)


def huge_pages_of(path: Path) -> int:
    """Map and read a whole file; return the number of bytes that are mapped in huge pages."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        advise_huge_pages(mapping, 0, len(mapping))
        for at in range(0, len(mapping), 4096):
            mapping[at]
        entries = Path("/proc/self/smaps").read_text().split("VmFlags")
        lines = next(e for e in entries if str(path) in e).splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("FilePmdMapped"))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_small_writes_get_huge_pages_if_large_ones_do(tmp_path):
    """A file written in one piece shows whether this file system and its free memory allow huge pages."""
    data = contents(8 * HUGE_PAGE)
    cuts = list(range(0, len(data), 10_007))
    order = sorted(range(len(cuts) + 1), key=lambda i: i % 7)

    def could_be_huge(name: str) -> bool:
        (tmp_path / name).write_bytes(data)
        return huge_pages_of(tmp_path / name) >= 8 * HUGE_PAGE

    if not could_be_huge("at once"):
        pytest.skip("the file system keeps no huge pages here, or memory has none left")
    for attempt in range(3):
        path = tmp_path / f"in parts {attempt}"
        write(path, data, cuts, order)
        if huge_pages_of(path) >= HUGE_PAGE:  # one huge page is enough, because free memory may be fragmented
            return
        # Other processes use memory too, so compare only if enough memory was free before and after.
        if not could_be_huge(f"at once, after {attempt}"):
            pytest.skip("memory has no huge pages left")
    pytest.fail("a file written in parts lies in small pages, one written at once in huge ones")


def test_a_system_without_madvise_for_huge_pages(monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    with (
        (tmp_path / "file").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping,
    ):
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
        advise_huge_pages(mapping, 0, len(mapping))
        assert mapping[:] == b"abc"


def test_a_full_disk_raises_os_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("r+b", buffering=0) as file, pytest.raises(OSError, match="No space"):
        HugePageWriter(file, HUGE_PAGE).write(7, b"x")
