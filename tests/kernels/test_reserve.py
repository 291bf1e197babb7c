"""precast.reserve: memory for an empty cache, which the system allocates as positions fill."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def mapping_of(address: int) -> dict[str, str]:
    """Return the fields of the mapping that holds an address."""
    found: dict[str, str] = {}
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(" ")
        if not name.endswith(":"):
            first, _, last = name.partition("-")
            is_inside = int(first, 16) <= address < int(last, 16)
        elif is_inside:
            found[name.removesuffix(":")] = value.strip()
    return found


def test_a_large_array_takes_no_memory_and_no_huge_pages(jax: ModuleType) -> None:
    arrays = [jax.ShapeDtypeStruct((48 << 20,), np.float32), jax.ShapeDtypeStruct((2, 3), np.int8)]
    large, small = jax.ffi.ffi_call("precast.reserve.v1", arrays)()
    assert (large.shape, small.shape) == ((48 << 20,), (2, 3))
    mapping = mapping_of(large.unsafe_buffer_pointer() + (64 << 20))
    assert int(mapping["Size"].split()[0]) >= (190 << 10)
    assert int(mapping["Rss"].split()[0]) < 1024
    if Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        assert "nh" in mapping["VmFlags"].split()
