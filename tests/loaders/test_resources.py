"""Processors and memory, read from the files of simulated systems and of this one."""

import pytest

from precast.loaders.runtime.resources import Memory, memory, processors

GB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n"


@pytest.fixture
def system(tmp_path):
    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def test_a_machine_without_limits(system):
    root = system({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"})
    assert memory(root) == Memory(limit=16 * GB, available=8 * GB)
    assert processors(root).quota is None


def test_a_system_without_these_files(tmp_path):
    assert memory(tmp_path) == Memory(limit=None, available=None)
    assert processors(tmp_path).quota is None


V2 = "sys/fs/cgroup/a/b/"


def test_the_tightest_group_counts_and_pages_of_files_are_free(system):
    root = system(
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            f"{V2}memory.max": "max\n",
            f"{V2}cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/memory.max": str(4 * GB),
            "sys/fs/cgroup/a/memory.current": str(3 * GB),
            "sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {2 * GB}\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
        }
    )
    assert memory(root) == Memory(limit=4 * GB, available=3 * GB)
    assert processors(root).quota == 1.5


def test_groups_of_version_1(system):
    root = system(
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "3:memory:/x\n2:cpuacct,cpu:/x\n1:name=systemd:/\n0::/\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(2 * GB),
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(1 * GB),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        }
    )
    assert memory(root) == Memory(limit=2 * GB, available=1 * GB)
    assert processors(root).quota == 0.5


def test_inside_a_container_its_own_group_is_the_top(system):
    """The name of the group is relative to the host, and no such folder is visible inside the container."""
    root = system(
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/../../docker/abc\n",
            "sys/fs/cgroup/memory.max": str(1 * GB),
            "sys/fs/cgroup/memory.current": str(2 * GB),
        }
    )
    assert memory(root) == Memory(limit=1 * GB, available=0)


def test_this_machine():
    found, cores = memory(), processors()
    assert 0 < found.available <= found.limit
    assert 1 <= cores.usable <= cores.cores
