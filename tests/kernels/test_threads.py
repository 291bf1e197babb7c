"""The number of threads changes no bit of an answer."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from precast import kernels

DIGEST = Path(__file__).parent / "digest.py"
LIMIT_S = 900


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def digests(cpus: int) -> list[str]:
    """Return the digests of a process on this many CPUs."""
    command = [sys.executable, str(DIGEST), str(cpus)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.skipif(usable_cpus() < 2, reason="this process may use one CPU only, or cannot choose")
def test_one_cpu_answers_as_several_do() -> None:
    pytest.importorskip("jax")
    with ThreadPoolExecutor(2) as pool:
        one, several = pool.map(digests, (1, usable_cpus()))
    assert [line.split()[0] for line in one] == list(kernels.supported_isas())
    assert one == several
