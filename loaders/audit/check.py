"""What ``precast check`` finds: everything about a machine that an artifact does not suit, from its manifest alone."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from ..artifact import compat
from ..artifact.errors import PrecastError
from ..artifact.machine import Machine
from ..artifact.manifest import SIGNATURE_FILE, Manifest, Target
from ..artifact.units import size_text
from ..compiling.isa import audience_of, widest_level
from ..runtime import limits as limiting
from ..runtime.limits import Need
from ..runtime.resources import Limits, Memory, Processors

# A promise that ends sooner than this is worth a word.
SOON_DAYS = 30

# What a target may ask of a machine, one thing at a time, and values of its fields that ask for nothing.
_ASPECTS = {
    "TensorFlow": ("runtime",),
    "platform": ("platform", "device"),
    "machine": ("machine",),
    "jaxlib": ("jaxlib",),
    "CPU features": ("cpu_features",),
    "kernels": ("kernel_abi", "kernels"),
}
_NOTHING: dict[str, Any] = {
    "runtime": "pjrt",
    "platform": "cpu",
    "device": "any",
    "machine": "any",
    "jaxlib": "any",
    "cpu_features": (),
    "kernel_abi": 0,
    "kernels": (),
}
_TENSORFLOW = "'precast[savedmodel]'"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that does not suit, or soon will not.

    Attributes:
        what: the aspect: "jaxlib", "memory".
        problem: what is needed and what was found.
        remedy: what to do.
    """

    what: str
    problem: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class TargetReport:
    """Attributes:
    name: of the target.
    runs: whether it runs as it is.
    compiles: whether it does once it is compiled here.
    mismatches: all that keeps it from running as it is.
    """

    name: str
    runs: bool
    compiles: bool
    mismatches: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of `check`.

    Attributes:
        root: the artifact.
        name: the model's name.
        target: the target that would run; None if none would.
        compiled: True if that target would be compiled first.
        targets: the findings on each target.
        problems: other obstacles to running here.
        notes: facts that are no obstacle but worth knowing.
        expires: day until which its StableHLO is promised to compile; the earliest if targets differ.
        days_left: days until `expires`; negative when it has passed.
        signed: True if a signature exists; it is not checked.
        cpus: a description of the CPUs that run it without compiling; None if no target is for the CPU.
    """

    root: Path
    name: str
    target: str | None
    compiled: bool
    targets: tuple[TargetReport, ...]
    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    processors: Processors
    need: Need
    memory: Memory
    expires: str
    days_left: int
    signed: bool
    cpus: str | None

    @property
    def runs(self) -> bool:
        return self.target is not None and not self.problems


def check(
    root: Path,
    manifest: Manifest,
    machine: Machine,
    processors: Processors,
    memory: Memory,
    limits: Limits,
    today: date,
    *,
    target: str | None = None,
    compile: bool = False,
) -> Report:
    """Compare a manifest with a machine.

    Args:
        root: the artifact.
        manifest: its manifest.
        machine: the machine's CPU, devices and libraries.
        processors: the machine's processors.
        memory: the machine's memory.
        limits: the process's limits.
        today: for the compatibility promise of StableHLO.
        target: name of the target to run; None for the best.
        compile: also accept a target that must be compiled first.

    Raises:
        PrecastError: there is no such target.
    """
    chosen = _choice(manifest, machine, root, target, compile)
    named = [t for t in manifest.targets if target in (None, t.name)]
    need = limiting.need(manifest, chosen or named[0])
    expires = min(_day(t.stablehlo_expires, root) for t in named)
    days_left = (expires - today).days
    return Report(
        root=root,
        name=manifest.name,
        target=None if chosen is None else chosen.name,
        compiled=chosen is not None and chosen.runtime == "stablehlo",
        targets=tuple(_target(t, manifest, machine, root) for t in named),
        problems=(*_too_little(need, memory.limit), *_too_low(need, processors.threads, limits)),
        notes=(
            *_little_left(need, memory),
            *_promise(expires.isoformat(), days_left, root),
        ),
        processors=processors,
        need=need,
        memory=memory,
        expires=expires.isoformat(),
        days_left=days_left,
        signed=(root / SIGNATURE_FILE).is_file(),
        cpus=audience_of(manifest.targets),
    )


def _choice(
    manifest: Manifest, machine: Machine, root: Path, target: str | None, compile: bool
) -> Target | None:
    """The target that `load` would take, by the loader's own rule."""
    if (target is not None and target not in {t.name for t in manifest.targets}) or not manifest.targets:
        compat.choose_target(
            manifest, machine, str(root), name=target, allow_compile=compile
        )  # which refuses
    try:
        return compat.choose_target(manifest, machine, str(root), name=target, allow_compile=compile)
    except PrecastError:
        return None


def _target(target: Target, manifest: Manifest, machine: Machine, root: Path) -> TargetReport:
    compiles = _compiles(target, manifest, machine, root)
    found = tuple(_mismatches(target, manifest, machine, root, compiles))
    return TargetReport(name=target.name, runs=not found, compiles=compiles, mismatches=found)


def _compiles(target: Target, manifest: Manifest, machine: Machine, root: Path) -> bool:
    alone = replace(manifest, targets=(target,))
    chosen = _choice(alone, machine, root, target.name, compile=True)
    return chosen is not None and chosen.runtime == "stablehlo"


def _mismatches(
    target: Target, manifest: Manifest, machine: Machine, root: Path, compiles: bool
) -> Iterator[Finding]:
    nothing = replace(target, **_NOTHING)
    left = compat.mismatches(target, machine)
    for what, fields in _ASPECTS.items():
        only = replace(nothing, **{field: getattr(target, field) for field in fields})
        for problem in compat.mismatches(only, machine):
            if problem in left:
                left.remove(problem)
                problem, remedy = _own_remedy(problem, machine)
                remedy = remedy or _remedy(what, target, manifest, machine, root, compiles)
                yield Finding(what=what, problem=problem, remedy=remedy)
    for problem in left:
        yield Finding(what="target", problem=problem, remedy=_command("add-target", root))
    if target.runtime == "stablehlo":
        yield Finding(
            what="compiling",
            problem="it must be compiled first",
            remedy=_command("run", root, "--target", target.name, "--compile"),
        )


def _command(*words: object) -> str:
    """A command of precast's to be copied into a shell, whatever strangers wrote into it."""
    return shlex.join(("precast", *map(str, words)))


def _own_remedy(problem: str, machine: Machine) -> tuple[str, str | None]:
    """A problem, and what it says itself is to be done; None where it says nothing."""
    for packages in (_TENSORFLOW, compat.cuda_packages(machine.jaxlib)):
        # Not at the first "pip install": a manifest may have written that.
        if problem.endswith(f": pip install {packages}"):
            return problem.removesuffix(f": pip install {packages}"), f"pip install {packages}"
    return problem, None


def _remedy(
    what: str, target: Target, manifest: Manifest, machine: Machine, root: Path, compiles: bool
) -> str:
    here = f"{_command('add-target', root)}, or {_command('run', root, '--compile')}" if compiles else ""
    maker = manifest.provenance.versions.get("precast")
    made_it = shlex.quote(f"precast=={maker}" if maker else "precast")
    remedies = {
        "TensorFlow": f"pip install {_TENSORFLOW}",
        "platform": f"a machine with {target.platform}"
        + (f" ({target.device})" if target.device != "any" else ""),
        "machine": here or f"export on a {machine.machine} machine",
        "jaxlib": f"pip install {shlex.quote(f'jaxlib=={target.jaxlib}')}" + (f", or {here}" if here else ""),
        "CPU features": " or ".join(filter(None, (_isa(machine), here))),
        "kernels": f"pip install {made_it}, which made it, or export again",
    }
    return remedies[what]


def _isa(machine: Machine) -> str:
    """Say how to export for this machine: for the widest level whose features it has."""
    level = widest_level(machine.features) if machine.machine == "x86_64" else None
    return f"export with --cpu-isa {level}" if level else "export on a machine like this one"


def _too_little(need: Need, limit: int | None) -> Iterator[Finding]:
    if limit is not None and need.all > limit:
        yield Finding(
            what="memory",
            problem=f"it needs {size_text(need.all)} of memory, this machine or container has {size_text(limit)}",
            remedy="more memory, or an export with fewer bits (--weights int8, int4) or a shorter --context",
        )


def _little_left(need: Need, memory: Memory) -> Iterator[Finding]:
    if memory.available is not None and need.all > memory.available and need.all <= (memory.limit or 0):
        yield Finding(
            what="memory",
            problem=f"it needs {size_text(need.all)} of memory, {size_text(memory.available)} are available now",
            remedy="end what else runs here, or weights will be read from the disk again and again",
        )


def _too_low(needed: Need, threads: int, limits: Limits) -> Iterator[Finding]:
    for problem, remedy in limiting.problems(needed, threads, limits):
        yield Finding(what="limits", problem=problem, remedy=remedy)


def _promise(expires: str, days_left: int, root: Path) -> Iterator[Finding]:
    if days_left < SOON_DAYS:
        count = f"{abs(days_left)} day{'' if abs(days_left) == 1 else 's'}"
        when = f"in {count}" if days_left >= 0 else f"{count} ago"
        yield Finding(
            what="StableHLO",
            problem=f"its StableHLO is promised to compile with newer jaxlibs until {expires}, {when}",
            remedy=f"add targets while that holds ({_command('add-target', root)}), or export again",
        )


def _day(text: str, root: Path) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise PrecastError(
            f"{root}: stablehlo_expires: expected a date such as 2027-01-31, found {text!r:.40}; export the model"
            " again."
        ) from None
