"""Compile StableHLO to executables in a child process that needs only jaxlib, without tracing or jax.

The compiler runs in a child process for two reasons. XLA reads the instruction set from XLA_FLAGS only once, when XLA
is loaded, so another instruction set needs another process. And a crash of the compiler ends only the child.

`child_process` describes the messages. A request states the number of threads, and its data is a StableHLO artifact.
The answer states the program's layouts and memory, and its data is the executable.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..artifact.errors import PrecastError, printable
from ..artifact.json_records import from_json
from ..artifact.machine import processor_family
from ..artifact.manifest import Program, ProgramMemory, Target, Value
from ..progress import Progress
from . import child_process
from . import isa as isas

_HERE = "child"


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """The result of compiling a program.

    Attributes:
        executable: the serialised executable, for `pjrt.Client.load`.
        memory: memory that a call needs, as the compiler reports it.
        layouts: layouts of the arguments and of the results: axes from the slowest to the fastest in memory.
        seconds: duration of the compilation.
    """

    executable: bytes
    memory: ProgramMemory
    layouts: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]
    seconds: float


def compile_programs(
    programs: Iterable[tuple[str, bytes]],
    where: str,
    *,
    isa: str = isas.NATIVE,
    threads: int | None = None,
    log: Callable[[str], None],
) -> dict[str, Compilation]:
    """Compile StableHLO programs one after another.

    Args:
        programs: pairs of a program's name and its hash-checked StableHLO.
        where: name of the programs' target in messages.
        isa: a key of `isa.LEVELS`, or "native".
        threads: number of computing threads; None for one per usable core. XLA needs the number at compile time,
            because it then fixes the number of parts into which it splits a loop.
        log: receives a message before each program is compiled.

    Raises:
        PrecastError: XLA refuses a program or crashes, or no child can be started.
    """
    flags = isas.xla_flags(isa, os.environ.get("XLA_FLAGS", ""))
    suffix = "" if isa == isas.NATIVE else f" for {isa}"
    compilations = {}
    try:
        with child_process.started(__name__, changes={"XLA_FLAGS": flags}) as compiler:
            for name, stablehlo in programs:
                log(f"compiling {printable(name)} from StableHLO{suffix} …")
                compilations[name] = _compile(compiler, name, stablehlo, where, isa, threads)
    except child_process.StartError as reason:
        raise PrecastError(
            f"{where}: the compiler's child process cannot be started ({reason}); compile with precast add-target in a"
            " shell, or on another machine."
        ) from None
    return compilations


def _compile(
    compiler: child_process.Child, name: str, stablehlo: bytes, where: str, isa: str, threads: int | None
) -> Compilation:
    started = time.perf_counter()
    try:
        facts, executable = compiler.ask({"threads": threads}, stablehlo)
    except child_process.Refusal as error:
        wider = isas.next_level(isa)
        hint = f" XLA may be able to compile it for a wider level: try --cpu-isa {wider}." if wider else ""
        sentence = str(error).removeprefix(f"{_HERE}: ")
        raise PrecastError(f"{where}: program {name!r}: {sentence}{hint}") from None
    except child_process.Crash as crash:
        ran_out = "; free some memory, or compile on a machine with more memory."
        advice = ran_out if crash.reason == "SIGKILL" else "; export the model again."
        raise PrecastError(
            f"{where}: the compiler ended unexpectedly while it compiled program {name!r} ({crash.reason}){advice}"
        ) from None
    return Compilation(
        executable=executable,
        memory=from_json(ProgramMemory, facts["memory"], name),
        layouts=tuple(tuple(map(tuple, values)) for values in facts["layouts"]),  # type: ignore[arg-type]
        seconds=time.perf_counter() - started,
    )


# --- a whole target -----------------------------------------------------------------------------------------


def compile_target(
    source: Target,
    contents: Mapping[str, bytes],
    name_of: Callable[[Sequence[str]], str],
    where: str,
    *,
    isa: str,
    exact: bool = True,
    jaxlib: str,
    folder: str | None = None,
    log: Callable[[str], None],
) -> tuple[Target, dict[str, bytes], dict[str, Compilation]]:
    """Compile the StableHLO of a target to executables, which make up a new target.

    Args:
        source: the target whose StableHLO is compiled.
        contents: contents of the source target's StableHLO files, by name.
        name_of: a function that returns the new target's name, given the CPU features that the target needs.
        where: name of the source target in messages.
        isa: as for `compile_programs`.
        exact: refuse instructions beyond `isa`. If False, accept them; the new target then requires the level that
            includes its instructions.
        jaxlib: version of the installed jaxlib.
        folder: name of the folder in ``programs/`` for the new target's executables; None for the new target's name.
        log: as for `compile_programs`.

    Returns:
        The new target, its executables by file name in the artifact, and the compilations by program name.

    Raises:
        PrecastError: a program has no StableHLO or cannot be compiled (see `compile_programs`), or the compiler used a
            wider instruction set or other layouts than requested.
    """
    wanted = [(p.name, contents[_stablehlo(p, where)]) for p in source.programs]
    compilations = compile_programs(wanted, where, isa=isa, log=log)
    features = isas.needed_features(
        isa if exact else isas.NATIVE, {name: c.executable for name, c in compilations.items()}, where
    )
    name = name_of(features)
    programs = tuple(
        _compiled_program(p, compilations[p.name], folder or name, where) for p in source.programs
    )
    target = replace(
        source,
        name=name,
        runtime="pjrt",
        platform="cpu",
        device="any",
        machine=processor_family(),
        jaxlib=jaxlib,
        cpu_features=features,
        xla_flags=isas.xla_flags(isa, os.environ.get("XLA_FLAGS", "")),
        programs=programs,
    )
    files = {
        str(p.executable): isas.declare_features(compilations[p.name].executable, features) for p in programs
    }
    return target, files, compilations


def _stablehlo(program: Program, where: str) -> str:
    if program.stablehlo is None:
        raise PrecastError(
            f"{where}: program {program.name!r} has no StableHLO to compile; export the model again."
        )
    return program.stablehlo


def _compiled_program(program: Program, compilation: Compilation, folder: str, where: str) -> Program:
    arguments, results = compilation.layouts
    for values, layouts in ((program.arguments, arguments), (program.results, results)):
        _check_layouts(values, layouts, f"{where}: program {program.name!r}")
    executable = f"programs/{folder}/{program.name}.xla"
    return replace(program, executable=executable, memory=compilation.memory)


def _check_layouts(values: Sequence[Value], layouts: Sequence[tuple[int, ...]], where: str) -> None:
    """Check that a compiled program has the layouts of the artifact.

    The layouts must be equal, because all targets share the weights, and because a program's KV cache is an argument of
    the next program.

    Raises:
        PrecastError: the numbers of layouts differ, or a layout differs; the message names the first.
    """
    if len(values) != len(layouts):
        raise PrecastError(
            f"{where}: its StableHLO has {len(layouts)} arguments or results, expected {len(values)}; export the"
            " model again."
        )
    for value, layout in zip(values, layouts, strict=True):
        # A program accepts the array with its axes in the order of `value.layout`, and `layout` permutes these axes
        # again.
        found = tuple(value.layout[axis] for axis in layout)
        if found != value.layout:
            raise PrecastError(
                f"{where}: this jaxlib gives {value.name!r} the layout {list(found)}, but the artifact has"
                f" {list(value.layout)}; export the model again with this jaxlib."
            )


# --- the child ----------------------------------------------------------------------------------------------


def main() -> None:
    """Compile the programs that the parent sends."""
    child_process.serve(_answer)


def _answer(request: Mapping[str, Any], stablehlo: bytes, _: Progress) -> child_process.Answer:
    # Import XLA only during a request. If XLA then crashes while it reads XLA_FLAGS, the parent's error names a
    # program.
    from ..runtime import pjrt

    executable = pjrt.client(request["threads"]).compile(stablehlo, (), _HERE)
    facts = {"memory": vars(executable.memory()), "layouts": executable.layouts()}
    return facts, executable.serialize()


if __name__ == "__main__":
    main()
