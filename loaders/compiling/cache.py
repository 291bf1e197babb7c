"""What ``run --compile`` has compiled is kept in the cache folder, for the next time.

An entry is the sha256 of an executable and then the executable, in a file named after all that decides what a
compiler makes: the StableHLO, jaxlib, the kernels' ABI, the CPU, XLA_FLAGS. An entry that is not what it says is as
good as none. Those older than half a year are removed when another is written.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..artifact.errors import PrecastError, printable
from ..artifact.files import make_private, remove_old, trusted_cache, unwritable_reason, write_atomically
from ..artifact.machine import Machine
from .compiler import compile_programs

# Part of every name: what changes here makes older entries unknown.
_FORM = "1"
_DIGEST_BYTES = 32
# Where entries are, in the cache folder.
_FOLDER = "compiled"


@dataclass(frozen=True, kw_only=True)
class Made:
    """An executable for this machine.

    Attributes:
        executable: what `pjrt.Client.load` takes.
        now: whether it was compiled now.
        again: compiles it now, where it was not and XLA does not take it.
    """

    executable: bytes
    now: bool
    again: "Callable[[], Made]"


def executables(
    programs: Sequence[tuple[str, bytes]], machine: Machine, where: str, log: Callable[[str], None]
) -> dict[str, Made]:
    """Executables for this machine, compiled in a child process where they are not there yet.

    Where the cache folder cannot be written to or there is none, they are compiled every time, and the log says so.

    Args:
        programs: names, and StableHLO artifacts whose hashes have been checked.
        machine: this one.
        where: what messages call the target.
        log: told of each compilation, and of what was compiled before.

    Returns:
        Executables by program.

    Raises:
        PrecastError: as `compile_programs`.
    """
    known = {name: data for name, code in programs if (data := _read(code, machine)) is not None}
    if known:
        count = "all" if len(known) == len(programs) else f"{len(known)} of {len(programs)}"
        log(f"{where}: {count} programs were compiled here before, and are taken from {_folder()}")
    missing = [(name, stablehlo) for name, stablehlo in programs if name not in known]
    made = {name: _made_now(data) for name, data in _compile(missing, machine, where, log).items()}
    for name, stablehlo in programs:
        if name in known:
            again = partial(_again, name, stablehlo, machine, where, log)
            made[name] = Made(executable=known[name], now=False, again=again)
    return made


def _made_now(executable: bytes) -> Made:
    return Made(executable=executable, now=True, again=lambda: _made_now(executable))


def _again(name: str, stablehlo: bytes, machine: Machine, where: str, log: Callable[[str], None]) -> Made:
    log(f"{where}: what was compiled of {printable(name)} before cannot be used")
    return _made_now(_compile([(name, stablehlo)], machine, where, log)[name])


def _compile(
    programs: Sequence[tuple[str, bytes]], machine: Machine, where: str, log: Callable[[str], None]
) -> dict[str, bytes]:
    """Compiles programs and keeps what comes out."""
    if not programs:
        return {}
    compiled = compile_programs(programs, where, log=log)
    kept = [_write(code, machine, compiled[name].executable) for name, code in programs]
    if not all(kept):
        log(f"{where}: will be compiled again at the next start, because {unwritable_reason(_FOLDER)}.")
    return {name: c.executable for name, c in compiled.items()}


def _folder() -> Path:
    return trusted_cache(_FOLDER)


def _entry(stablehlo: bytes, machine: Machine) -> Path:
    compiler = (machine.jaxlib, machine.kernel_abi, machine.machine, machine.features)
    said = (_FORM, hashlib.sha256(stablehlo).hexdigest(), compiler, os.environ.get("XLA_FLAGS", ""))
    return _folder() / hashlib.sha256(repr(said).encode()).hexdigest()


def _read(stablehlo: bytes, machine: Machine) -> bytes | None:
    try:
        data = _entry(stablehlo, machine).read_bytes()
    except (OSError, PrecastError):
        return None
    digest, executable = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return executable if hashlib.sha256(executable).digest() == digest else None


def _write(stablehlo: bytes, machine: Machine, executable: bytes) -> bool:
    with suppress(OSError, PrecastError):
        entry = _entry(stablehlo, machine)
        make_private(entry.parent)
        remove_old(entry.parent)
        write_atomically(entry, hashlib.sha256(executable).digest() + executable)
        return True
    return False
