"""Match an artifact's targets with a machine by the manifest alone, without deserialising a program."""

from collections.abc import Sequence
from dataclasses import replace

from .errors import PrecastError
from .machine import Machine, vector_width
from .manifest import Manifest, Target


def mismatches(target: Target, machine: Machine) -> list[str]:
    """Return every reason why a target cannot run on a machine. Each states the requirement and the machine's value."""
    found = []
    if target.platform == "cuda":
        found += _cuda_mismatches(target, machine)
    elif target.platform not in ("any", "cpu"):
        found.append(f"it needs platform {target.platform}, but this loader supports only cpu and cuda")
    if target.runtime == "savedmodel" and not machine.tensorflow:
        found.append("it needs TensorFlow, which is not installed: pip install 'precast[savedmodel]'")
    if target.machine not in ("any", machine.machine):
        found.append(f"it was compiled for {target.machine}, but this machine is {machine.machine}")
    if target.jaxlib not in ("any", machine.jaxlib):
        found.append(f"it was compiled by jaxlib {target.jaxlib}, but {machine.jaxlib} is installed")
    if missing := sorted(set(target.cpu_features) - set(machine.features)):
        found.append(f"it uses CPU features that this machine lacks ({', '.join(missing)})")
    if target.kernel_abi != machine.kernel_abi and (target.kernel_abi or target.kernels):
        found.append(
            f"it calls kernels of ABI {target.kernel_abi}, but ABI {machine.kernel_abi} is installed"
        )
    if unknown := sorted(set(target.kernels) - set(machine.kernels)):
        found.append(f"it calls kernels that are not installed ({', '.join(unknown)})")
    return found


def cuda_packages(jaxlib: str) -> str:
    """Return the pip requirement for CUDA and for jax's CUDA plugin, whose version must equal `jaxlib`."""
    return f"'jax-cuda12-plugin[with-cuda]=={jaxlib}'"


def _cuda_mismatches(target: Target, machine: Machine) -> list[str]:
    if not machine.gpus:
        return ["it needs an NVIDIA GPU, but this machine has none"]
    found = []
    if machine.cuda_plugin != machine.jaxlib:
        instead = (
            f"but {machine.cuda_plugin} is installed" if machine.cuda_plugin else "which is not installed"
        )
        found.append(
            f"it needs jax's CUDA plugin {machine.jaxlib}, {instead}: pip install {cuda_packages(machine.jaxlib)}"
        )
    # The driver's files name the whole GPU. The manifest's name comes from XLA, which may add a suffix for a partition
    # of the GPU (MIG).
    known = any(gpu == "any" or target.device.startswith(gpu) for gpu in machine.gpus)
    if target.device != "any" and not known:
        found.append(f"it was compiled for {target.device}, but this machine has {', '.join(machine.gpus)}")
    return found


def choose_target(
    manifest: Manifest, machine: Machine, where: str, *, name: str | None, allow_compile: bool
) -> Target:
    """Return the best target that matches the machine.

    XLA executables rank above a SavedModel, and a SavedModel ranks above a target that must be compiled first. Ties are
    resolved by these preferences in turn: a GPU over the CPU, a wider instruction set over a narrower one, programs
    that call precast's kernels over others, and an earlier place in the manifest over a later one.

    Args:
        manifest: the artifact's manifest.
        machine: the machine that will run the target.
        where: name of the artifact in messages.
        name: name of the only target to consider; None considers all.
        allow_compile: permission to choose a target that must be compiled from StableHLO, because it has no executables
            or its executables do not fit the machine.

    Raises:
        PrecastError: no target matches. The message lists every mismatch and a remedy.
    """
    targets = _named(manifest.targets, name, where)
    candidates = [*targets]
    if allow_compile:
        candidates += [_as_stablehlo(t) for t in targets if t.runtime == "pjrt" and _has_stablehlo(t)]
    wrong = {i: mismatches(target, machine) for i, target in enumerate(candidates)}
    for i, target in enumerate(candidates):
        if target.runtime == "stablehlo" and not allow_compile:
            wrong[i].append("it must be compiled first (--compile does so)")
    fitting = [target for i, target in enumerate(candidates) if not wrong[i]]
    if fitting:
        return min(fitting, key=_preference)
    reasons = [f"target {t.name!r}: {', and '.join(wrong[i])}" for i, t in enumerate(candidates)]
    advice = "" if allow_compile else ", or compile from StableHLO with --compile"
    raise PrecastError(
        f"{where}: no target runs here: {'; '.join(dict.fromkeys(reasons))}. Export the model on a machine like"
        f" this one, or install the requirements of one of the targets{advice}."
    )


def _preference(target: Target) -> tuple[int, ...]:
    """Return a sort key, which is smallest for the best target."""
    runtime = ("pjrt", "savedmodel", "stablehlo").index(target.runtime)
    platform = {"cuda": 0, "cpu": 1}.get(target.platform, 2)
    # All targets that would be compiled here have the same instruction set, so the kernels decide: a target that calls
    # precast's kernels is faster.
    return runtime, platform, -vector_width(target.cpu_features), -bool(target.kernels)


def _has_stablehlo(target: Target) -> bool:
    return all(program.stablehlo is not None for program in target.programs)


def _as_stablehlo(target: Target) -> Target:
    """Return a copy of a target that is to be compiled here from its StableHLO.

    The copy accepts any jaxlib and CPU, but requires the same kernels.
    """
    return replace(target, runtime="stablehlo", device="any", machine="any", jaxlib="any", cpu_features=())


def _named(targets: Sequence[Target], name: str | None, where: str) -> Sequence[Target]:
    if not targets:
        raise PrecastError(f"{where}: expected at least one target, found none; export the model again.")
    chosen = [t for t in targets if name in (None, t.name)]
    if not chosen:
        known = ", ".join(repr(t.name) for t in targets)
        raise PrecastError(
            f"{where}: target {name!r} is not in the artifact; name one of its targets: {known}."
        )
    return chosen
