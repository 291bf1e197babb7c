"""Native libraries that are opened before their import."""

import ctypes
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from precast.loaders.runtime import native_libraries

MAPPED = """
import sys
from precast.loaders.runtime.native_libraries import open_jaxlib
def is_open():
    return "libjax_common" in open("/proc/self/maps").read()
before = is_open()
open_jaxlib()
print(before, is_open(), "jaxlib._jax" in sys.modules)
from precast.loaders.runtime import pjrt
pjrt.client()
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the open libraries")
def test_jaxlib_is_opened_without_an_import(python):
    """A start saves 15 ms if the library is where `open_jaxlib` expects it. XLA logs nothing afterwards."""
    result = python("-c", MAPPED)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.split() == ["False", "True", "False"]


def test_nothing_is_opened_without_jaxlib_or_on_an_old_cpu(monkeypatch, tmp_path):
    real = ctypes.CDLL(None).dlopen
    real.restype = ctypes.c_void_p
    opened: list[tuple[bytes, int | None]] = []
    stand_in = SimpleNamespace(dlopen=lambda path, mode: opened.append((path, real(path, mode))))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: stand_in)
    monkeypatch.setattr(native_libraries, "find_spec", lambda _: None)
    native_libraries.open_jaxlib()
    assert opened == []
    spec = importlib.util.spec_from_loader("jaxlib", None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(tmp_path)]  # has no such file
    monkeypatch.setattr(native_libraries, "find_spec", lambda _: spec)
    native_libraries.open_jaxlib()
    assert opened == [(bytes(tmp_path / "libjax_common.so"), None)]
    monkeypatch.setattr(native_libraries, "cpu_features", lambda: ["sse4_2"])
    monkeypatch.setattr(native_libraries, "processor_family", lambda: "x86_64")
    monkeypatch.setattr("jaxlib.cpu_feature_guard.check_cpu_features", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the CPU is checked first
        native_libraries.open_jaxlib()
    assert len(opened) == 1
