"""Lowers and compiles the programs of a target and writes them."""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import jax
from jax import export as jax_export
from jax.sharding import SingleDeviceSharding
from jaxlib.version import __version__ as jaxlib_version

from precast import kernels
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import processor_family
from precast.loaders.artifact.manifest import Program, ProgramMemory, Target, Value
from precast.loaders.compiling import compile_target
from precast.loaders.isa import ISAS, NATIVE, needed_features, target_name
from precast.loaders.runtime.pjrt import register_kernels
from precast.loaders.runtime.serialized import canonical

from ..programs import ProgramSpec, arranged
from . import TargetKind
from .stablehlo import for_all_jaxlibs

# jax.export promises to read what it wrote for six months.
STABLEHLO_LIFE = timedelta(days=180)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A program that has been written, for progress and summary.

    Attributes:
        lower_s: seconds to trace and lower it, twice: for the executable and for the StableHLO.
        compile_s: seconds to compile it; 0 where nothing was compiled.
        bytes: of its files.
    """

    target: str
    program: Program
    lower_s: float
    compile_s: float
    bytes: int


def build_target(
    kind: TargetKind,
    programs: Sequence[ProgramSpec],
    root: Path,
    created: date,
    report: Callable[[Built], None],
) -> Target:
    """Writes every program of a target below ``root/programs/<kind>/``.

    Args:
        kind: which target.
        programs: built with the target's operations.
        root: the artifact's folder.
        created: day of the export.
        report: called with each program as it is done.

    Raises:
        PrecastError: when the compiler gives the cache different layouts in different programs.
    """
    if kind.runtime == "savedmodel":
        from .savedmodel import build_savedmodel  # which builds on this file

        return build_savedmodel(kind, programs, root, created, report)
    register_kernels()
    folder = root / "programs" / kind.name
    folder.mkdir(parents=True)
    device = None if kind.device is None else kind.device()
    built = []
    with without_source_locations():
        for spec in _laid_out(kind, programs, device):
            built.append(_build_program(kind, spec, folder, device))
            report(built[-1])
    compiled = kind.runtime == "pjrt"
    # What runs on another device has nothing in it of the processor beside it.
    for_cpu = compiled and kind.platform == "cpu"
    features = _features(root, [b.program for b in built]) if for_cpu else ()
    target = Target(
        name=_target_name(kind, features, device),
        runtime=kind.runtime,
        platform=kind.platform,
        device="any" if device is None else device.device_kind,
        machine=processor_family() if for_cpu else "any",
        jaxlib=jaxlib_version if compiled else "any",
        cpu_features=features,
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
    isas: Sequence[str],
    stage: Callable[[str], None],
    report: Callable[[Built], None],
) -> list[Target]:
    """Writes a target, or several where executables for several instruction sets are asked for.

    They share one StableHLO. The one for this machine is compiled as it was traced; XLA takes a narrower instruction
    set only when a process starts, so those are compiled from the StableHLO in child processes.

    Args:
        isas: instruction sets that executables for the CPU are compiled for.
        stage: told what begins.

    Other arguments, and errors, as for `build_target` and `precast.loaders.compiling.compile_target`.
    """
    if kind.runtime != "pjrt" or kind.platform != "cpu":
        stage(f"compiling target {kind.name}" if kind.runtime == "pjrt" else f"lowering target {kind.name}")
        return [build_target(kind, programs, root, created, report)]
    native = NATIVE in isas
    stage(f"{'compiling' if native else 'lowering'} target {kind.name}")
    shared = kind if native else dataclasses.replace(kind, runtime="stablehlo")
    first = build_target(shared, programs, root, created, report)
    # The widest first: what an artifact's first target answers is what it is held to.
    narrower = [isa for isa in reversed(tuple(ISAS)) if isa in isas]
    others = [_narrower(first, kind, root, isa, stage, report) for isa in narrower]
    return [first, *others] if native else others


def _narrower(
    source: Target,
    kind: TargetKind,
    root: Path,
    isa: str,
    stage: Callable[[str], None],
    report: Callable[[Built], None],
) -> Target:
    """The same programs compiled for an instruction set, from the StableHLO of `source`."""
    stage(f"compiling target {kind.name} for {isa}")
    names = {str(p.stablehlo) for p in source.programs}
    target, files, compiled = compile_target(
        source,
        {name: (root / name).read_bytes() for name in names},
        lambda features: target_name(kind.name, features),
        f"target {kind.name!r}",
        isa=isa,
        jaxlib=jaxlib_version,
        log=lambda _: None,
    )
    (root / "programs" / target.name).mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    for program in target.programs:
        made = compiled[program.name]
        report(
            Built(
                target=target.name,
                program=program,
                lower_s=0.0,
                compile_s=made.seconds,
                bytes=len(made.executable),
            )
        )
    return target


@contextmanager
def without_source_locations() -> Iterator[None]:
    """Keeps paths and lines of this machine's Python files out of the programs."""
    before = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _laid_out(
    kind: TargetKind, programs: Sequence[ProgramSpec], device: jax.Device | None
) -> Sequence[ProgramSpec]:
    """The programs with their caches and weights as the decode program wants them, where that is asked for."""
    if kind.layouts is None or device is None:
        return programs
    layouts = kind.layouts(next(spec for spec in programs if spec.kind == "decode"), device)
    return [arranged(spec, layouts) for spec in programs]


def _features(root: Path, programs: Sequence[Program]) -> tuple[str, ...]:
    """CPU features that a machine must have, read from what came out of the compiler.

    They are this machine's, unless XLA_FLAGS asked for fewer. The same list is what a machine is compared with.
    """
    return needed_features([(root / p.executable).read_bytes() for p in programs if p.executable is not None])


def _target_name(kind: TargetKind, features: Sequence[str], device: jax.Device | None) -> str:
    if kind.runtime != "pjrt":
        return kind.name
    if device is not None:
        return "-".join([kind.name, *re.findall(r"[a-z0-9]+", device.device_kind.lower())])
    return target_name(kind.name, features)


def _build_program(kind: TargetKind, spec: ProgramSpec, folder: Path, device: jax.Device | None) -> Built:
    # Arguments a program does not read stay in its signature, so that the signature says what it takes.
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
        files["xla"] = _serialized(compiled, kind.platform)
    for suffix, data in files.items():
        (folder / f"{spec.name}.{suffix}").write_bytes(data)
    return Built(
        target=kind.name,
        program=_program(spec, f"programs/{kind.name}/{spec.name}", compiled),
        lower_s=lowered_at - started,
        compile_s=compiled_at - lowered_at if compiled is not None else 0.0,
        bytes=sum(map(len, files.values())),
    )


def _serialized(compiled: jax.stages.Compiled, platform: str) -> bytes:
    executable: Any = compiled.runtime_executable()
    data = bytes(executable.serialize())
    return canonical(data) if platform == "cpu" else data


def _stablehlo(kind: TargetKind, spec: ProgramSpec, function: jax.stages.Wrapped) -> bytes:
    """The portable artifact inside what jax.export serialises: what jaxlib alone can compile.

    One for all platforms of the target. A module that jax.export makes for several takes their number as an argument
    of its own, and branches on it even where the branches are alike. So each platform's is made by itself, and they
    must be the same bytes: then none needs to be told where it runs.
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
    """Values with the layouts that the compiler chose, of arrays whose axes are in the order of their own."""
    return tuple(
        dataclasses.replace(v, layout=tuple(v.layout[axis] for axis in f.layout.major_to_minor))
        for v, f in zip(values, formats, strict=True)
    )


def _check_cache_layouts(target: Target) -> None:
    """All programs hand the same cache on, so they must lay it out alike."""
    layouts = {
        (value.name, value.layout)
        for program in target.programs
        for value in (*program.arguments, *program.results)
        if value.role == "cache"
    }
    if len(layouts) != len({name for name, _ in layouts}):
        raise PrecastError(
            f"target {target.name!r}: the compiler lays the cache out differently in different programs: {layouts}."
        )
