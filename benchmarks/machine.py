"""The machine that runs a benchmark: processor, cores, package versions and memory bandwidth."""

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np


def describe(packages: tuple[str, ...] = ("precast", "jax", "jaxlib", "numpy")) -> dict:
    """Return the processor, the number of cores, and the installed versions of Python and the packages."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "versions": versions}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            flags = " ".join(
                f for f in ("avx2", "avx512f", "avx512_vnni") if f" {f} " in Path("/proc/cpuinfo").read_text()
            )
            return f"{name} ({flags})"
    return platform.processor() or platform.machine()


def read_bandwidth(megabytes: int = 512, rounds: int = 10) -> float:
    """Measure the bytes per second that all cores together read from memory.

    A decode step takes at least the bytes that it reads divided by this bandwidth. The loops are NumPy's reductions, so
    that none of precast's code is measured. The result is the speed of the fastest loop, which comes closest to the
    hardware's limit. A loop's speed is its average over all rounds. The bandwidth varies by a third within hundredths
    of a second, and the benchmarks' step times are averages over many steps too.
    """
    cores = len(os.sched_getaffinity(0))
    parts = [np.ones(megabytes * 1_000_000 // cores // 64 * 16, np.float32) for _ in range(cores)]
    loops = (
        lambda a: a.view(np.int32).max(),
        lambda a: np.bitwise_or.reduce(a.view(np.uint64)),
        lambda a: np.dot(a, a),
    )
    seconds = [0.0] * len(loops)
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            for i, loop in enumerate(loops):
                started = time.perf_counter()
                list(pool.map(loop, parts))
                seconds[i] += time.perf_counter() - started
    return rounds * sum(p.nbytes for p in parts) / min(seconds)
