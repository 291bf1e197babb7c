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
from jaxlib.version import __version__ as jaxlib_version

from precast import kernels
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import CODEGEN_FEATURES, cpu_features, processor_family
from precast.loaders.artifact.manifest import Program, ProgramMemory, Target, Value
from precast.loaders.runtime.pjrt import register_kernels

from ..programs import ProgramSpec
from . import TargetKind

# jax.export promises to read what it wrote for six months.
STABLEHLO_LIFE = timedelta(days=180)

# How LLVM spells a machine inside an executable: "+avx,+avx2,-avx512f,…".
_FEATURE_LIST = re.compile(rb"(?:[+-][a-z0-9._-]+,){4,}[+-][a-z0-9._-]+")
_ENABLED = re.compile(rb"(?<![a-z0-9._-])\+([a-z0-9._-]+)")


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
    register_kernels()
    folder = root / "programs" / kind.name
    folder.mkdir(parents=True)
    built = []
    with _without_source_locations():
        for spec in programs:
            built.append(_build_program(kind, spec, folder))
            report(built[-1])
    compiled = kind.runtime == "pjrt"
    features = _features(root, built[-1].program) if compiled else ()
    target = Target(
        name=_target_name(kind, features),
        runtime=kind.runtime,
        platform="cpu",
        device="any",
        machine=processor_family() if compiled else "any",
        jaxlib=jaxlib_version if compiled else "any",
        cpu_features=features,
        kernel_abi=kernels.ABI_VERSION if kind.ops.kernels else 0,
        kernels=kind.ops.kernels,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        stablehlo_expires=(created + STABLEHLO_LIFE).isoformat(),
        programs=tuple(b.program for b in built),
    )
    _check_cache_layouts(target)
    return target


@contextmanager
def _without_source_locations() -> Iterator[None]:
    """Keeps paths and lines of this machine's Python files out of the programs."""
    before = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _features(root: Path, program: Program) -> tuple[str, ...]:
    """CPU features that LLVM was allowed to use, read from what came out of it.

    They are this machine's, unless XLA_FLAGS asked for fewer. The same list is what a machine is compared with.
    """
    data = b"" if program.executable is None else (root / program.executable).read_bytes()
    found = {name.decode() for list_ in _FEATURE_LIST.findall(data) for name in _ENABLED.findall(list_)}
    used = tuple(sorted(found & CODEGEN_FEATURES))
    return used or cpu_features()


def _target_name(kind: TargetKind, features: Sequence[str]) -> str:
    if kind.runtime != "pjrt":
        return kind.name
    widest = next((f for f in ("avx512f", "avx2", "sve2", "neon") if f in features), None)
    return "-".join(filter(None, (kind.name, processor_family(), widest)))


def _build_program(kind: TargetKind, spec: ProgramSpec, folder: Path) -> Built:
    # Arguments a program does not read stay in its signature, so that the signature says what it takes.
    function = jax.jit(spec.function, donate_argnums=spec.donated, keep_unused=True)
    started = time.perf_counter()
    stablehlo = _stablehlo(kind, spec, function)
    lowered = function.lower(*spec.abstract_arguments()) if kind.runtime == "pjrt" else None
    lowered_at = time.perf_counter()
    compiled = lowered.compile() if lowered is not None else None
    compiled_at = time.perf_counter()
    files = {"stablehlo": stablehlo}
    if compiled is not None:
        files["xla"] = _serialized(compiled)
    for suffix, data in files.items():
        (folder / f"{spec.name}.{suffix}").write_bytes(data)
    return Built(
        target=kind.name,
        program=_program(spec, f"programs/{kind.name}/{spec.name}", compiled),
        lower_s=lowered_at - started,
        compile_s=compiled_at - lowered_at if compiled is not None else 0.0,
        bytes=sum(map(len, files.values())),
    )


def _serialized(compiled: jax.stages.Compiled) -> bytes:
    executable: Any = compiled.runtime_executable()
    return bytes(executable.serialize())


def _stablehlo(kind: TargetKind, spec: ProgramSpec, function: jax.stages.Wrapped) -> bytes:
    """The portable artifact inside what jax.export serialises: what jaxlib alone can compile."""
    checks = [jax_export.DisabledSafetyCheck.custom_call(name) for name in kind.ops.kernels]
    exported = jax_export.export(function, platforms=["cpu"], disabled_checks=checks)(
        *spec.abstract_arguments()
    )
    if exported.module_kept_var_idx != tuple(range(len(spec.arguments))):
        raise RuntimeError(f"{spec.name}: jax.export dropped arguments: {exported.module_kept_var_idx}")
    return exported.mlir_module_serialized


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
    """Values with the layouts that the compiler chose."""
    return tuple(
        dataclasses.replace(v, layout=tuple(f.layout.major_to_minor))
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
