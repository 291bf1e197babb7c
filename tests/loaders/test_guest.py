"""A load leaves the host process unchanged."""

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import pytest

from precast.loaders.runtime.native_libraries import quiet

HOST = """
import asyncio, ctypes, decimal, faulthandler, gc, json, locale, os, random, resource, signal, sys, threading, warnings
import numpy as np
import scipy.special, scipy.stats

path = sys.argv[1]
searched = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "flax"):
            searched.append(name)

sys.meta_path.insert(0, Watch())
fegetround = ctypes.CDLL(None).fegetround
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p

def status():
    lines = [line.split() for line in open("/proc/self/status")]
    return {w[0]: w[1:] for w in lines if w[0][:3] in ("Sig", "Cap", "NoN", "Sec") and w[0] != "SigQ:"}

def snapshot():
    x = np.linspace(0.1, 1, 8)
    return {
        "stumps": sorted(name for name, module in sys.modules.items() if module is None),
        "jax": sorted(name for name in sys.modules if name.partition(".")[0] in ("jax", "flax")),
        "environ": dict(os.environ),
        "c environment": sorted((n, str(getenv(n.encode()))) for n in (
            *os.environ, "TF_CPP_MIN_LOG_LEVEL", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NPROC", "XLA_FLAGS")),
        "signals": {s.name: repr(signal.getsignal(s)) for s in signal.valid_signals() if isinstance(s, signal.Signals)},
        "status": status(), "alarm": signal.getitimer(signal.ITIMER_REAL),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), gc.get_debug(), len(gc.callbacks)),
        "warnings": (repr(warnings.filters), repr(warnings.showwarning)),
        "threads": (sorted(t.name for t in threading.enumerate()), threading.stack_size(), sys.getswitchinterval(),
                    repr(threading.excepthook), repr(threading.gettrace())),
        "affinity": sorted(os.sched_getaffinity(0)), "nice": os.nice(0),
        "cwd": os.getcwd(), "locale": locale.setlocale(locale.LC_ALL),
        "limits": [resource.getrlimit(i) for i in range(16)],
        "hooks": (repr(sys.excepthook), repr(sys.displayhook), repr(sys.unraisablehook), len(sys.meta_path),
                  len(sys.path_hooks), repr(sys.gettrace()), repr(sys.getprofile()), repr(sys.breakpointhook)),
        "path": sys.path, "argv": sys.argv, "recursion": sys.getrecursionlimit(), "faults": faulthandler.is_enabled(),
        "digits": sys.get_int_max_str_digits(), "streams": [repr(s) for s in (sys.stdin, sys.stdout, sys.stderr)],
        "floats": (fegetround(), repr(np.geterr()), 5e-324 * 1.0, float(np.float32(1e-45) * np.float32(1)),
                   repr(decimal.getcontext())),
        "random": (hash(str(random.getstate())), hash(str(np.random.get_state()))),
        "event loop": repr(asyncio.get_event_loop_policy()),
        "scipy": [scipy.special.logsumexp(x), float(scipy.stats.zscore(x)[0]), scipy.stats.pearsonr(x, x).statistic,
                  scipy.stats.gmean(x), float(scipy.special.softmax(x)[0])],
        "files": sorted(os.readlink(f"/proc/self/fd/{f}") for f in os.listdir("/proc/self/fd")
                        if os.path.exists(f"/proc/self/fd/{f}")),
    }

snapshot()
seen = {"before": snapshot()}
import precast
params = precast.SamplingParams(max_tokens=8, ignore_eos=True)
seen["imported"] = snapshot()
model = precast.load(path)
seen["loaded"] = snapshot()
model.generate("the cat", params)
seen["generated"] = snapshot()
stream = model.stream("the cat", params)
next(stream)
seen["streaming"] = snapshot()
del stream
list(model.stream("the cat", params))
del model
gc.collect()
seen["dropped"] = snapshot()
seen["mapped"] = "weights.safetensors" in open("/proc/self/maps").read()
seen["searched"] = searched
print(json.dumps(seen))
"""
NO_JAX = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "jax":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.parametrize("jax", ["importable", "missing"])
def test_nothing_that_a_host_sees_changes(
    tiny_artifact: Path, python: Any, own_cache: Path, jax: str
) -> None:
    code = (NO_JAX if jax == "missing" else "") + HOST
    result = python("-c", code, str(tiny_artifact))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    seen = json.loads(result.stdout)
    assert seen.pop("searched") == []
    assert seen.pop("mapped") is False
    before = seen.pop("before")
    for moment, after in seen.items():
        if moment != "dropped":  # a model keeps its weight file open, to detect changes
            after["files"] = before["files"]
        changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
        assert changed == {}, moment
    assert list(seen) == ["imported", "loaded", "generated", "streaming", "dropped"]


@pytest.mark.parametrize(("before", "inside"), [(None, b"2"), ("1", b"2"), ("0", b"0"), ("3", b"3")])
def test_a_library_is_quiet_whoever_loads_it(
    monkeypatch: pytest.MonkeyPatch, before: str | None, inside: bytes
) -> None:
    """This also applies below the command line, which sets the level to 1."""
    name = "TF_CPP_MIN_LOG_LEVEL"
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with quiet("2"):
        assert getenv(name.encode()) == inside
        assert os.environ.get(name) == before
    assert getenv(name.encode()) == (before and before.encode())
