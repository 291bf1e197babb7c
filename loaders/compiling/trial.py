"""The first load on a machine, tried in a child process, so that a crash becomes a sentence.

An executable that does not suit its machine does not raise an error, it ends the process: by SIGILL on another CPU,
by SIGSEGV under another jaxlib. What a manifest says is compared before, but a manifest may be wrong. So the first
time that a target of an artifact is loaded on a machine, a child process loads it and takes a few steps; when it
survives, that is noted in the cache folder, and later loads only look for the note. This is no protection against an
artifact that means harm: programs are native code, and signatures are there for that.
"""

import hashlib
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.errors import PrecastError
from ..artifact.files import make_private, remove_old, trusted_cache, unwritable_reason, write_atomically
from ..artifact.machine import Machine
from ..artifact.manifest import WEIGHTS_FILE, Manifest, Target

if TYPE_CHECKING:
    from .child import Child

# What a child may take: to start, to read weights from a slow disk, and to compile, where it has to.
START_S, WEIGHT_BYTES_PER_S, COMPILE_S = 120, 20e6, 900
# Whatever size a manifest says.
_LONGEST_S = 24 * 3600
# The module that the child process runs. A name, for it builds on `load`, which builds on this file.
WORKER = "precast.loaders.trial_worker"
# Exit codes of the child: a sentence stands in its last line.
REFUSED = 3
# Where notes are, in the cache folder.
_FOLDER = "tried"
MARK, SENTENCE = "at: ", "error: "


def ensure(
    root: Path,
    manifest: Manifest,
    target: Target,
    machine: Machine,
    *,
    compile: bool,
    threads: int,
    log: Callable[[str], None],
) -> None:
    """Tries a target in a child process, unless it was tried on this machine before.

    Where nothing can be noted, because the cache folder cannot be written to or there is none, it is tried at every
    load, and said.
    Where no child process can be started it is not tried, and said.

    Args:
        root: the artifact, whose files have been checked.
        manifest: of it.
        target: the one chosen.
        machine: this one.
        compile: whether it is compiled first.
        threads: that compute; a limit of the system may leave no room for more.
        log: where messages go.

    Raises:
        PrecastError: when the child crashes or hangs, naming program and signal, or when it refuses the artifact.
    """
    if _is_noted(manifest, target, machine):
        return
    started = time.perf_counter()
    if not _attempt(root, target, _limit_s(manifest, compile), compile, threads, log):
        return
    if not remember(manifest, target, machine):
        log(
            f"{root}: tried in a process of its own first ({time.perf_counter() - started:.1f} s), as it will be at"
            f" every start: {unwritable_reason(_FOLDER)}."
        )


def _is_noted(manifest: Manifest, target: Target, machine: Machine) -> bool:
    with suppress(OSError, PrecastError):
        return _record(manifest, target, machine).exists()
    return False


def remember(manifest: Manifest, target: Target, machine: Machine) -> bool:
    """Notes that a target runs on this machine. False where the note cannot be written."""
    with suppress(OSError, PrecastError):
        record = _record(manifest, target, machine)
        make_private(record.parent)
        remove_old(record.parent)
        write_atomically(record, b"")
        return True
    return False


def _record(manifest: Manifest, target: Target, machine: Machine) -> Path:
    """Return the record's path, derived from all that affects the trial: programs, signatures, weights, cache, machine.

    Raises:
        PrecastError: there is no cache folder, or others may write to it.
    """
    if target.platform != "cuda":  # then nobody asks for GPUs
        machine = replace(machine, gpus=(), cuda_plugin="")
    programs = {file for p in target.programs if (file := target.file_of(p))}
    # Also what lies beside them: the variables of a SavedModel.
    folders = {f"{folder}/" for file in programs if (folder := file.rpartition("/")[0])}
    used = {WEIGHTS_FILE, *programs, *_below(folders, manifest.files)}
    digests = [(name, manifest.files[name].sha256) for name in sorted(used)]
    said = (digests, target, manifest.cache, manifest.context, manifest.slots, manifest.buckets, machine)
    return trusted_cache(_FOLDER) / hashlib.sha256(repr(said).encode()).hexdigest()


def _below(folders: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    """Yield the names below one of the folders, in less than names times folders steps."""
    tops: list[str] = []
    for folder in sorted(folders):
        if not tops or not folder.startswith(tops[-1]):
            tops.append(folder)
    for name in names:
        # Of folders that do not nest, only the last that sorts before a name can contain it.
        place = bisect_right(tops, name)
        if place and name.startswith(tops[place - 1]):
            yield name


def _limit_s(manifest: Manifest, compile: bool) -> int:
    seconds = START_S + manifest.files[WEIGHTS_FILE].bytes / WEIGHT_BYTES_PER_S + COMPILE_S * compile
    return int(min(seconds, _LONGEST_S))


def _attempt(
    root: Path, target: Target, limit_s: int, compile: bool, threads: int, log: Callable[[str], None]
) -> bool:
    """Runs the child. False where there is none to run.

    Raises:
        PrecastError: as `ensure`.
    """
    from . import child

    options = ["--compile"] if compile else []
    try:
        with child.started(WORKER, str(root), target.name, str(limit_s), str(threads), *options) as running:
            _await_end(running, root, target, limit_s)
    except child.NotStarted as reason:
        log(f"{root}: not tried in a process of its own first, because none can be started ({reason}).")
        return False
    return True


def _await_end(running: "Child", root: Path, target: Target, limit_s: int) -> None:
    """Wait for the child to finish.

    Raises:
        PrecastError: as `ensure`.
    """
    import subprocess

    try:
        said, _ = running.process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        where = _last(error.stdout or b"", MARK)
        raise PrecastError(_hung(root, target, where, limit_s)) from None
    if code := running.process.returncode:
        raise PrecastError(_failed(root, target, code, said, running.complaint(), limit_s))


def _last(output: bytes, prefix: str) -> str | None:
    """The last line that begins so, without its beginning."""
    lines = output.decode(errors="replace").splitlines()
    return next((line.removeprefix(prefix) for line in reversed(lines) if line.startswith(prefix)), None)


def _hung(root: Path, target: Target, where: str | None, limit_s: int) -> str:
    return (
        f"{root}: target {target.name!r} was tried in a process of its own, which had not finished"
        f" {where or 'starting'} after {limit_s} s; {_advice()}"
    )


def _failed(root: Path, target: Target, code: int, stdout: bytes, complaint: str, limit_s: int) -> str:
    import signal

    from . import child

    if code == REFUSED and (sentence := _last(stdout, SENTENCE)) is not None:
        return sentence
    where = _last(stdout, MARK) or "starting"
    if code == -getattr(signal, "SIGALRM", 0):
        return _hung(root, target, where, limit_s)
    begin = f"{root}: target {target.name!r} was tried in a process of its own, which"
    name = child.ending(code)
    if code >= 0:
        return f"{begin} failed while {where} ({complaint or name}); {_advice()}"
    if name == "SIGKILL":
        return (
            f"{begin} was killed while {where}, as the system does when memory runs out; precast check {root} tells"
            " what it needs."
        )
    return f"{begin} crashed while {where} ({name}); {_advice()}"


def _advice() -> str:
    return "its programs do not suit this machine: compile them here with --compile, or export again."
