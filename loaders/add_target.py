"""What ``precast add-target`` does: compiles another target into an artifact that is there, from its StableHLO.

By jaxlib alone: nothing is traced, and jax is not needed. Weights are not touched, and are not copied: every target
takes the same. That is how an artifact comes to run under another jaxlib, or on an older CPU, than it was exported for.

The order of the steps, so that the artifact is whole, old or new, whenever this process is killed:

1. The folder is locked (``flock``), so that two of these wait for each other. The lock ends with the process.
2. What a killed run left below ``programs/`` is removed: ``.*.partial``, and folders of executables that no target has.
   A signature that it had put aside, and that is the manifest's, is put back.
3. The programs are compiled in a child process and loaded, and give the golden answers.
4. They are written to ``programs/.NAME.*.partial/``, synced, and the folder is renamed to ``programs/NAME/``. The
   manifest does not know them yet, so the artifact is the old one still.
5. A signature of the old manifest is put aside, below ``programs/``: it would not fit the new one. Killed now, the
   artifact is the old one without its signature, until the next of these runs.
6. The new manifest is written beside the old one, synced, and renamed over it. Now the artifact is the new one.
7. With ``--overwrite``, the executables that were replaced are removed.

An export or a pull may exchange the folder meanwhile, lock or not. So before steps 4 and 5 it is looked at again.
"""

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from secrets import token_hex

from . import isa as isas
from . import trial
from .artifact import compat, files, folders
from .artifact.errors import PrecastError
from .artifact.golden import parse_golden
from .artifact.machine import Machine
from .artifact.manifest import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    WEIGHTS_FILE,
    FileEntry,
    Manifest,
    Target,
    parse_manifest,
)
from .artifact.record import MAX_JSON_BYTES, to_json
from .compiling import compile_target
from .load import assemble, find_artifact
from .runtime import pjrt
from .verify import replay

_PROGRAMS, _PARTIAL = "programs", ".partial"


@dataclass(frozen=True, kw_only=True)
class Added:
    """What was done.

    Attributes:
        target: the new one, as it stands in the manifest.
        bytes: of its executables.
        answers: golden answers that it gave.
        replaced: whether a target of the same name was.
        signature_removed: whether the artifact was signed, and is no more.
    """

    target: Target
    bytes: int
    answers: int
    replaced: bool
    signature_removed: bool


def add_target(
    path: Path,
    *,
    isa: str = isas.NATIVE,
    source: str | None = None,
    overwrite: bool = False,
    log: Callable[[str], None],
) -> Added:
    """Adds a target of executables for the CPU, by the jaxlib that is installed.

    Args:
        path: the artifact, or a folder with exactly one in it.
        isa: a key of `isa.ISAS`, or "native" for all that this machine has.
        source: name of the target whose StableHLO is compiled; the quickest that runs here by default.
        overwrite: replace a target of the same name.
        log: told what is done.

    Raises:
        PrecastError: for an artifact that is not whole or cannot be written to, an instruction set that this machine
            lacks, StableHLO that cannot be compiled here, a name that is taken, and programs that do not give the
            golden answers. The artifact is then as it was.
    """
    isas.check_isa(isa)
    root = find_artifact(path)
    with _writing(root), _locked(root, log) as handle:
        held = _Held(root=root, handle=handle, data=files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES))
        manifest = parse_manifest(held.data, str(root / MANIFEST_FILE))
        held.check()
        _remove_leftovers(held, manifest)
        return _add(held, manifest, isa, source, overwrite, log)


def _add(
    held: "_Held",
    manifest: Manifest,
    isa: str,
    source: str | None,
    overwrite: bool,
    log: Callable[[str], None],
) -> Added:
    root, machine = held.root, pjrt.this_machine(cuda=False)
    chosen = _source(manifest, machine, root, source)
    _check_names(chosen, root)
    kind = _kind(chosen)
    if (features := isas.expected_features(isa)) is not None:  # to refuse before anything is compiled
        _free_name(manifest, isas.target_name(kind, features), machine, overwrite, root)
    for (
        name,
        entry,
    ) in manifest.files.items():  # nothing is added to what is damaged; weights are hashed when mapped
        if name != WEIGHTS_FILE:
            files.check_file(root, name, entry, note=False)
    contents = {name: files.read_checked(root, name, manifest.files[name]) for name in _stablehlo(chosen)}
    target, executables, _ = compile_target(
        chosen,
        contents,
        lambda f: _free_name(manifest, isas.target_name(kind, f), machine, overwrite, root),
        f"{root}: target {chosen.name!r}",
        isa=isa,
        jaxlib=machine.jaxlib,
        log=log,
    )
    target, executables = _in_free_folder(target, executables, manifest)
    changed = _with_target(manifest, target, executables)
    log("checking its answers against the recorded ones")
    answers = _replay(root, changed, target, executables)
    folder = _write_programs(held, target, executables)
    try:
        signed = _replace_manifest(held, changed)
    except Exception:
        if held.is_there():  # otherwise what has this name may be another's
            _discard(folder)
        raise
    _remove_unlisted_of(root, manifest, changed)
    trial.remember(changed, target, machine)
    return Added(
        target=target,
        bytes=sum(map(len, executables.values())),
        answers=answers,
        replaced=target.name in {t.name for t in manifest.targets},
        signature_removed=signed,
    )


# --- what to compile, and what to call it -------------------------------------------------------------------


def _source(manifest: Manifest, machine: Machine, root: Path, name: str | None) -> Target:
    """The target to compile, by the loader's own rule for what it compiles on request."""
    compilable = [
        t
        for t in manifest.targets
        if t.platform in ("cpu", "any") and None not in {p.stablehlo for p in t.programs}
    ]
    known = ", ".join(repr(t.name) for t in compilable)
    if name is not None and name not in {t.name for t in compilable}:
        raise PrecastError(
            f"{root}: target {name!r} is not in the artifact, or holds no StableHLO for a CPU; those that do are"
            f" {known or 'none'}."
        )
    if not compilable:
        raise PrecastError(f"{root}: no target holds StableHLO for a CPU; export the model again.")
    # With the executables out of the way: it is the StableHLO that must suit the machine.
    bare = tuple(
        replace(t, runtime="stablehlo", machine="any", jaxlib="any", cpu_features=()) for t in compilable
    )
    chosen = compat.choose_target(
        replace(manifest, targets=bare), machine, str(root), name=name, may_compile=True
    )
    return next(t for t in compilable if t.name == chosen.name)


def _check_names(source: Target, root: Path) -> None:
    """Executables are named after their programs.

    Raises:
        PrecastError: for a program whose name is not one of a file.
    """
    for program in source.programs:
        if len(files.parts_of(root, program.name)) != 1:
            raise PrecastError(
                f"{root}: target {source.name!r} has a program {program.name!r}, expected names without '/'; export the"
                " model again."
            )


def _kind(source: Target) -> str:
    """Targets whose programs call precast's kernels are called cpu-…, those of pure XLA portable-…"""
    return "cpu" if source.kernels else "portable"


def _stablehlo(target: Target) -> list[str]:
    return sorted({p.stablehlo for p in target.programs if p.stablehlo is not None})


def _free_name(manifest: Manifest, name: str, machine: Machine, overwrite: bool, root: Path) -> str:
    """`name`, or where another jaxlib's target has that, the same with this jaxlib's version.

    Raises:
        PrecastError: when this jaxlib's target is there, unless it may be replaced.
    """
    taken = {t.name: t for t in manifest.targets}
    if name in taken and taken[name].jaxlib != machine.jaxlib:
        name = f"{name}-jaxlib{machine.jaxlib}"
    if name in taken and not overwrite:
        raise PrecastError(
            f"{root}: target {name!r} is there already; replace it with --overwrite, or run it with --target {name}."
        )
    return name


def _in_free_folder(
    target: Target, executables: Mapping[str, bytes], manifest: Manifest
) -> tuple[Target, dict[str, bytes]]:
    """The target with its executables in a folder that the artifact as it is has no file in."""
    used = {PurePosixPath(name).parts[1] for name in manifest.files if name.startswith(f"{_PROGRAMS}/")}
    folder = target.name if target.name not in used else f"{target.name}.2"
    if folder in used:  # it is the other one's turn again
        raise PrecastError(f"target {target.name!r}: both folders for it are in use; export the model again.")

    def moved(name: str) -> str:
        return f"{_PROGRAMS}/{folder}/{PurePosixPath(name).name}"

    programs = tuple(replace(p, executable=moved(str(p.executable))) for p in target.programs)
    return replace(target, programs=programs), {moved(name): data for name, data in executables.items()}


def _with_target(manifest: Manifest, target: Target, executables: Mapping[str, bytes]) -> Manifest:
    """The manifest with the target in the place of the one of its name, or behind the others."""
    targets = [target if t.name == target.name else t for t in manifest.targets]
    if target.name not in {t.name for t in manifest.targets}:
        targets.append(target)
    used = {name for t in targets for p in t.programs for name in (p.executable, p.stablehlo)}
    replaced = next((t for t in manifest.targets if t.name == target.name), None)
    dropped = {p.executable for p in replaced.programs} - used if replaced is not None else set()
    entries = {name: entry for name, entry in manifest.files.items() if name not in dropped}
    for name, data in executables.items():
        entries[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return replace(manifest, targets=tuple(targets), files=dict(sorted(entries.items())))


def _replay(root: Path, manifest: Manifest, target: Target, executables: Mapping[str, bytes]) -> int:
    """Lets the target give the golden answers; how many there are.

    Raises:
        PrecastError: when an answer differs.
    """
    recorded = parse_golden(
        files.read_checked(root, manifest.golden, manifest.files[manifest.golden]), manifest, manifest.golden
    )
    model = assemble(root, manifest, target, executables)
    found = replay(model, recorded, f"{root}: target {target.name!r}", lambda *_: None)
    if found.problems:
        raise PrecastError(f"{found.problems[0].rstrip('.')}; the artifact is as it was.")
    return found.answers


# --- files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Held:
    """The artifact that is locked.

    Attributes:
        root: its folder's name, which another folder may come to have.
        handle: of the folder.
        data: the manifest, as it was when it was locked.
    """

    root: Path
    handle: int
    data: bytes

    def is_there(self) -> bool:
        """Whether `root` is still the folder that is locked."""
        try:
            return os.path.samestat(self.root.stat(), os.fstat(self.handle))
        except OSError:
            return False

    def check(self) -> None:
        """Raises:
        PrecastError: when `root` is another artifact now, or programs/ is no folder of it.
        """
        try:
            same = self.is_there() and self.data == files.read(self.root, MANIFEST_FILE, limit=len(self.data))
        except PrecastError:
            same = False
        if not same:
            raise PrecastError(
                f"{self.root}: was replaced while its target was compiled; run precast add-target again."
            )
        with suppress(FileNotFoundError):  # it is made where it is missing
            mode = (self.root / _PROGRAMS).lstat().st_mode
            if not stat.S_ISDIR(mode):
                what = "link" if stat.S_ISLNK(mode) else "file"
                raise PrecastError(
                    f"{self.root}: {_PROGRAMS!r} is a {what}, expected a folder; copy or export the artifact again."
                )


@contextmanager
def _locked(root: Path, log: Callable[[str], None]) -> Iterator[int]:
    """Keeps others that add targets out of the artifact; waits for one that is at it. Gives the folder's descriptor."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"{root}: waiting for another precast add-target, which is at work there")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PrecastError(
            f"{root}: the target cannot be added ({error.strerror or error}); the artifact must be on a disk with room"
            " and in a folder that you may write to: copy it there."
        ) from error


def _remove_leftovers(held: _Held, manifest: Manifest) -> None:
    """What runs that were killed have left below programs/, and nothing that could be anything else."""
    used = {PurePosixPath(name).parts[:2] for name in manifest.files}
    if not (held.root / _PROGRAMS).exists():
        return
    for folder in sorted((held.root / _PROGRAMS).iterdir()):
        if folder.is_symlink() or not folder.is_dir() or (_PROGRAMS, folder.name) in used:
            continue
        is_partial = folder.name.startswith(".") and folder.name.endswith(_PARTIAL)
        if is_partial:
            _put_signature_back(held, folder / SIGNATURE_FILE)
        if is_partial or all(file.suffix == ".xla" and file.is_file() for file in folder.iterdir()):
            shutil.rmtree(folder)


def _put_signature_back(held: _Held, kept: Path) -> None:
    """Where a run was killed between putting the signature aside and replacing the manifest that it is of."""
    from .signing import MAX_SIGNATURE_BYTES, signed_digest

    signature = held.root / SIGNATURE_FILE
    if os.path.lexists(signature) or kept.is_symlink() or not kept.is_file():
        return
    with suppress(PrecastError):
        data = files.read(kept.parent, kept.name, limit=MAX_SIGNATURE_BYTES)
        if signed_digest(data, str(kept.parent)) == hashlib.sha256(held.data).hexdigest():
            kept.rename(signature)


def _write_programs(held: _Held, target: Target, executables: Mapping[str, bytes]) -> Path:
    """Writes a folder of executables that is there whole or not at all, and returns it."""
    final = held.root / PurePosixPath(next(iter(executables))).parent
    partial = final.parent / f".{target.name}.{token_hex(6)}{_PARTIAL}"
    held.check()
    try:
        if not final.parent.exists():
            final.parent.mkdir()
        # Not mkdtemp: what becomes part of the artifact has the permissions that the user's other files have.
        partial.mkdir()
        for name, data in executables.items():
            _write_synced(partial / PurePosixPath(name).name, data)
        folders.sync(partial)
        partial.rename(final)
    except BaseException:
        _discard(partial)
        raise
    return final


def _discard(folder: Path) -> None:
    """Removes a folder below programs/, and that too where nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def _replace_manifest(held: _Held, manifest: Manifest) -> bool:
    """Puts a manifest in the place of the old one; whether the old one was signed. Fails before it or not at all."""
    root, data = held.root, to_json(manifest).encode()
    # What would be refused at the next load must not be written.
    parse_manifest(data, str(root / MANIFEST_FILE))
    folders.sync(root / _PROGRAMS)
    temporary = root / _PROGRAMS / f".manifest.{token_hex(6)}{_PARTIAL}"
    temporary.mkdir()
    signature = root / SIGNATURE_FILE
    signed, aside = signature.exists(), temporary / SIGNATURE_FILE
    try:
        _write_synced(temporary / MANIFEST_FILE, data)
        held.check()
        try:
            if signed:
                signature.rename(aside)
            (temporary / MANIFEST_FILE).replace(root / MANIFEST_FILE)
        except BaseException:
            if aside.exists() and (temporary / MANIFEST_FILE).exists():
                aside.rename(signature)
            raise
        # The new one is there, whole: without this only a power cut could still bring the old one back.
        with suppress(OSError):
            folders.sync(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return signed


def _remove_unlisted_of(root: Path, old: Manifest, new: Manifest) -> None:
    """Removes the executables that were replaced. Those that cannot be removed are in nobody's way."""
    with suppress(OSError, PrecastError):
        for name in sorted(set(old.files) - set(new.files)):
            path = files.member(root, name)
            path.unlink()
            with suppress(OSError):
                path.parent.rmdir()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def summary(added: Added, path: Path) -> Sequence[str]:
    """What a person is told."""
    target = added.target
    done = "replaced" if added.replaced else "added"
    facts = f"{len(target.programs)} programs, {added.bytes:,} bytes, jaxlib {target.jaxlib}"
    lines = [f"{path}: target {target.name} {done}: {facts}, {added.answers} answers as recorded"]
    if target.cpu_features:
        lines.append(f"  needs {' '.join(target.cpu_features)}")
    if added.signature_removed:
        lines.append(
            f"  {SIGNATURE_FILE} was removed: it was for the manifest as it was; sign the artifact again"
        )
    lines.append(f"  run it with: precast run {path} --target {target.name}")
    return lines
