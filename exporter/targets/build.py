"""Lower, compile and write the programs of a target."""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax
from jax import export as jax_export
from jax.sharding import SingleDeviceSharding
from jaxlib.version import __version__ as jaxlib_version

from precast import kernels
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import Program, ProgramMemory, Target, Value
from precast.loaders.compiling.compiler import Compilation, compile_target
from precast.loaders.compiling.isa import LEVELS, NATIVE, default_isa, target_name
from precast.loaders.runtime.pjrt import register_kernels

from ..programs import ProgramSpec, with_layouts
from .built import STABLEHLO_LIFE, BuiltProgram, OnBuilt, without_source_locations
from .kinds import TargetKind
from .savedmodel import build_savedmodel
from .stablehlo import for_all_jaxlibs


def build_target(
    kind: TargetKind,
    programs: Sequence[ProgramSpec],
    root: Path,
    created: date,
    on_built: OnBuilt,
) -> Target:
    """Write every program of a target below ``root/programs/<kind>/``.

    Args:
        kind: the kind of target; executables for the CPU need `build_targets` instead.
        programs: the programs, made of the kind's operations.
        root: the artifact's folder.
        created: day of the export.
        on_built: called with each program that has been written.

    Raises:
        PrecastError: the compiler chooses different layouts of the KV cache for different programs.
    """
    if kind.runtime == "savedmodel":
        return build_savedmodel(kind, programs, root, created, on_built)
    register_kernels()
    folder = root / "programs" / kind.name
    folder.mkdir(parents=True)
    device = None if kind.device is None else kind.device()
    built = []
    with without_source_locations():
        for spec in _laid_out(kind, programs, device):
            built.append(_build_program(kind, spec, folder, device))
            on_built(built[-1])
    compiled = kind.runtime == "pjrt"
    target = Target(
        name=_target_name(kind, device),
        runtime=kind.runtime,
        platform=kind.platform,
        device="any" if device is None else device.device_kind,
        machine="any",
        jaxlib=jaxlib_version if compiled else "any",
        cpu_features=(),
        kernel_abi=kernels.ABI_VERSION if kind.ops.kernels else 0,
        kernels=kind.ops.kernels,
        xla_flags=os.environ.get("XLA_FLAGS", "") if compiled else "",
        stablehlo_expires=(created + STABLEHLO_LIFE).isoformat(),
        programs=tuple(b.program for b in built),
    )
    _check_cache_layouts(target)
    return target


def build_targets(
    kind: TargetKind,
    programs: Sequence[ProgramSpec],
    root: Path,
    created: date,
    isas: Sequence[str] | None,
    log: Callable[[str], None],
    on_built: OnBuilt,
) -> list[Target]:
    """Write the targets of a kind: one for each instruction set if the kind has executables for the CPU, else one.

    Executables for the CPU are all compiled from the same StableHLO, in child processes. XLA reads the permitted
    instruction set only once in a process, and this process must permit all of the machine's instructions, because it
    computes the reference.

    Args:
        kind: the kind of target.
        programs: the programs, made of the kind's operations.
        root: the artifact's folder.
        created: day of the export.
        isas: instruction sets of CPU executables; None for `default_isa`, or for a wider set if XLA needs one.
        log: called with the name of each step.
        on_built: called with each program that has been written.

    Raises:
        PrecastError: see `build_target` and `precast.loaders.compiling.compiler.compile_target`.
    """
    if kind.runtime != "pjrt" or kind.platform != "cpu":
        log(f"compiling target {kind.name}" if kind.runtime == "pjrt" else f"lowering target {kind.name}")
        return [build_target(kind, programs, root, created, on_built)]
    log(f"lowering target {kind.name}")
    lowered: list[BuiltProgram] = []
    as_stablehlo = dataclasses.replace(kind, runtime="stablehlo")
    source = build_target(as_stablehlo, programs, root, created, lowered.append)
    targets: list[Target] = []
    # The widest level comes first, because the first target's answers become the golden answers. Native comes last,
    # because its level is known only after compiling.
    wanted = (default_isa(),) if isas is None else isas
    for isa in (name for name in (*reversed(list(LEVELS)), NATIVE) if name in wanted):
        log(f"compiling target {kind.name} for {isa}")
        target, files, compiled = _compile(
            source, kind, root, isa, exact=isas is not None, is_first=not targets
        )
        if any(other.name == target.name for other in targets):
            level = target.name.removeprefix(f"{kind.name}-")
            log(f"skipping {isa}: its executables need {level}, and that target exists already")
            continue
        _write_executables(root, files)
        for program in target.programs:
            on_built(_built_program(target, program, files, compiled, lowered if not targets else ()))
        targets.append(target)
    return targets


def _compile(
    source: Target, kind: TargetKind, root: Path, isa: str, *, exact: bool, is_first: bool
) -> tuple[Target, dict[str, bytes], dict[str, Compilation]]:
    """Compile the programs of `source` for an instruction set.

    The executables of the first target are stored in the folder of the StableHLO. Each other target has its own folder.
    """
    names = {str(p.stablehlo) for p in source.programs}
    return compile_target(
        source,
        {name: (root / name).read_bytes() for name in names},
        lambda features: target_name(kind.name, features),
        f"target {kind.name!r}",
        isa=isa,
        exact=exact,
        jaxlib=jaxlib_version,
        folder=kind.name if is_first else None,
        log=lambda _: None,
    )


def _write_executables(root: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)


def _built_program(
    target: Target,
    program: Program,
    files: Mapping[str, bytes],
    compiled: Mapping[str, Compilation],
    lowered: Sequence[BuiltProgram],
) -> BuiltProgram:
    """Return the record of a compiled program, with the cost of lowering it if `lowered` contains that program."""
    lowering = next((b for b in lowered if b.program.name == program.name), None)
    return BuiltProgram(
        target=target.name,
        program=program,
        lower_s=lowering.lower_s if lowering else 0.0,
        compile_s=compiled[program.name].seconds,
        bytes=len(files[str(program.executable)]) + (lowering.bytes if lowering else 0),
    )


def _laid_out(
    kind: TargetKind, programs: Sequence[ProgramSpec], device: jax.Device | None
) -> Sequence[ProgramSpec]:
    """Return the programs, with the layouts of caches and weights that the kind chooses, if it chooses any."""
    if kind.layouts is None or device is None:
        return programs
    layouts = kind.layouts(next(spec for spec in programs if spec.kind == "decode"), device)
    return [with_layouts(spec, layouts) for spec in programs]


def _target_name(kind: TargetKind, device: jax.Device | None) -> str:
    if device is None:
        return kind.name
    return "-".join([kind.name, *re.findall(r"[a-z0-9]+", device.device_kind.lower())])


def _build_program(
    kind: TargetKind, spec: ProgramSpec, folder: Path, device: jax.Device | None
) -> BuiltProgram:
    # Unused arguments stay in the signature, so that the signature matches the manifest.
    function = jax.jit(spec.function, donate_argnums=spec.donated, keep_unused=True)
    started = time.perf_counter()
    stablehlo = _stablehlo(kind, spec, function)
    if device is not None:
        place = SingleDeviceSharding(device)
        function = jax.jit(
            spec.function,
            in_shardings=place,
            out_shardings=place,
            donate_argnums=spec.donated,
            keep_unused=True,
        )
    lowered = function.lower(*spec.abstract_arguments()) if kind.runtime == "pjrt" else None
    lowered_at = time.perf_counter()
    compiled = lowered.compile() if lowered is not None else None
    compiled_at = time.perf_counter()
    files = {"stablehlo": stablehlo}
    if compiled is not None:
        executable: Any = compiled.runtime_executable()
        files["xla"] = bytes(executable.serialize())
    for suffix, data in files.items():
        (folder / f"{spec.name}.{suffix}").write_bytes(data)
    return BuiltProgram(
        target=kind.name,
        program=_program(spec, f"programs/{kind.name}/{spec.name}", compiled),
        lower_s=lowered_at - started,
        compile_s=compiled_at - lowered_at if compiled is not None else 0.0,
        bytes=sum(map(len, files.values())),
    )


def _stablehlo(kind: TargetKind, spec: ProgramSpec, function: jax.stages.Wrapped) -> bytes:
    """Return a program's StableHLO for all platforms of the target; jaxlib can compile it without jax.

    A module that jax.export makes for several platforms takes the platform's index as an extra argument, and branches
    on it even if the branches are equal. Each platform is therefore lowered alone, and the modules must be equal.
    """
    checks = [jax_export.DisabledSafetyCheck.custom_call(name) for name in kind.ops.kernels]
    modules = {}
    for platform in kind.lowered_for:
        exported = jax_export.export(function, platforms=[platform], disabled_checks=checks)(
            *spec.abstract_arguments()
        )
        if exported.module_kept_var_idx != tuple(range(len(spec.arguments))):
            raise RuntimeError(f"{spec.name}: jax.export dropped arguments: {exported.module_kept_var_idx}")
        modules[platform] = for_all_jaxlibs(
            exported.mlir_module_serialized, f"target {kind.name!r}: program {spec.name!r}"
        )
    if len(set(modules.values())) > 1:
        raise PrecastError(
            f"target {kind.name!r}: jax {jax.__version__} lowers program {spec.name!r} differently for"
            f" {', '.join(modules)}, so one module cannot serve them all: please report this."
        )
    return modules[kind.lowered_for[0]]


def _program(spec: ProgramSpec, stem: str, compiled: jax.stages.Compiled | None) -> Program:
    program = Program(
        name=spec.name,
        kind=spec.kind,
        tokens=spec.tokens,
        executable=None,
        stablehlo=f"{stem}.stablehlo",
        arguments=spec.arguments,
        results=spec.results,
        flops=spec.flops,
        memory=None,
    )
    if compiled is None:
        return program
    stats: Any = compiled.memory_analysis()
    inputs, outputs = compiled.input_formats[0], compiled.output_formats
    return dataclasses.replace(
        program,
        executable=f"{stem}.xla",
        arguments=_with_layouts(spec.arguments, inputs),
        results=_with_layouts(spec.results, outputs),
        memory=ProgramMemory(
            arguments=stats.argument_size_in_bytes,
            results=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporary=stats.temp_size_in_bytes,
        ),
    )


def _with_layouts(values: Sequence[Value], formats: Sequence[Any]) -> tuple[Value, ...]:
    """Return values with the layouts that the compiler chose; `formats` permutes the current layouts."""
    return tuple(
        dataclasses.replace(v, layout=tuple(v.layout[axis] for axis in f.layout.major_to_minor))
        for v, f in zip(values, formats, strict=True)
    )


def _check_cache_layouts(target: Target) -> None:
    """Refuse a target whose programs have different layouts of the KV cache, because all programs share the cache."""
    layouts = {
        (value.name, value.layout)
        for program in target.programs
        for value in (*program.arguments, *program.results)
        if value.role == "cache"
    }
    if len(layouts) != len({name for name, _ in layouts}):
        raise PrecastError(
            f"target {target.name!r}: the compiler gives the KV cache different layouts in different programs:"
            f" {layouts}; please report this."
        )
