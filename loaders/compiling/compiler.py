"""StableHLO to executables in a child process, by jaxlib alone: nothing is traced, and jax is not needed.

A process of its own, because XLA takes an instruction set only from XLA_FLAGS and only when it is loaded, and because
a compiler that crashes then ends nothing but the child. Parent and child exchange messages through pipes: a length in
8 bytes, little-endian, then that many bytes. A request is a StableHLO artifact; the answer is JSON, with the
executable behind it where there is one.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import IO

from ..artifact.errors import PrecastError, printable
from ..artifact.manifest import Program, ProgramMemory, Target, Value
from ..artifact.record import from_json
from . import child
from . import isa as isas

_LENGTH_BYTES = 8
_HERE = "child"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program that has been compiled.

    Attributes:
        executable: what `pjrt.Client.load` takes.
        memory: what the compiler says a call needs.
        layouts: of arguments and of results.
        seconds: that compiling took.
    """

    executable: bytes
    memory: ProgramMemory
    layouts: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]
    seconds: float


def compile_programs(
    programs: Iterable[tuple[str, bytes]], where: str, *, isa: str = isas.NATIVE, log: Callable[[str], None]
) -> dict[str, Compiled]:
    """Compile StableHLO programs one after another.

    Args:
        programs: hash-checked StableHLO by program name.
        where: name of their target in messages.
        isa: a key of `isa.LEVELS`, or "native".
        log: called before each program is compiled.

    Raises:
        PrecastError: XLA refuses a program or crashes, or no child can be started.
    """
    flags = isas.xla_flags(isa, os.environ.get("XLA_FLAGS", ""))
    try:
        with child.started(__name__, changes={"XLA_FLAGS": flags}) as compiler:
            return {name: _ask(compiler, name, stablehlo, where, isa, log) for name, stablehlo in programs}
    except child.NotStarted as reason:
        raise PrecastError(f"{where}: no process to compile in can be started ({reason}).") from None


def _ask(
    compiler: child.Child,
    name: str,
    stablehlo: bytes,
    where: str,
    isa: str,
    log: Callable[[str], None],
) -> Compiled:
    suffix = "" if isa == isas.NATIVE else f" for {isa}"
    log(f"compiling {printable(name)} from StableHLO{suffix} …")
    started = time.perf_counter()
    stdin, stdout = compiler.process.stdin, compiler.process.stdout
    assert stdin is not None
    assert stdout is not None
    try:
        _send(stdin, stablehlo)
        answer = json.loads(_receive(stdout))
        if "error" in answer:
            wider = isas.next_level(isa)
            hint = f" It was compiled for {isa}; XLA may manage --cpu-isa {wider}." if wider else ""
            raise PrecastError(f"{where}: program {name!r}: {answer['error']}{hint}")
        executable = _receive(stdout)
    except (EOFError, BrokenPipeError):
        raise PrecastError(_crashed(compiler, name, where)) from None
    return Compiled(
        executable=executable,
        memory=from_json(ProgramMemory, answer["memory"], name),
        layouts=tuple(tuple(map(tuple, values)) for values in answer["layouts"]),  # type: ignore[arg-type]
        seconds=time.perf_counter() - started,
    )


def _crashed(compiler: child.Child, name: str, where: str) -> str:
    reason = child.ending(compiler.process.wait())
    if reason.startswith("exit code"):
        reason = compiler.complaint() or reason
    advice = "; is there enough memory?" if reason == "SIGKILL" else "; export the model again."
    return f"{where}: the process that compiled program {name!r} ended before it was done ({reason}){advice}"


def _send(stream: IO[bytes], data: bytes) -> None:
    stream.write(len(data).to_bytes(_LENGTH_BYTES, "little"))
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    head = stream.read(_LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    data = stream.read(length)
    if len(head) < _LENGTH_BYTES or len(data) < length:
        raise EOFError
    return data


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
) -> tuple[Target, dict[str, bytes], dict[str, Compiled]]:
    """Compile the StableHLO of a target into another target.

    Args:
        source: the target whose StableHLO is compiled.
        contents: its StableHLO files, by name.
        name_of: returns the new target's name, given the CPU features that it needs.
        where: name of the target in messages.
        isa: as for `compile_programs`.
        exact: refuse instructions beyond `isa`. Otherwise the target is for the level that its instructions need.
        jaxlib: version that compiles.
        folder: folder of its executables, below ``programs/``; None for one named after the target.
        log: as for `compile_programs`.

    Returns:
        The target, its executables by their names in the artifact, and the compilation results by program.

    Raises:
        PrecastError: as `compile_programs`; a program has no StableHLO; or the compiler used a wider instruction set
            or other layouts than requested.
    """
    wanted = [(p.name, contents[_stablehlo(p, where)]) for p in source.programs]
    compiled = compile_programs(wanted, where, isa=isa, log=log)
    features = isas.needed_features(
        isa if exact else isas.NATIVE, {name: c.executable for name, c in compiled.items()}, where
    )
    name = name_of(features)
    programs = tuple(_compiled_program(p, compiled[p.name], folder or name, where) for p in source.programs)
    target = replace(
        source,
        name=name,
        runtime="pjrt",
        platform="cpu",
        device="any",
        machine=isas.processor_family(),
        jaxlib=jaxlib,
        cpu_features=features,
        xla_flags=isas.xla_flags(isa, os.environ.get("XLA_FLAGS", "")),
        programs=programs,
    )
    files = {str(p.executable): isas.stating(compiled[p.name].executable, features) for p in programs}
    return target, files, compiled


def _stablehlo(program: Program, where: str) -> str:
    if program.stablehlo is None:
        raise PrecastError(
            f"{where}: program {program.name!r} has no StableHLO to compile; export the model again."
        )
    return program.stablehlo


def _compiled_program(program: Program, compiled: Compiled, folder: str, where: str) -> Program:
    arguments, results = compiled.layouts
    for values, layouts in ((program.arguments, arguments), (program.results, results)):
        _check_layouts(values, layouts, f"{where}: program {program.name!r}")
    executable = f"programs/{folder}/{program.name}.xla"
    return replace(program, executable=executable, memory=compiled.memory)


def _check_layouts(values: Sequence[Value], layouts: Sequence[tuple[int, ...]], where: str) -> None:
    """Weights lie in the artifact once, and caches go from program to program: all targets lay them out alike."""
    if len(values) != len(layouts):
        raise PrecastError(
            f"{where}: its StableHLO has {len(layouts)} arguments or results, expected {len(values)}; export again."
        )
    for value, layout in zip(values, layouts, strict=True):
        # A program takes an array with its axes in the order of `value.layout`, and lays that array out.
        found = tuple(value.layout[axis] for axis in layout)
        if found != value.layout:
            raise PrecastError(
                f"{where}: this jaxlib lays {value.name!r} out as {list(found)}, expected {list(value.layout)} as in"
                " the artifact; export the model again with this jaxlib."
            )


# --- the child ----------------------------------------------------------------------------------------------


def main() -> None:
    """Compiles what comes in until no more comes."""
    answers = child.answers()
    from ..runtime import pjrt

    client = pjrt.client()
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            stablehlo = _receive(sys.stdin.buffer)
            try:
                executable = client.compile(stablehlo, (), _HERE)
                facts = {"memory": vars(executable.memory()), "layouts": executable.layouts()}
                _send(answers, json.dumps(facts).encode())
                _send(answers, executable.serialize())
            except PrecastError as error:
                sentence = " ".join(str(error).split()).removeprefix(f"{_HERE}: ")
                _send(answers, json.dumps({"error": sentence}).encode())


if __name__ == "__main__":
    main()
