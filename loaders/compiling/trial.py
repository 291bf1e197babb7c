"""Try a target in a child process before its first load on a machine, so that a crash becomes an error message.

An executable that does not suit its machine does not raise an error but ends the process: with SIGILL on another CPU,
or with SIGSEGV under another jaxlib. The loader compares the manifest with the machine, but a manifest may be wrong. So
before the first load of a target on a machine, a child process loads the target and runs a few steps. If the child
succeeds, the success is recorded in the cache folder, and later loads skip the trial. A trial does not protect against
malicious artifacts, because the child runs their native code. Require a signature to protect against them.
"""

import hashlib
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.cache_folder import make_private, remove_old, trusted_cache, unwritable_reason
from ..artifact.errors import PrecastError
from ..artifact.files import write_atomically
from ..artifact.machine import Machine
from ..artifact.manifest import WEIGHTS_FILE, Manifest, Target

if TYPE_CHECKING:
    from .child_process import Crash

# Parts of a trial's time limit: seconds to start, bytes per second that a slow disk reads, and seconds to compile.
START_S, WEIGHT_BYTES_PER_S, COMPILE_S = 120, 20e6, 900
# The maximum time limit in seconds. An untrusted manifest may state any size for the weights.
_LONGEST_S = 24 * 3600
# The name of the child's module. Importing the module here would be circular, because it imports `load`, which imports
# this module.
WORKER = "precast.loaders.trial_worker"
# The name of the records' folder in the cache folder.
_FOLDER = "tried"


def ensure(
    root: Path,
    manifest: Manifest,
    target: Target,
    machine: Machine,
    *,
    allow_compile: bool,
    threads: int | None,
    log: Callable[[str], None],
) -> None:
    """Try a target in a child process if no earlier trial on this machine has succeeded.

    If the cache folder cannot be written to, every load tries the target and logs the reason. If no child process can
    be started, the target is not tried, and the reason is logged.

    Args:
        root: the artifact's folder, whose files have been checked.
        manifest: the artifact's manifest.
        target: the target.
        machine: this machine.
        allow_compile: allow the child to compile the target.
        threads: number of the child's computing threads; None for the default.
        log: receives messages.

    Raises:
        PrecastError: the child crashes or hangs (the message names the step), or refuses the artifact.
    """
    if _is_recorded(manifest, target, machine):
        return
    started = time.perf_counter()
    limit_s = _limit_s(manifest, allow_compile)
    if not _attempt(root, target, limit_s=limit_s, allow_compile=allow_compile, threads=threads, log=log):
        return
    if not record_success(manifest, target, machine):
        log(
            f"{root}: was tried in a child process first ({time.perf_counter() - started:.1f} s), and will be tried at"
            f" every start, because {unwritable_reason(_FOLDER)}."
        )


def _is_recorded(manifest: Manifest, target: Target, machine: Machine) -> bool:
    with suppress(OSError, PrecastError):
        return _record(manifest, target, machine).exists()
    return False


def record_success(manifest: Manifest, target: Target, machine: Machine) -> bool:
    """Record that a target runs on this machine. Return False if the record cannot be written."""
    with suppress(OSError, PrecastError):
        record = _record(manifest, target, machine)
        make_private(record.parent)
        remove_old(record.parent)
        write_atomically(record, b"")
        return True
    return False


def _record(manifest: Manifest, target: Target, machine: Machine) -> Path:
    """Return the path of the record of a trial.

    The record's name is a hash of everything that affects the trial: programs and their signatures, weights, KV cache,
    and machine.

    Raises:
        PrecastError: there is no cache folder, or others may write to it.
    """
    # Targets for other platforms do not depend on GPUs, and `machine` does not always list the GPUs.
    if target.platform != "cuda":
        machine = replace(machine, gpus=(), cuda_plugin="")
    programs = {file for p in target.programs if (file := target.file_of(p))}
    # A SavedModel's variables lie beside its program.
    folders = {f"{folder}/" for file in programs if (folder := file.rpartition("/")[0])}
    used = {WEIGHTS_FILE, *programs, *_below(folders, manifest.files)}
    digests = [(name, manifest.files[name].sha256) for name in sorted(used)]
    key = (digests, target, manifest.cache, manifest.context, manifest.slots, manifest.buckets, machine)
    return trusted_cache(_FOLDER) / hashlib.sha256(repr(key).encode()).hexdigest()


def _below(folders: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    """Yield the names that are below any of the folders, using one binary search for each name."""
    tops: list[str] = []
    for folder in sorted(folders):
        if not tops or not folder.startswith(tops[-1]):
            tops.append(folder)
    for name in names:
        # `tops` contains no nested folders. So of these, only the last one that sorts before a name can contain the
        # name.
        place = bisect_right(tops, name)
        if place and name.startswith(tops[place - 1]):
            yield name


def _limit_s(manifest: Manifest, allow_compile: bool) -> int:
    """Return the time limit of a trial, in seconds."""
    seconds = START_S + manifest.files[WEIGHTS_FILE].bytes / WEIGHT_BYTES_PER_S + COMPILE_S * allow_compile
    return int(min(seconds, _LONGEST_S))


def _attempt(
    root: Path,
    target: Target,
    *,
    limit_s: int,
    allow_compile: bool,
    threads: int | None,
    log: Callable[[str], None],
) -> bool:
    """Run the child process; return False if no child process can be started.

    Raises:
        PrecastError: see `ensure`.
    """
    from . import child_process

    request = {
        "root": str(root),
        "target": target.name,
        "allow_compile": allow_compile,
        "threads": threads,
    }
    steps = ["starting"]
    try:
        with child_process.started(WORKER) as running:
            running.ask(request, limit_s=limit_s, progress=lambda step: steps.append(step.text))
    except child_process.StartError as reason:
        log(f"{root}: was not tried in a child process first, because no child can be started ({reason}).")
        return False
    except child_process.Refusal as sentence:
        raise PrecastError(str(sentence)) from None
    except TimeoutError:
        raise PrecastError(_timeout_text(root, target, steps[-1], limit_s)) from None
    except child_process.Crash as crash:
        raise PrecastError(_crash_text(root, target, crash, steps[-1], limit_s)) from None
    return True


def _timeout_text(root: Path, target: Target, step: str, limit_s: int) -> str:
    return (
        f"{root}: target {target.name!r} was tried in a child process, which had not finished {step} after"
        f" {limit_s} s; {_advice()}"
    )


def _crash_text(root: Path, target: Target, crash: "Crash", step: str, limit_s: int) -> str:
    import signal

    if crash.code == -getattr(signal, "SIGALRM", 0):
        return _timeout_text(root, target, step, limit_s)
    begin = f"{root}: target {target.name!r} was tried in a child process, which"
    if crash.code >= 0:
        return f"{begin} failed while {step} ({crash.reason}); {_advice()}"
    if crash.code == -signal.SIGKILL:
        return (
            f"{begin} was killed while {step}, probably because memory ran out; run precast check {root} to see how"
            " much memory it needs."
        )
    return f"{begin} crashed while {step} ({crash.reason}); {_advice()}"


def _advice() -> str:
    return "its programs do not suit this machine: compile them here with --compile, or export again."
