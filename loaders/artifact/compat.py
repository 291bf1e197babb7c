"""Which of an artifact's targets run on a machine, decided from the manifest before anything is deserialised."""

from collections.abc import Sequence
from dataclasses import replace

from .errors import PrecastError
from .machine import Machine
from .manifest import Manifest, Target


def mismatches(target: Target, machine: Machine) -> list[str]:
    """Every reason why `target` does not run on `machine`: what it needs, and what was found."""
    found = []
    if target.platform != "cpu":
        found.append(f"it needs platform {target.platform}, this loader runs cpu")
    if target.machine not in ("any", machine.machine):
        found.append(f"it is compiled for {target.machine}, this machine is {machine.machine}")
    if target.jaxlib not in ("any", machine.jaxlib):
        found.append(f"it is compiled by jaxlib {target.jaxlib}, installed is {machine.jaxlib}")
    if missing := sorted(set(target.cpu_features) - set(machine.features)):
        found.append(f"it uses CPU features that this machine lacks ({', '.join(missing)})")
    if target.kernel_abi not in (0, machine.kernel_abi):
        found.append(
            f"it calls kernels of ABI {target.kernel_abi}, installed are those of ABI {machine.kernel_abi}"
        )
    if unknown := sorted(set(target.kernels) - set(machine.kernels)):
        found.append(f"it calls kernels that are not installed ({', '.join(unknown)})")
    return found


def choose_target(
    manifest: Manifest, machine: Machine, where: str, *, name: str | None, may_compile: bool
) -> Target:
    """The first target whose executables match the machine; else, if asked for, the first that can be compiled.

    Args:
        manifest: of the artifact.
        machine: to run on.
        where: what messages call the artifact.
        name: the target to take; None for the best.
        may_compile: whether a target that must be compiled first will do.

    Raises:
        PrecastError: with every mismatch of every target considered, and what to do.
    """
    reasons = []
    targets = _named(manifest.targets, name, where)
    executables = [t for t in targets if t.runtime != "stablehlo"]
    others = [_to_compile(t) if may_compile else t for t in targets if may_compile or t not in executables]
    for target in (*executables, *others):
        wrong = mismatches(target, machine)
        if target.runtime == "stablehlo" and not may_compile:
            wrong.append("it must be compiled first (--compile does so)")
        if not wrong:
            return target
        reasons.append(f"target {target.name!r}: {', and '.join(wrong)}")
    advice = "" if may_compile else ", or compile from StableHLO with --compile"
    raise PrecastError(
        f"{where}: no target runs here: {'; '.join(dict.fromkeys(reasons))}. Export on a machine like this one or"
        f" install what the target needs{advice}."
    )


def _to_compile(target: Target) -> Target:
    """The target when its StableHLO is compiled here: for this machine, by this jaxlib, with the same kernels."""
    return replace(target, runtime="stablehlo", machine="any", jaxlib="any", cpu_features=())


def _named(targets: Sequence[Target], name: str | None, where: str) -> Sequence[Target]:
    if not targets:
        raise PrecastError(f"{where}: expected at least one target, found none; export the model again.")
    chosen = [t for t in targets if name in (None, t.name)]
    if not chosen:
        known = ", ".join(repr(t.name) for t in targets)
        raise PrecastError(f"{where}: target {name!r} is not in the artifact; it holds {known}.")
    return chosen
