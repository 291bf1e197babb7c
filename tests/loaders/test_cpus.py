"""The targets that run on each CPU, decided by the loader's own code from lines of /proc/cpuinfo.

tests/reference/cpus.json contains the "flags" of real machines, and of virtual machines that hide features. Most of
them come from archspec's tests (Apache-2.0 or MIT).
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from jaxlib import cpu_feature_guard

from precast.loaders.artifact import compat
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import Machine, parse_cpu_features
from precast.loaders.artifact.manifest import Target
from precast.loaders.audit.check import _isa
from precast.loaders.compiling import isa
from precast.loaders.runtime import native_libraries

CPUS = json.loads((Path(__file__).parents[1] / "reference" / "cpus.json").read_text())
LEVELS = tuple(isa.LEVELS)
# The levels that each CPU supports. jaxlib itself needs AVX, which the marked CPUs lack.
NONE, V2, V3, V4 = ((), LEVELS[:1], LEVELS[:2], LEVELS)
WITHOUT_AVX = {"Nehalem", "Goldmont Plus", "Opteron K10", "KVM guest, kvm64", "KVM guest, x86-64-v2-AES"}
EXPECTED = {
    "Nehalem": V2,
    "Sandy Bridge": V2,
    "Ivy Bridge": V2,
    "Haswell": V3,
    "Broadwell": V3,
    "Skylake-X": V4,
    "Cascade Lake": V4,
    "Ice Lake": V4,
    "Sapphire Rapids": V4,
    "Goldmont Plus": V2,
    "Alder Lake": V3,
    "Opteron K10": NONE,
    "Bulldozer": V2,
    "Piledriver": V2,
    "Zen": V3,
    "Zen 2": V3,
    "Zen 3": V3,
    "Zen 4": V4,
    "Zen 5": V4,
    "KVM guest, kvm64": NONE,
    "KVM guest, x86-64-v2-AES": V2,
    "KVM guest, IvyBridge on Skylake-X": V2,
    "KVM guest, Zen 3 less BMI and MOVBE": V2,
}


def machine(name: str) -> Machine:
    features = parse_cpu_features(f"processor\t: 0\nflags\t\t: {CPUS[name]}\nbugs\t\t:\n")
    return Machine(machine="x86_64", features=features, jaxlib="0.10.1", kernel_abi=3, kernels=())


def target(features: tuple[str, ...], name: str | None = None) -> Target:
    return Target(
        name=name or isa.target_name("cpu", features),
        runtime="pjrt",
        platform="cpu",
        device="any",
        machine="x86_64",
        jaxlib="0.10.1",
        cpu_features=features,
        kernel_abi=0,
        kernels=(),
        xla_flags="",
        stablehlo_expires="2030-01-01",
        programs=(),
    )


def chosen(targets: tuple[Target, ...], name: str) -> str | None:
    """Return the target that the loader chooses on a CPU, or None if it refuses all targets."""
    manifest = SimpleNamespace(targets=targets)
    try:
        return compat.choose_target(manifest, machine(name), "art", name=None, allow_compile=False).name
    except PrecastError:
        return None


@pytest.fixture(autouse=True)
def x86(monkeypatch):
    monkeypatch.setattr(isa, "processor_family", lambda: "x86_64")


@pytest.mark.parametrize("name", CPUS)
def test_which_targets_run_where(name):
    assert set(CPUS) == set(EXPECTED)
    all_levels = tuple(target(level.features) for level in isa.LEVELS.values())
    runs = {t.name for t in all_levels if chosen((t,), name)}
    assert runs == {f"cpu-{level}" for level in EXPECTED[name]}
    widest = f"cpu-{EXPECTED[name][-1]}" if EXPECTED[name] else None
    assert chosen(all_levels, name) == widest
    assert ("avx" in machine(name).features) == (name not in WITHOUT_AVX)


@pytest.mark.parametrize("name", CPUS)
def test_a_default_export_runs_wherever_jaxlib_does(name):
    assert chosen((target(isa.LEVELS["x86-64-v2"].features),), name) or name in WITHOUT_AVX


@pytest.mark.parametrize("name", CPUS)
@pytest.mark.parametrize("maker", CPUS)
def test_advice_is_never_circular(maker, name):
    """Check a native target of one CPU on another CPU: after following the advice, there must be a target that runs."""
    has = machine(maker).features
    old = target(has, "cpu-x86_64-avx2")
    if not set(has) - set(machine(name).features):
        assert chosen((old,), name) == old.name
        return
    advice = _isa(machine(name))
    if EXPECTED[name]:
        level = advice.removeprefix("export with --cpu-isa ")
        assert level == EXPECTED[name][-1]
        assert chosen((target(isa.LEVELS[level].features),), name)
    else:
        assert advice == "export on a machine like this one"


@pytest.mark.parametrize("name", CPUS)
def test_an_export_on_any_cpu(name, monkeypatch):
    """The default target is the same on any CPU, and a level that the CPU lacks is refused."""
    monkeypatch.setattr(isa, "cpu_features", lambda: machine(name).features)
    assert isa.default_isa() == ("x86-64-v2" if EXPECTED[name] else "native")
    for level in LEVELS:
        if level in EXPECTED[name]:
            isa.check_isa(level)
        else:
            with pytest.raises(PrecastError, match=f"{level} needs CPU features that this machine lacks "):
                isa.check_isa(level)


@pytest.mark.parametrize("name", CPUS)
def test_a_cpu_without_jaxlib_s_instructions_gets_an_error_message(name, monkeypatch):
    """The message replaces SIGILL at jaxlib's first instruction."""

    def refuse() -> None:
        raise RuntimeError("This version of jaxlib was built using AVX instructions")

    monkeypatch.setattr(cpu_feature_guard, "check_cpu_features", refuse)
    monkeypatch.setattr(native_libraries, "cpu_features", lambda: machine(name).features)
    monkeypatch.setattr(native_libraries, "processor_family", lambda: "x86_64")
    if name not in WITHOUT_AVX:
        native_libraries.check_cpu()
        return
    with pytest.raises(PrecastError) as raised:
        native_libraries.check_cpu()
    assert str(raised.value).startswith(
        "jaxlib cannot run on this CPU, which lacks AVX; use a CPU from 2011 or later"
    )
    # If jaxlib was built for such a CPU, the CPU is not refused.
    monkeypatch.setattr(cpu_feature_guard, "check_cpu_features", lambda: None)
    native_libraries.check_cpu()


@pytest.mark.parametrize("level", LEVELS)
def test_the_line_about_machines_that_can_run_a_level(level):
    features = isa.LEVELS[level].features
    line = isa.audience("x86_64", features)
    assert f"({level})" in line
    assert ("; not " in line) == (level != "x86-64-v2")
    more = isa.audience("x86_64", (*features, "gfni"))
    assert f"({level}; only those with gfni)" in more
    narrow, wide = target(isa.LEVELS["x86-64-v2"].features), target(features)
    assert isa.audience_of((wide, narrow)) == isa.audience("x86_64", narrow.cpu_features)
    assert isa.audience_of((dataclasses.replace(wide, runtime="stablehlo"),)) is None
    assert isa.audience("aarch64", ("neon",)) == "aarch64 CPUs with neon"
