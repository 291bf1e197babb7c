"""The processors, memory and threads that this process may use, including a container's limits."""

import os
from _thread import LockType, allocate_lock, start_new_thread
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from ..artifact.frozen import Frozen
from ..artifact.machine import usable_cores

# Seconds that a started thread may take to begin its work. A thread without memory for its stack never begins.
_PASS_S = 2.0
# At this number or above, there is no limit. Control groups of version 1 then state a number just below 2^63.
_NO_LIMIT = 1 << 60
# More threads than a user is expected to run in other processes. If the limit exceeds the needed threads by this
# number, it counts as high enough without a test.
_IN_SIGHT = 4096


class Processors(Frozen):
    """The processors of a machine, and this process's share.

    Attributes:
        cores: the machine's number of cores.
        usable: number of cores that this process may run on.
        quota: number of cores that the control group lets this process keep busy; None for no quota.
    """

    cores: int
    usable: int
    quota: float | None

    @property
    def threads(self) -> int:
        """Return the default number of computing threads, within the quota.

        With more threads than the quota, spinning threads would use up the quota before a scheduling period ends. All
        threads would then have to wait for the next period.
        """
        return self.usable if self.quota is None else max(1, min(self.usable, int(self.quota)))


class Limits(Frozen):
    """The system's limits for this process. None means that there is no limit, or that it is high enough.

    Attributes:
        address_space: bytes that the process may still map (``ulimit -v``).
        threads: number of threads that the process can start (``ulimit -u``, pids.max of a container).
        allocation: bytes that the process may allocate in one piece (vm.overcommit_memory).
    """

    address_space: int | None
    threads: int | None
    allocation: int | None = None


class Memory(Frozen):
    """Memory in bytes; None if the system does not report it.

    Attributes:
        limit: memory that this process could use if nothing else ran: the machine's memory, or a control group's limit
            if that is lower.
        available: memory that this process can still allocate.
    """

    limit: int | None
    available: int | None


def processors(system: Path = Path("/")) -> Processors:
    """Return this process's processors.

    Args:
        system: root of the file system, whose files in proc and sys are read.
    """
    quotas = [q for folder in _groups(system, "cpu") if (q := _quota(folder)) is not None]
    return Processors(cores=os.cpu_count() or 1, usable=usable_cores(), quota=min(quotas, default=None))


def memory(system: Path = Path("/")) -> Memory:
    """Return the memory of this process's machine and control groups.

    Args:
        system: root of the file system, whose files in proc and sys are read.
    """
    machine = _fields(system / "proc/meminfo")
    total, free = (machine.get(key, 0) << 10 for key in ("MemTotal:", "MemAvailable:"))
    found = [(total, free)] if total else []
    found += [pair for folder in _groups(system, "memory") if (pair := _limit(folder)) is not None]
    return Memory(
        limit=min((limit for limit, _ in found), default=None),
        available=min((left for _, left in found), default=None),
    )


def limits(threads: int, system: Path = Path("/")) -> Limits:
    """Return the limits for this process.

    Args:
        threads: number of threads needed. If the system's limit is not far higher, the function starts and ends this
            many threads as a test, because the system does not show every thread that counts towards the limit.
        system: root of the file system.
    """
    # Measure the address space before the test, whose threads use some of it. The client's threads reuse that part
    # later.
    space = _address_space()
    few = _startable(threads) if _thread_limit(system) < threads + _IN_SIGHT else None
    return Limits(address_space=space, threads=few, allocation=_allocation(system))


def _allocation(system: Path) -> int | None:
    """Return the size in bytes above which Linux refuses an allocation, even if the memory is never used."""
    mode, sizes = _number(system / "proc/sys/vm/overcommit_memory"), _fields(system / "proc/meminfo")
    if mode == 0 and "MemTotal:" in sizes:  # the heuristic mode
        return (sizes["MemTotal:"] + sizes.get("SwapTotal:", 0)) << 10
    if mode == 2 and "CommitLimit:" in sizes:
        return max(0, sizes["CommitLimit:"] - sizes.get("Committed_AS:", 0)) << 10
    return None


def _thread_limit(system: Path) -> int:
    """Return an upper bound on the number of threads that this process may still start within its limits."""
    found = [_NO_LIMIT]
    for group in _groups(system, "pids"):
        if (most := _number(group / "pids.max")) is not None:
            found.append(most - (_number(group / "pids.current") or 0))
    with suppress(ImportError):  # Windows lacks the module
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        # This limit applies to the threads of all of the user's processes together. Counting them here would take too
        # long.
        found += [most] if most != resource.RLIM_INFINITY else []
        # Thread stacks take address space, so a limit on address space limits the threads as well.
        found += [0] if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY else []
    return min(found)


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # Windows lacks the module
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    words = _text(Path("/proc/self/statm")).split()
    return max(0, limit - (int(words[0]) * resource.getpagesize() if words else 0))


def _startable(wanted: int) -> int | None:
    """Start `wanted` concurrent threads; return the number that started, or None if all started."""
    # `Thread.start` would wait forever for a thread without memory for its first step.
    gate, passed, started = allocate_lock(), list[None](), 0
    with gate, suppress(RuntimeError, MemoryError):
        while started < wanted:
            start_new_thread(_pass, (gate, passed))
            started += 1
    end = monotonic() + _PASS_S
    while len(passed) < started and monotonic() < end:
        sleep(0.0005)
    return None if len(passed) >= wanted else len(passed)


def _pass(gate: LockType, passed: list[None]) -> None:
    """Wait for the gate to open, and record in `passed` that this thread has started."""
    with gate:
        passed.append(None)


def _groups(system: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, from its own to the outermost."""
    text = _text(system / "proc/self/cgroup")
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0":  # control groups of version 2
            top = system / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = system / "sys/fs/cgroup" / controller
        else:
            continue
        # Inside a container, `name` may be the group's path on the host, which does not exist here. The top folder is
        # then the container's own group.
        parts = [part for part in name.split("/") if part not in ("", "..")]
        for n in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:n])
            if folder.is_dir():
                yield folder


def _limit(group: Path) -> tuple[int, int] | None:
    """Return a group's memory limit and its free memory, including cached file pages, in bytes; None if unlimited."""
    for maximum, current, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = (_number(group / name) for name in (maximum, current))
        if limit is not None and limit < _NO_LIMIT:
            kept = (used or 0) - _fields(group / "memory.stat").get(inactive, 0)
            return limit, max(0, limit - kept)
    return None


def _quota(group: Path) -> float | None:
    words = _text(group / "cpu.max").split()
    if not words:
        words = [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = map(int, words)
    except ValueError:  # the file contains "max", or is missing
        return None
    return quota / period if quota > 0 and period > 0 else None


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers in lines such as ``MemTotal:  16384 kB``, by the first word of the line."""
    words = [line.split() for line in _text(path).splitlines()]
    return {w[0]: int(w[1]) for w in words if len(w) >= 2 and w[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
