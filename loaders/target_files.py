"""Add a target to an existing artifact so that the artifact stays whole if this process is killed at any moment.

1. The folder is locked (``flock``), so that two processes wait for each other. The lock ends with the process.
2. Remains of killed processes are settled, as in step 7.
3. ``programs/.add-target.precast-*.partial/`` is made, with a mark, the old manifest and the new one.
4. The executables are written there, synced, and their folder is renamed to ``programs/NAME/``. The artifact's manifest
   does not know them yet, so the artifact is the old one still.
5. A signature of the old manifest is put aside there: it would not fit the new one. Killed now, the artifact is the old
   one without its signature, until step 2 of the next process.
6. The new manifest is renamed over the old one. Now the artifact is the new one.
7. Settling: the signature is put back if it fits the artifact's manifest; files are removed that one of the two
   manifests lists and the artifact's does not, as long as they are what was listed; then the folder is removed.

Nothing else below ``programs/`` is ever removed. An export or a pull may exchange the artifact's folder meanwhile, lock
or not, so it is looked at again before steps 3, 4 and 5.
"""

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from .artifact import files, folders
from .artifact.errors import PrecastError
from .artifact.interrupt import on_interrupt
from .artifact.manifest import MANIFEST_FILE, SIGNATURE_FILE, Manifest
from .artifact.manifest_parser import parse_manifest
from .artifact.record import MAX_JSON_BYTES, to_json

PROGRAMS = "programs"
_PURPOSE, _OLD, _EXECUTABLES = "add-target", "old.json", "executables"


@dataclass(frozen=True, kw_only=True)
class Held:
    """The locked artifact.

    Attributes:
        root: the folder's path, which another folder may take over.
        handle: the folder's descriptor.
        data: the manifest at the time of locking.
    """

    root: Path
    handle: int
    data: bytes

    def is_there(self) -> bool:
        """Return True if `root` is still the locked folder."""
        try:
            return os.path.samestat(self.root.stat(), os.fstat(self.handle))
        except OSError:
            return False

    def check(self) -> None:
        """Refuse an artifact that was exchanged.

        Raises:
            PrecastError: `root` is now another artifact, or its programs/ is not a folder.
        """
        try:
            same = self.is_there() and self.data == files.read(self.root, MANIFEST_FILE, limit=len(self.data))
        except PrecastError:
            same = False
        if not same:
            raise PrecastError(
                f"{self.root}: was replaced while its target was compiled; run precast add-target again."
            )
        with suppress(FileNotFoundError):  # a missing one is created
            mode = (self.root / PROGRAMS).lstat().st_mode
            if not stat.S_ISDIR(mode):
                what = "link" if stat.S_ISLNK(mode) else "file"
                raise PrecastError(
                    f"{self.root}: {PROGRAMS!r} is a {what}, expected a folder; copy or export the artifact again."
                )


@contextmanager
def locked(root: Path, log: Callable[[str], None]) -> Iterator[int]:
    """Lock the artifact against other processes that add targets, and wait for a running one. Yield the descriptor."""
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
def writing(root: Path) -> Iterator[None]:
    """Turn OSError into a sentence.

    Raises:
        PrecastError: names the artifact.
    """
    try:
        yield
    except OSError as error:
        raise PrecastError(
            f"{root}: the target cannot be added ({error.strerror or error}); the artifact must be on a disk with room"
            " and in a folder that you may write to: copy it there."
        ) from error


def remove_leftovers(held: Held) -> None:
    """Settle and remove the remains of killed processes below programs/."""
    if (held.root / PROGRAMS).exists():
        folders.remove_leftovers(held.root / PROGRAMS, _PURPOSE, lambda left: _settle(held.root, left))


@contextmanager
def adding(held: Held, manifest: Manifest) -> Iterator[Path]:
    """Yield a folder that records the change in progress; when the block ends in any way, settle and remove it.

    Raises:
        PrecastError: the artifact was exchanged.
    """
    data = to_json(manifest).encode()
    # Never write a manifest that the next load would refuse.
    parse_manifest(data, str(held.root / MANIFEST_FILE))
    held.check()
    programs = held.root / PROGRAMS
    if not programs.exists():
        programs.mkdir()
    work, lock = folders.temporary_name(programs, _PURPOSE), None
    with on_interrupt(partial(_tidy, held, work)):
        try:
            lock = folders.make_marked(work)
            _write_synced(work / _OLD, held.data)
            _write_synced(work / MANIFEST_FILE, data)
            folders.sync(work)
            yield work
        finally:
            _tidy(held, work)
            if lock is not None:
                os.close(lock)


def _tidy(held: Held, work: Path) -> None:
    """Settle, and remove the folder that records the change."""
    if not held.is_there():  # the name may belong to another artifact now
        return
    if work.exists():
        _settle(held.root, work)
        shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):
        work.parent.rmdir()


def write_programs(held: Held, work: Path, executables: Mapping[str, bytes]) -> None:
    """Write a folder of executables atomically."""
    final = held.root / PurePosixPath(next(iter(executables))).parent
    partial = work / _EXECUTABLES
    held.check()
    # Unlike mkdtemp, give it the permissions of the user's other files, as it becomes part of the artifact.
    partial.mkdir()
    for name, data in executables.items():
        _write_synced(partial / PurePosixPath(name).name, data)
    folders.sync(partial)
    partial.rename(final)
    folders.sync(final.parent)


def replace_manifest(held: Held, work: Path) -> bool:
    """Replace the old manifest by the new one; return True if the old one was signed."""
    root, signature = held.root, held.root / SIGNATURE_FILE
    held.check()
    signed, aside = signature.exists(), work / SIGNATURE_FILE
    try:
        if signed:
            signature.rename(aside)
        (work / MANIFEST_FILE).replace(root / MANIFEST_FILE)
    except BaseException:
        if aside.exists() and (work / MANIFEST_FILE).exists():
            aside.rename(signature)
        raise
    # The new manifest is complete: without this sync only a power cut could still restore the old one.
    with suppress(OSError):
        folders.sync(root)
    return signed


def _settle(root: Path, work: Path) -> None:
    """Make the artifact match its manifest, old or new. Files that cannot be removed do no harm."""
    with suppress(OSError, PrecastError):
        data = files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
        _put_signature_back(root, work / SIGNATURE_FILE, data)
        listed = parse_manifest(data, str(root)).files
        for name in (_OLD, MANIFEST_FILE):
            if not (work / name).exists():
                continue
            noted = parse_manifest(files.read(work, name, limit=MAX_JSON_BYTES), str(work)).files
            for file in sorted(set(noted) - set(listed)):
                _remove_if(root, file, noted[file].sha256)


def _remove_if(root: Path, name: str, sha256: str) -> None:
    """Remove a file of the artifact if it has this hash, and its folder if that is then empty."""
    with suppress(OSError, PrecastError):
        path = files.member_path(root, name)
        if files.sha256_of(path) == sha256:
            path.unlink()
            path.parent.rmdir()


def _put_signature_back(root: Path, kept: Path, manifest: bytes) -> None:
    """Restore a signature that was put aside, if it fits the manifest."""
    from .signing import MAX_SIGNATURE_BYTES, signed_digest

    signature = root / SIGNATURE_FILE
    if os.path.lexists(signature) or not os.path.lexists(kept):
        return
    with suppress(PrecastError):
        data = files.read(kept.parent, kept.name, limit=MAX_SIGNATURE_BYTES)
        if signed_digest(data, str(kept.parent)) == hashlib.sha256(manifest).hexdigest():
            kept.rename(signature)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
