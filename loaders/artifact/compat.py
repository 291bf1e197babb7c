"""Which of an artifact's targets run on a machine, decided from the manifest before anything is deserialised."""

from collections.abc import Sequence
from dataclasses import replace

from .errors import PrecastError
from .machine import Machine, vector_width
from .manifest import Manifest, Target


def mismatches(target: Target, machine: Machine) -> list[str]:
    """Every reason why `target` does not run on `machine`: what it needs, and what was found."""
    found = []
    if target.platform == "cuda":
        found += _cuda_mismatches(target, machine)
    elif target.platform not in ("any", "cpu"):
        found.append(f"it needs platform {target.platform}, this loader runs cpu and cuda")
    if target.runtime == "savedmodel" and not machine.tensorflow:
        found.append("it needs TensorFlow, which is not installed: pip install 'precast[savedmodel]'")
    if target.machine not in ("any", machine.machine):
        found.append(f"it is compiled for {target.machine}, this machine is {machine.machine}")
    if target.jaxlib not in ("any", machine.jaxlib):
        found.append(f"it is compiled by jaxlib {target.jaxlib}, installed is {machine.jaxlib}")
    if missing := sorted(set(target.cpu_features) - set(machine.features)):
        found.append(f"it uses CPU features that this machine lacks ({', '.join(missing)})")
    if target.kernel_abi != machine.kernel_abi and (target.kernel_abi or target.kernels):
        found.append(
            f"it calls kernels of ABI {target.kernel_abi}, installed are those of ABI {machine.kernel_abi}"
        )
    if unknown := sorted(set(target.kernels) - set(machine.kernels)):
        found.append(f"it calls kernels that are not installed ({', '.join(unknown)})")
    return found


def cuda_packages(jaxlib: str) -> str:
    """What pip is told to install for GPUs beside a jaxlib: the plugin of the same version, and CUDA."""
    return f"'jax-cuda12-plugin[with-cuda]=={jaxlib}'"


def _cuda_mismatches(target: Target, machine: Machine) -> list[str]:
    if not machine.gpus:
        return ["it needs an NVIDIA GPU, this machine has none"]
    found = []
    if machine.cuda_plugin != machine.jaxlib:
        instead = f"installed is {machine.cuda_plugin}" if machine.cuda_plugin else "which is not installed"
        found.append(
            f"it needs jax's CUDA plugin {machine.jaxlib}, {instead}: pip install {cuda_packages(machine.jaxlib)}"
        )
    # The driver's files name a card, its client also the part of one that this process may use.
    known = any(gpu == "any" or target.device.startswith(gpu) for gpu in machine.gpus)
    if target.device != "any" and not known:
        found.append(f"it is compiled for {target.device}, this machine has {', '.join(machine.gpus)}")
    return found


def choose_target(
    manifest: Manifest, machine: Machine, where: str, *, name: str | None, allow_compile: bool
) -> Target:
    """The best target among those that match the machine.

    Executables of XLA go before a SavedModel, and that before what must be compiled first; then a GPU before the CPU;
    then the wider instruction set; then what stands first in the manifest.

    Args:
        manifest: of the artifact.
        machine: to run on.
        where: what messages call the artifact.
        name: the target to take; None for the best.
        allow_compile: whether a target that must be compiled first will do. Where nothing else matches, those
            with executables are compiled too, from their StableHLO.

    Raises:
        PrecastError: with every mismatch of every target considered, and what to do.
    """
    targets = _named(manifest.targets, name, where)
    candidates = [*targets]
    if allow_compile:
        candidates += [_to_compile(t) for t in targets if t.runtime == "pjrt" and _has_stablehlo(t)]
    wrong = {i: mismatches(target, machine) for i, target in enumerate(candidates)}
    for i, target in enumerate(candidates):
        if target.runtime == "stablehlo" and not allow_compile:
            wrong[i].append("it must be compiled first (--compile does so)")
    fitting = [target for i, target in enumerate(candidates) if not wrong[i]]
    if fitting:
        return min(fitting, key=_preference)  # the first of several that are as good
    reasons = [f"target {t.name!r}: {', and '.join(wrong[i])}" for i, t in enumerate(candidates)]
    advice = "" if allow_compile else ", or compile from StableHLO with --compile"
    raise PrecastError(
        f"{where}: no target runs here: {'; '.join(dict.fromkeys(reasons))}. Export on a machine like this one or"
        f" install what the target needs{advice}."
    )


def _preference(target: Target) -> tuple[int, ...]:
    """The smaller, the better."""
    runtime = ("pjrt", "savedmodel", "stablehlo").index(target.runtime)
    platform = {"cuda": 0, "cpu": 1}.get(target.platform, 2)
    # Of what is compiled here, all have the same instruction set, and programs that call kernels are quicker.
    return runtime, platform, -vector_width(target.cpu_features), -bool(target.kernels)


def _has_stablehlo(target: Target) -> bool:
    return all(program.stablehlo is not None for program in target.programs)


def _to_compile(target: Target) -> Target:
    """The target when its StableHLO is compiled here: for this machine, by this jaxlib, with the same kernels."""
    return replace(target, runtime="stablehlo", device="any", machine="any", jaxlib="any", cpu_features=())


def _named(targets: Sequence[Target], name: str | None, where: str) -> Sequence[Target]:
    if not targets:
        raise PrecastError(f"{where}: expected at least one target, found none; export the model again.")
    chosen = [t for t in targets if name in (None, t.name)]
    if not chosen:
        known = ", ".join(repr(t.name) for t in targets)
        raise PrecastError(f"{where}: target {name!r} is not in the artifact; it holds {known}.")
    return chosen
