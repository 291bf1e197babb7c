"""Check whether an artifact runs on a machine, using only the artifact's manifest."""

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
from .prefixes import PrefixStatus, statuses

# A compatibility promise is reported if it ends in fewer days than this.
SOON_DAYS = 30

# The fields of a target that state its requirements, by kind of requirement.
_ASPECTS = {
    "TensorFlow": ("runtime",),
    "platform": ("platform", "device"),
    "machine": ("machine",),
    "jaxlib": ("jaxlib",),
    "CPU features": ("cpu_features",),
    "kernels": ("kernel_abi", "kernels"),
}
# The values of these fields in a target without requirements.
_NO_REQUIREMENTS: dict[str, Any] = {
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
    """An obstacle to running an artifact, now or soon.

    Attributes:
        what: the kind of requirement: "jaxlib", "memory".
        problem: the requirement, and the machine's value.
        remedy: a way to meet the requirement.
    """

    what: str
    problem: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class TargetReport:
    """The findings on one target.

    Attributes:
        name: the target's name.
        runs: True if the target runs without compiling.
        compiles: True if the target runs once it is compiled here.
        mismatches: the obstacles to running without compiling.
    """

    name: str
    runs: bool
    compiles: bool
    mismatches: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """The result of `check`.

    Attributes:
        root: the artifact's folder.
        name: the model's name.
        target: the target that would run; None if no target runs.
        compiled: True if `target` would be compiled first.
        targets: the findings on each target.
        problems: obstacles that concern the whole artifact, such as too little memory.
        notes: warnings. The artifact runs in spite of them.
        expires: last day on which newer jaxlibs are guaranteed to compile the artifact's StableHLO; the earliest such
            day if targets differ.
        days_left: days until `expires`; negative when it has passed.
        signed: True if a signature exists. The signature is not verified.
        processors: the machine's processors.
        need: the memory that the artifact needs.
        memory: the machine's memory.
        prefixes: the artifact's stored prefixes.
        cpus: a description of the CPUs that run the artifact without compiling; None if no compiled target is for a
            CPU.
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
    prefixes: tuple[PrefixStatus, ...]
    cpus: str | None

    @property
    def runs(self) -> bool:
        """Return True if the artifact runs here."""
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
    allow_compile: bool = False,
) -> CheckReport:
    """Compare a manifest with a machine.

    Args:
        root: the artifact's folder.
        manifest: the artifact's manifest.
        machine: the machine's CPU, devices and libraries.
        processors: the machine's processors.
        memory: the machine's memory.
        limits: the process's limits.
        today: the date, compared with the end of StableHLO's compatibility promise.
        target: name of the target to run; None for the best.
        allow_compile: permission to choose a target that must be compiled first.

    Raises:
        PrecastError: the artifact has no target of this name.
    """
    chosen = _choice(manifest, machine, root, target, allow_compile)
    named = [t for t in manifest.targets if target in (None, t.name)]
    need = limiting.need(manifest, chosen or named[0])
    expires = min(_day(t.stablehlo_expires, root) for t in named)
    days_left = (expires - today).days
    return CheckReport(
        root=root,
        name=manifest.name,
        target=None if chosen is None else chosen.name,
        compiled=chosen is not None and chosen.runtime == "stablehlo",
        targets=tuple(_target(t, manifest, machine, root) for t in named),
        problems=(*_memory_limit(need, memory.limit), *_process_limits(need, processors.threads, limits)),
        notes=(
            *_available_memory(need, memory),
            *_compatibility_promise(expires.isoformat(), days_left, root),
        ),
        processors=processors,
        need=need,
        memory=memory,
        expires=expires.isoformat(),
        days_left=days_left,
        signed=(root / SIGNATURE_FILE).is_file(),
        prefixes=statuses(manifest, chosen, machine.isa),
        cpus=audience_of(manifest.targets),
    )


def _choice(
    manifest: Manifest, machine: Machine, root: Path, target: str | None, allow_compile: bool
) -> Target | None:
    """Return the target that `load` would choose; None if `load` would refuse the artifact.

    Raises:
        PrecastError: the artifact has no target of this name.
    """
    exists = target in {t.name for t in manifest.targets} if target is not None else bool(manifest.targets)
    try:
        return compat.choose_target(manifest, machine, str(root), name=target, allow_compile=allow_compile)
    except PrecastError:
        if not exists:
            raise
        return None


def _target(target: Target, manifest: Manifest, machine: Machine, root: Path) -> TargetReport:
    compiles = _compiles(target, manifest, machine, root)
    found = tuple(_mismatches(target, manifest, machine, root, compiles))
    return TargetReport(name=target.name, runs=not found, compiles=compiles, mismatches=found)


def _compiles(target: Target, manifest: Manifest, machine: Machine, root: Path) -> bool:
    """Return True if the target runs here once it is compiled."""
    alone = replace(manifest, targets=(target,))
    chosen = _choice(alone, machine, root, target.name, allow_compile=True)
    return chosen is not None and chosen.runtime == "stablehlo"


def _mismatches(
    target: Target, manifest: Manifest, machine: Machine, root: Path, compiles: bool
) -> Iterator[Finding]:
    bare = replace(target, **_NO_REQUIREMENTS)
    remaining = compat.mismatches(target, machine)
    for what, fields in _ASPECTS.items():
        one_aspect = replace(bare, **{field: getattr(target, field) for field in fields})
        for problem in compat.mismatches(one_aspect, machine):
            if problem in remaining:
                remaining.remove(problem)
                problem, remedy = _split_remedy(problem, machine)
                remedy = remedy or _remedy(what, target, manifest, machine, root, compiles)
                yield Finding(what=what, problem=problem, remedy=remedy)
    for problem in remaining:
        yield Finding(what="target", problem=problem, remedy=_command("add-target", root))
    if target.runtime == "stablehlo":
        yield Finding(
            what="compiling",
            problem="it must be compiled first",
            remedy=_command("run", root, "--target", target.name, "--compile"),
        )


def _command(*words: object) -> str:
    """Return a precast command that can be pasted into a shell, with untrusted words quoted."""
    return shlex.join(("precast", *map(str, words)))


def _split_remedy(problem: str, machine: Machine) -> tuple[str, str | None]:
    """Split a problem into its text and the pip command at its end; return None instead of a missing command."""
    for packages in (_TENSORFLOW, compat.cuda_packages(machine.jaxlib)):
        # Match only at the end, because an untrusted manifest may put "pip install" elsewhere into the problem.
        if problem.endswith(f": pip install {packages}"):
            return problem.removesuffix(f": pip install {packages}"), f"pip install {packages}"
    return problem, None


def _remedy(
    what: str, target: Target, manifest: Manifest, machine: Machine, root: Path, compiles: bool
) -> str:
    here = f"{_command('add-target', root)}, or {_command('run', root, '--compile')}" if compiles else ""
    maker = manifest.provenance.versions.get("precast")
    maker_package = shlex.quote(f"precast=={maker}" if maker else "precast")
    remedies = {
        "TensorFlow": f"pip install {_TENSORFLOW}",
        "platform": f"a machine with {target.platform}"
        + (f" ({target.device})" if target.device != "any" else ""),
        "machine": here or f"export on a {machine.machine} machine",
        "jaxlib": f"pip install {shlex.quote(f'jaxlib=={target.jaxlib}')}" + (f", or {here}" if here else ""),
        "CPU features": " or ".join(filter(None, (_isa(machine), here))),
        "kernels": f"pip install {maker_package}, which made the artifact, or export the model again",
    }
    return remedies[what]


def _isa(machine: Machine) -> str:
    """Return a remedy: export for the widest level that the machine supports."""
    level = widest_level(machine.features) if machine.machine == "x86_64" else None
    return f"export with --cpu-isa {level}" if level else "export on a machine like this one"


def _memory_limit(need: Need, limit: int | None) -> Iterator[Finding]:
    if limit is not None and need.all > limit:
        yield Finding(
            what="memory",
            problem=f"it needs {size_text(need.all)} of memory, but this machine or container has {size_text(limit)}",
            remedy="more memory, or an export with fewer bits (--weights int8, int4) or a shorter --context",
        )


def _available_memory(need: Need, memory: Memory) -> Iterator[Finding]:
    if memory.available is not None and need.all > memory.available and need.all <= (memory.limit or 0):
        yield Finding(
            what="memory",
            problem=f"it needs {size_text(need.all)} of memory, but only {size_text(memory.available)} is free now",
            remedy="end other programs; otherwise the system reads the weights from the disk again and again",
        )


def _process_limits(need: Need, threads: int, limits: Limits) -> Iterator[Finding]:
    for problem, remedy in limiting.problems(need, threads, limits):
        yield Finding(what="limits", problem=problem, remedy=remedy)


def _compatibility_promise(expires: str, days_left: int, root: Path) -> Iterator[Finding]:
    if days_left < SOON_DAYS:
        count = f"{abs(days_left)} day{'' if abs(days_left) == 1 else 's'}"
        when = f"in {count}" if days_left >= 0 else f"{count} ago"
        yield Finding(
            what="StableHLO",
            problem=f"newer jaxlibs are guaranteed to compile its StableHLO only until {expires} ({when})",
            remedy=f"add the targets that you need before that day ({_command('add-target', root)}), or export again",
        )


def _day(text: str, root: Path) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise PrecastError(
            f"{root}: stablehlo_expires: expected a date such as 2027-01-31, found {text!r:.40}; export the model"
            " again."
        ) from None
