"""Compare the resources needed for loading with the system's limits; XLA aborts a process that reaches a limit."""

from collections.abc import Iterator
from pathlib import Path

from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen
from ..artifact.manifest import WEIGHTS_FILE, Manifest, Target
from ..artifact.units import size_text
from . import resources

MOST_THREADS = 1024
# Address space, measured with jaxlib 0.10.1. `_FIXED` is for libraries and programs, without weights and cache.
# `_PER_THREAD` is for each computing thread: its stack, its malloc arena of 64 MB, and its share of the helper threads.
_FIXED, _PER_THREAD = 704 << 20, 112 << 20
# Address space for the programs of an additional model, if the process already has the libraries and the threads.
_FURTHER = 16 << 20


class Need(Frozen):
    """The memory that one full sequence needs, in bytes.

    Attributes:
        weights: size of the weights.
        cache: size of the KV cache of one slot, or of all slots for targets that fill the cache with zeros.
        temporary: scratch memory of the program that needs most.
        idle: address space of the other slots. The system allocates their pages as their positions fill.
        largest: size of the largest array of the KV cache, with all slots.
    """

    weights: int
    cache: int
    temporary: int
    idle: int
    largest: int

    @property
    def all(self) -> int:
        """The sum of weights, cache and scratch memory, without the address space of the other slots."""
        return self.weights + self.cache + self.temporary


def need(manifest: Manifest, target: Target) -> Need:
    """Return the memory that a target needs for one sequence."""
    cache = sum(array.bytes for array in manifest.cache)
    filled = cache // manifest.slots if target.kernels else cache
    return Need(
        weights=manifest.files[WEIGHTS_FILE].bytes,
        cache=filled,
        temporary=max((p.memory.temporary for p in target.programs if p.memory is not None), default=0),
        idle=cache - filled,
        largest=max((array.bytes for array in manifest.cache), default=0),
    )


def threads_started(computing: int) -> int:
    """Return the maximum number of threads that the loader and the XLA client of any supported jaxlib start."""
    return 1 + max(8 + 2 * computing, 4 * computing)


def problems(
    needed: Need, computing: int, limits: resources.Limits, *, has_client: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield a pair for each limit that is too low: a description of the problem, and the remedy.

    Args:
        needed: memory that the target needs.
        computing: number of computing threads.
        limits: this process's limits, from `resources.limits` for `threads_started(computing)` threads.
        has_client: True if this process already has an XLA client with this many threads.
    """
    fewer = ", or compute with fewer threads (--threads 1)" if computing > 1 and not has_client else ""
    space = needed.all + needed.idle + (_FURTHER if has_client else _FIXED + computing * _PER_THREAD)
    if limits.address_space is not None and limits.address_space < space:
        left = size_text(limits.address_space)
        problem = (
            f"it needs {size_text(space)} of address space, but this process may take only {left} more"
            " (ulimit -v)"
        )
        slots = ", or export with fewer --slots" if limits.address_space >= space - needed.idle else ""
        yield problem, f"raise that limit{fewer}{slots}"
    if limits.allocation is not None and limits.allocation < needed.largest:
        problem = (
            f"an array of its KV cache takes {size_text(needed.largest)} of address space, but this system allocates"
            f" at most {size_text(limits.allocation)} at once"
        )
        yield problem, "set vm.overcommit_memory to 1, or export with fewer --slots or a shorter --context"
    if limits.threads is not None and not has_client:
        problem = (
            f"XLA starts {threads_started(computing)} threads, but this process may start only"
            f" {limits.threads} more"
        )
        yield f"{problem} (ulimit -u, pids.max of the container)", f"raise that limit{fewer}"


def ensure(root: Path, manifest: Manifest, target: Target, computing: int, *, has_client: bool) -> None:
    """Refuse to load if a limit is too low.

    Args:
        root: the artifact's folder, for messages.
        manifest: the artifact's manifest.
        target: the target to load.
        computing: number of computing threads.
        has_client: True if this process already has an XLA client with this many threads.

    Raises:
        PrecastError: a limit is too low; the message names the first one.
    """
    found = resources.limits(0 if has_client else threads_started(computing))
    needed = need(manifest, target)
    for problem, remedy in problems(needed, computing, found, has_client=has_client):
        raise PrecastError(f"{root}: {problem}; {remedy}.")


def checked_threads(threads: int | None) -> int:
    """Return the requested number of threads after checking it; None stands for the number that the system allows.

    Raises:
        PrecastError: `threads` is not a whole number from 1 to `MOST_THREADS`.
    """
    if threads is None:
        return resources.processors().threads
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise PrecastError(
            f"threads: expected a whole number from 1 to {MOST_THREADS}, found {threads!r:.40}."
        )
    return threads
