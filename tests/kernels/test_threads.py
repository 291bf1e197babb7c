"""The number of threads changes no bit of an answer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from precast import kernels

DIGEST = Path(__file__).parent / "digest.py"


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@pytest.mark.skipif(usable_cpus() < 2, reason="this process may use one CPU only, or cannot choose")
def test_one_cpu_answers_as_several_do() -> None:
    pytest.importorskip("jax")
    runs = [
        subprocess.Popen([sys.executable, DIGEST, str(cpus)], stdout=subprocess.PIPE, text=True)
        for cpus in (1, usable_cpus())
    ]
    one, several = (run.communicate(timeout=120)[0].splitlines() for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert [line.split()[0] for line in one] == list(kernels.supported_isas())
    assert one == several
