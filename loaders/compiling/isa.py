"""Instruction sets of CPU executables, and the CPUs that can run them.

XLA may use fewer CPU features than it was permitted to use. On a new CPU, XLA may also use features beyond the
requested level. So every executable is disassembled, to check that it stays within its level, or to find the features
that a "native" executable needs. precast's own kernels do not count, because they are built for several instruction
sets, and choose one by CPUID at run time.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..artifact.errors import PrecastError
from ..artifact.machine import CODEGEN_FEATURES, cpu_features, processor_family
from ..artifact.manifest import Target
from ..runtime.serialized import code_sections, object_files
from .instructions import Instruction, UnknownInstruction, instructions

NATIVE = "native"


@dataclass(frozen=True, kw_only=True)
class Level:
    """An x86-64 level as the psABI defines it.

    Attributes:
        flag: value of XLA's ``xla_cpu_max_isa``; it permits more features than the level has.
        features: the features that machines of the level have and that its code may use, in LLVM's names, sorted.
        since: the first CPUs that have the level and run jaxlib, in words.
        without: the CPUs that run jaxlib but lack the level, in words; empty if there are none.
    """

    flag: str
    features: tuple[str, ...]
    since: str
    without: str


def _sorted(*names: str) -> tuple[str, ...]:
    return tuple(sorted(" ".join(names).split()))


_V2 = "cx16 popcnt sahf sse sse2 sse3 sse4.1 sse4.2 ssse3"
_V3 = "avx avx2 bmi bmi2 f16c fma lzcnt movbe"
_V4 = "avx512bw avx512cd avx512dq avx512f avx512vl"
# Narrowest first. https://gitlab.com/x86-psABIs/x86-64-ABI, "Micro-Architecture Levels".
LEVELS: Mapping[str, Level] = {
    "x86-64-v2": Level(
        flag="SSE4_2",
        features=_sorted(_V2),
        # jaxlib's wheels are compiled for AVX.
        since="every x86-64 CPU that jaxlib runs on: Intel since Sandy Bridge (2011), AMD since Bulldozer (2011)",
        without="",
    ),
    "x86-64-v3": Level(
        flag="AVX2",
        features=_sorted(_V2, _V3),
        since="Intel since Haswell (2013), AMD since Excavator (2015)",
        without="CPUs and virtual machines without AVX2",
    ),
    "x86-64-v4": Level(
        flag="AVX512",
        features=_sorted(_V2, _V3, _V4),
        since="Intel's Xeons since Skylake (2017), AMD since Zen 4 (2022)",
        without="CPUs and virtual machines without AVX-512, such as AMD's before Zen 4 and most Intel desktop CPUs",
    ),
}
# The levels' names before version 0.3.
_FORMER = {"sse4.2": "x86-64-v2", "avx": "x86-64-v2", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}

# An executable states the features that it was compiled for in LLVM's notation: "+avx,+avx2,-avx512f,…".
_FEATURE_LIST = re.compile(rb"(?:[+-][a-z0-9._-]+,){4,}[+-][a-z0-9._-]+")
_ENABLED = re.compile(rb"(?<![a-z0-9._-])\+([a-z0-9._-]+)")
# The features of every x86-64 CPU and the features that SSE 4.2 implies. They stay enabled in every executable's list.
_IMPLIED = frozenset({"64bit", "cmov", "crc32", "cx8", "fxsr", "mmx", "sse", "sse2", "x87"})


def default_isa() -> str:
    """Return the default instruction set: the narrowest level, or "native" if this machine lacks every level."""
    return next((name for name in LEVELS if _lacks(name) == ()), NATIVE)


def next_level(isa: str) -> str | None:
    """Return the next wider level; None if `isa` is the widest level, or this machine lacks the next one."""
    names = list(LEVELS)
    wider = names[names.index(isa) + 1 :] if isa in LEVELS else []
    return wider[0] if wider and not _lacks(wider[0]) else None


def _lacks(level: str) -> tuple[str, ...]:
    """Return the features of a level that this machine lacks."""
    if processor_family() != "x86_64":
        return LEVELS[level].features
    return tuple(sorted(set(LEVELS[level].features) - set(cpu_features())))


def check_isa(name: str) -> None:
    """Refuse an instruction set that is unknown, or that this machine cannot execute.

    Raises:
        PrecastError: the instruction set is unknown, or this machine lacks it.
    """
    if name == NATIVE:
        return
    if name in _FORMER:
        raise PrecastError(f"--cpu-isa: {name!r} is the name used before version 0.3; write {_FORMER[name]}.")
    if name not in LEVELS:
        raise PrecastError(f"--cpu-isa: expected one of {', '.join((*LEVELS, NATIVE))}, found {name!r}.")
    if processor_family() != "x86_64":
        raise PrecastError(
            f"--cpu-isa: {name} is a level of x86-64, but this machine is {processor_family()}; omit"
            " --cpu-isa, or run precast add-target on an x86-64 machine that supports this level."
        )
    if lacks := _lacks(name):
        raise PrecastError(
            f"--cpu-isa: {name} needs CPU features that this machine lacks ({', '.join(lacks)}), so programs for this"
            " level cannot be checked here; export on a machine with these features, or copy the artifact to that"
            f" machine and run precast add-target --cpu-isa {name}."
        )


def xla_flags(isa: str, flags: str) -> str:
    """Return `flags`, a value of XLA_FLAGS, plus the flag that makes XLA compile for the instruction set."""
    return flags if isa == NATIVE else f"{flags} --xla_cpu_max_isa={LEVELS[isa].flag}".strip()


# --- requirements of executables --------------------------------------------------------------------------------


def needed_features(isa: str, executables: Mapping[str, bytes], where: str) -> tuple[str, ...]:
    """Return the CPU features that a target's executables need, in LLVM's names, sorted.

    A target for a level requires every feature of the level, even those that its code does not use, and so runs on
    every machine of that level. A "native" target requires the narrowest level that covers its code, and the features
    outside the levels that its code uses.

    Args:
        isa: a key of `LEVELS`, or "native".
        executables: the executables, by program name.
        where: name of the target in messages.

    Raises:
        PrecastError: an instruction is beyond the level or unknown.
    """
    if processor_family() != "x86_64":
        return tuple(sorted({f for data in executables.values() for f in _enabled(data)} & CODEGEN_FEATURES))
    used = {
        f for name, data in executables.items() for i in _checked(isa, name, data, where) for f in i.needs
    }
    level = isa if isa != NATIVE else _narrowest(used)
    return _sorted(*LEVELS[level].features, *(used - set(LEVELS[level].features)))


def _checked(isa: str, program: str, executable: bytes, where: str) -> Iterator[Instruction]:
    """Yield the instructions of an executable; raise PrecastError at an instruction that `isa` does not include."""
    objects = object_files(executable)
    if objects is None:
        raise PrecastError(
            f"{where}: program {program!r} is in a format that precast does not know, so precast cannot tell"
            " which CPUs run it; use a jaxlib that precast supports."
        )
    try:
        for instruction in (i for elf in objects for code in code_sections(elf) for i in instructions(code)):
            if isa != NATIVE and (beyond := instruction.needs - set(LEVELS[isa].features)):
                raise PrecastError(_wider(isa, program, instruction, sorted(beyond), where))
            yield instruction
    except UnknownInstruction as error:
        advice = "" if isa == default_isa() else f" and export with --cpu-isa {default_isa()} instead"
        raise PrecastError(
            f"{where}: program {program!r} contains an instruction that precast does not know ({error}), so precast"
            f" cannot tell which CPUs run it; please report this{advice}."
        ) from None


def _wider(isa: str, program: str, instruction: Instruction, beyond: Sequence[str], where: str) -> str:
    wider = [
        name for name, level in LEVELS.items() if set(beyond) <= set(level.features) and not _lacks(name)
    ]
    return (
        f"{where}: program {program!r}: XLA was asked for {isa}, but used an instruction ({instruction.raw.hex()}) that"
        f" needs {', '.join(beyond)}; use --cpu-isa {(wider or [NATIVE])[0]}, or remove xla_cpu_max_isa from XLA_FLAGS"
        " if it is set there."
    )


def _narrowest(features: set[str]) -> str:
    """Return the narrowest level that covers these features. Ignore features that belong to no level."""
    known = features & set(list(LEVELS.values())[-1].features)
    return next(name for name, level in LEVELS.items() if known <= set(level.features))


def _enabled(executable: bytes) -> set[str]:
    return {n.decode() for list_ in _FEATURE_LIST.findall(executable) for n in _ENABLED.findall(list_)}


def declare_features(executable: bytes, features: Sequence[str]) -> bytes:
    """Return the executable with only these features enabled in its list of compile-time features.

    XLA's list contains every feature that the compiler was allowed to use, and also tuning features of one CPU vendor.
    XLA's loader logs kilobytes for each listed feature that a machine lacks, even if the code does not use the feature.
    So this function turns "+" into "-" for features that the code does not need. It always does so for AVX-512, because
    the loader would add tuning features that no machine has if AVX-512 were listed.
    """
    if processor_family() != "x86_64":
        return executable
    stated = {f.encode() for f in (*features, *_IMPLIED) if not f.startswith("avx512")}
    return _FEATURE_LIST.sub(lambda found: _signed(found[0], stated), executable)


def _signed(feature_list: bytes, stated: set[bytes]) -> bytes:
    names = feature_list.split(b",")
    return b",".join(b"-" + n[1:] if n[:1] == b"+" and n[1:] not in stated else n for n in names)


# --- names and audiences -----------------------------------------------------------------------------------------


def target_name(kind: str, features: Sequence[str]) -> str:
    """Return a target's name: ``cpu-x86-64-v2``, or ``cpu-x86-64-v3-gfni`` if it needs a feature outside the levels."""
    if processor_family() != "x86_64":
        return f"{kind}-{processor_family()}"
    level, more = level_and_extras(features)
    return "-".join((kind, level, *more))


def level_and_extras(features: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the narrowest level that covers the features, and the features that belong to no level, sorted."""
    level = _narrowest(set(features))
    return level, tuple(sorted(set(features) - set(LEVELS[level].features)))


def widest_level(features: Sequence[str]) -> str | None:
    """Return the widest level that a machine with these features has, or None."""
    return next((n for n in reversed(list(LEVELS)) if set(LEVELS[n].features) <= set(features)), None)


def audience(machine: str, features: Sequence[str]) -> str:
    """Describe in one line the CPUs that run a target, and the CPUs that cannot.

    Args:
        machine: processor family that the target is compiled for.
        features: features that the target needs.
    """
    if machine != "x86_64":
        return f"{machine} CPUs" + (f" with {' '.join(features)}" if features else "")
    level, more = level_and_extras(features)
    facts = LEVELS[level]
    extra = f"; only those with {' '.join(more)}" if more else ""
    without = f"; not {facts.without}" if facts.without else ""
    return f"{facts.since} ({level}{extra}){without}"


def audience_of(targets: Sequence[Target]) -> str | None:
    """Describe the CPUs that run an artifact's least demanding target; return None without a compiled CPU target."""
    compiled = [t for t in targets if t.runtime == "pjrt" and t.platform == "cpu"]
    if not compiled:
        return None
    least = min(compiled, key=lambda t: len(t.cpu_features))
    return audience(least.machine, least.cpu_features)
