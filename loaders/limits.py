"""What loading takes, held against the system's limits: XLA ends the process where one of them is met."""

from collections.abc import Iterator
from pathlib import Path

from . import resources
from .artifact.errors import PrecastError
from .artifact.frozen import Frozen
from .artifact.manifest import WEIGHTS_FILE, Manifest, Target
from .units import size_text

MOST_THREADS = 1024
# Measured with jaxlib 0.10.1: address space that libraries and programs take besides weights and cache, and that
# each computing thread takes: a stack, and heaps of 64 MB of its own and of others that follow it.
_FIXED, _PER_THREAD = 704 << 20, 112 << 20


class Need(Frozen):
    """Memory, in bytes: weights, the cache of all slots when full, and the most that a program takes besides."""

    weights: int
    cache: int
    temporary: int

    @property
    def all(self) -> int:
        return self.weights + self.cache + self.temporary


def need(manifest: Manifest, target: Target) -> Need:
    """The memory that a target takes."""
    return Need(
        weights=manifest.files[WEIGHTS_FILE].bytes,
        cache=sum(array.bytes for array in manifest.cache),
        temporary=max((p.memory.temporary for p in target.programs if p.memory is not None), default=0),
    )


def threads_started(computing: int) -> int:
    """How many threads XLA's client starts in all, of either kind of supported jaxlib, and the loader one."""
    return 1 + max(8 + 2 * computing, 4 * computing)


def problems(needed: Need, computing: int, limits: resources.Limits) -> Iterator[tuple[str, str]]:
    """Yield each limit that is too low, and what to do.

    Args:
        needed: by the target.
        computing: threads that compute.
        limits: of this process, asked for `threads_started`.
    """
    fewer = ", or compute with fewer threads (--threads 1)" if computing > 1 else ""
    space = needed.all + _FIXED + computing * _PER_THREAD
    if limits.address_space is not None and limits.address_space < space:
        left = size_text(limits.address_space)
        problem = (
            f"it needs {size_text(space)} of address space, this process may take {left} more (ulimit -v)"
        )
        yield problem, f"raise that limit{fewer}"
    if limits.threads is not None:
        problem = (
            f"XLA starts {threads_started(computing)} threads, this process may start {limits.threads} more"
        )
        yield f"{problem} (ulimit -u, pids.max of the container)", f"raise that limit{fewer}"


def ensure(root: Path, manifest: Manifest, target: Target, computing: int) -> None:
    """Refuse to load where a limit is too low.

    Raises:
        PrecastError: naming the first.
    """
    found = resources.limits(threads_started(computing))
    for problem, remedy in problems(need(manifest, target), computing, found):
        raise PrecastError(f"{root}: {problem}; {remedy}.")


def checked_threads(threads: int | None) -> int:
    """The number of threads asked for; by default what the machine and the container's quota give.

    Raises:
        PrecastError: for a number that is none of threads.
    """
    if threads is None:
        return resources.processors().threads
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise PrecastError(
            f"threads: expected a whole number from 1 to {MOST_THREADS}, found {threads!r:.40}."
        )
    return threads
