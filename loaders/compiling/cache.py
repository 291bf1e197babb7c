"""Executables that ``run --compile`` compiles, stored in the cache folder for later runs.

An entry is a file that contains an executable's sha256 and the executable. The file's name is a hash of everything that
affects the compiler's output: StableHLO, jaxlib, the kernels' ABI, the CPU, the number of threads, and XLA_FLAGS. An
entry whose hash is wrong is ignored. Writing an entry removes entries older than half a year.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..artifact.cache_folder import make_private, remove_old, trusted_cache, unwritable_reason
from ..artifact.errors import PrecastError, printable
from ..artifact.files import write_atomically
from ..artifact.frozen import Frozen
from ..artifact.machine import Machine
from .compiler import compile_programs

# The version of the entries' format. Every file name depends on it, so entries of another version are never found.
_FORM = "1"
_DIGEST_BYTES = 32
# The name of the entries' folder in the cache folder.
_FOLDER = "compiled"


class LocalExecutable(Frozen):
    """An executable for this machine.

    Attributes:
        executable: the serialised executable, for `pjrt.Client.load`.
        is_new: True if it was compiled just now, False if it comes from the cache.
        recompile: a function that compiles the program again. Call it if XLA refuses the cached executable.
    """

    executable: bytes
    is_new: bool
    recompile: "Callable[[], LocalExecutable]"


def executables(
    programs: Sequence[tuple[str, bytes]],
    machine: Machine,
    where: str,
    *,
    threads: int,
    log: Callable[[str], None],
) -> dict[str, LocalExecutable]:
    """Return executables for this machine: from the cache where possible, otherwise compiled in a child process.

    If the cache folder cannot be written to, all programs are compiled every time, and the log says so.

    Args:
        programs: pairs of a name and a hash-checked StableHLO artifact.
        machine: this machine.
        where: name of the target in messages.
        threads: number of computing threads.
        log: receives a message for each compilation, and a message if the cache is used.

    Returns:
        Executables by program name.

    Raises:
        PrecastError: see `compile_programs`.
    """
    compiler = _CachingCompiler(machine=machine, where=where, threads=threads, log=log)
    cached = {name: entry for name, code in programs if (entry := compiler.cached(name, code)) is not None}
    if cached:
        count = "all" if len(cached) == len(programs) else f"{len(cached)} of {len(programs)}"
        log(
            f"{where}: {count} programs were compiled here before, and are taken from {trusted_cache(_FOLDER)}"
        )
    return cached | compiler.compile([(name, code) for name, code in programs if name not in cached])


class _CachingCompiler(Frozen):
    """A compiler that stores its output in the cache folder, and finds earlier output there."""

    machine: Machine
    where: str
    threads: int
    log: Callable[[str], None]

    def compile(self, programs: Sequence[tuple[str, bytes]]) -> dict[str, LocalExecutable]:
        """Compile programs and store the executables."""
        if not programs:
            return {}
        compiled = compile_programs(programs, self.where, threads=self.threads, log=self.log)
        stored = [self._write(stablehlo, compiled[name].executable) for name, stablehlo in programs]
        if not all(stored):
            self.log(
                f"{self.where}: will be compiled again at the next start, because {unwritable_reason(_FOLDER)}."
            )
        return {
            name: LocalExecutable(
                executable=compiled[name].executable,
                is_new=True,
                recompile=partial(self._recompile, name, stablehlo),
            )
            for name, stablehlo in programs
        }

    def cached(self, name: str, stablehlo: bytes) -> LocalExecutable | None:
        """Return a program's executable from the cache folder; None if it is missing or damaged."""
        try:
            data = self._entry(stablehlo).read_bytes()
        except (OSError, PrecastError):
            return None
        digest, executable = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(executable).digest() != digest:
            return None
        recompile = partial(self._recompile, name, stablehlo)
        return LocalExecutable(executable=executable, is_new=False, recompile=recompile)

    def _recompile(self, name: str, stablehlo: bytes) -> LocalExecutable:
        self.log(f"{self.where}: XLA refuses the cached executable of {printable(name)}")
        return self.compile([(name, stablehlo)])[name]

    def _write(self, stablehlo: bytes, executable: bytes) -> bool:
        with suppress(OSError, PrecastError):
            entry = self._entry(stablehlo)
            make_private(entry.parent)
            remove_old(entry.parent)
            write_atomically(entry, hashlib.sha256(executable).digest() + executable)
            return True
        return False

    def _entry(self, stablehlo: bytes) -> Path:
        """Return the path of a program's entry.

        Raises:
            PrecastError: there is no cache folder, or others may write to it.
        """
        machine = self.machine
        compiler = (machine.jaxlib, machine.kernel_abi, machine.machine, machine.features, self.threads)
        flags = os.environ.get("XLA_FLAGS", "")
        key = (_FORM, hashlib.sha256(stablehlo).hexdigest(), compiler, flags)
        return trusted_cache(_FOLDER) / hashlib.sha256(repr(key).encode()).hexdigest()
