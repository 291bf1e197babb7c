"""Change an existing artifact in steps that leave it valid even if this process is killed.

A change adds, replaces or removes a target or a prefix. For a target:

1. Lock the folder (``flock``), so that only one process at a time changes it. The system releases the lock when the
   process ends.
2. Clean up after killed processes, as in step 7.
3. Create a working folder, ``programs/.add-target.precast-*.partial/``, that contains a marker file, the old manifest
   and the new manifest.
4. Write the executables to a subfolder of the working folder, flush them to disk, and rename the subfolder to
   ``programs/NAME/``. The artifact is still the old one, because its manifest does not list the new files.
5. Move the signature into the working folder, because it does not match the new manifest. If the process is killed now,
   the artifact lacks its signature until the next process cleans up (step 2).
6. Rename the new manifest over the old one. From this moment, the artifact is the new one.
7. Clean up. If the signature matches the artifact's manifest, move it back. Remove every file that only the other
   manifest lists, provided that the file's hash matches that manifest. Remove the folders that are empty as a result,
   and the working folder.

The files of a prefix are added to ``prefixes/NAME/`` in the same way. No other file in ``programs/`` or ``prefixes/``
is ever removed. The lock does not stop an export or a pull from replacing the artifact's folder. So steps 3, 4 and 5
first check that the artifact's path still leads to the locked folder.
"""

import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from .artifact import files, folders
from .artifact.errors import PrecastError
from .artifact.frozen import Frozen
from .artifact.interrupt import on_interrupt
from .artifact.json_records import MAX_JSON_BYTES, to_json
from .artifact.manifest import MANIFEST_FILE, SIGNATURE_FILE, Manifest
from .artifact.manifest_parser import parse_manifest
from .signing import MAX_SIGNATURE_BYTES, check_signature, signed_digest

PROGRAMS = "programs"
_OLD, _NEW_FILES = "old.json", "files"


class Kind(Frozen):
    """A kind of change.

    Attributes:
        folder: the folder of the artifact that the change adds files to.
        purpose: the command's name, which becomes part of the working folder's name.
        failure: the consequence of an OSError, as a clause for the error message.
        replaced: the text after the artifact's path in the error message for a replaced artifact.
    """

    folder: str
    purpose: str
    failure: str
    replaced: str


TARGETS = Kind(
    folder=PROGRAMS,
    purpose="add-target",
    failure="the target cannot be added",
    replaced="was replaced while its target was compiled; run precast add-target again",
)
PREFIXES = Kind(
    folder="prefixes",
    purpose="add-prefix",
    failure="its prefixes cannot be changed",
    replaced="was replaced while its prefixes were changed; run the command again",
)


Parts = Sequence[bytes | memoryview]


def free_folder(root: Path, kind: Kind, name: str, listed: Iterable[str]) -> str:
    """Return an unused folder name: "prefixes/NAME", or else the first unused name among "prefixes/NAME.2", ….

    Args:
        root: the artifact's folder.
        kind: the kind of change.
        name: the preferred name of the folder.
        listed: names of the files that the manifest lists. Their folders count as used, even if they do not exist.
    """
    used = {PurePosixPath(file).parts[1] for file in listed if file.startswith(f"{kind.folder}/")}
    used |= {path.name for path in (root / kind.folder).glob("*")}
    names = (name, *(f"{name}.{n}" for n in range(2, len(used) + 3)))
    return f"{kind.folder}/{next(n for n in names if n not in used)}"


@dataclass(frozen=True, kw_only=True)
class LockedArtifact:
    """An artifact that this process has locked.

    Attributes:
        root: the folder's path. Another process may move a different folder to this path.
        handle: the folder's file descriptor, which owns the lock.
        data: contents of the manifest at the time of locking.
        kind: the kind of change.
    """

    root: Path
    handle: int
    data: bytes
    kind: Kind

    def is_there(self) -> bool:
        """Return True if `root` still leads to the locked folder."""
        try:
            return os.path.samestat(self.root.stat(), os.fstat(self.handle))
        except OSError:
            return False

    def check(self) -> None:
        """Check that the artifact has not been replaced.

        Raises:
            PrecastError: another artifact is now at `root`, or a file or link has the name of the folder for the new
                files.
        """
        try:
            same = self.is_there() and self.data == files.read(self.root, MANIFEST_FILE, limit=len(self.data))
        except PrecastError:
            same = False
        if not same:
            raise PrecastError(f"{self.root}: {self.kind.replaced}.")
        with suppress(FileNotFoundError):  # `record_change` creates a missing folder
            mode = (self.root / self.kind.folder).lstat().st_mode
            if not stat.S_ISDIR(mode):
                what = "link" if stat.S_ISLNK(mode) else "file"
                raise PrecastError(
                    f"{self.root}: {self.kind.folder!r} is a {what}, expected a folder; copy or export the artifact"
                    " again."
                )


@contextmanager
def lock(root: Path, log: Callable[[str], None]) -> Iterator[int]:
    """Lock an artifact, after waiting for other processes that change it, and yield its folder's file descriptor."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"{root}: waiting for another precast command that changes it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


@contextmanager
def explain_os_errors(root: Path, kind: Kind) -> Iterator[None]:
    """Turn an OSError into a PrecastError that names the artifact and a remedy."""
    try:
        yield
    except OSError as error:
        raise PrecastError(
            f"{root}: {kind.failure} ({error.strerror or error}); copy the artifact to a writable folder on a disk with"
            " free space."
        ) from error


@contextmanager
def changing(
    root: Path, kind: Kind, key: Path | None, log: Callable[[str], None]
) -> Iterator[tuple[LockedArtifact, Manifest]]:
    """Lock an artifact, clean up after killed processes, and yield it with its manifest.

    Args:
        root: the artifact's folder.
        kind: the kind of change.
        key: file of the public key that must verify the artifact's signature before the change. None requires no
            signature.
        log: receives a message if this process must wait for another process that changes the artifact.

    Raises:
        PrecastError: the artifact is damaged, lacks the required signature, or cannot be written to.
    """
    with explain_os_errors(root, kind), lock(root, log) as handle:
        data = files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
        artifact = LockedArtifact(root=root, handle=handle, data=data, kind=kind)
        if key is not None:
            check_signature(root, data, key)
        manifest = parse_manifest(data, str(root / MANIFEST_FILE))
        artifact.check()
        remove_leftovers(artifact)
        yield artifact, manifest


def remove_leftovers(artifact: LockedArtifact) -> None:
    """Clean up after killed processes."""
    for kind in (TARGETS, PREFIXES):
        if (folder := artifact.root / kind.folder).is_dir() and not folder.is_symlink():
            folders.remove_leftovers(folder, kind.purpose, lambda left: _settle(artifact.root, left))
            with suppress(OSError):  # a killed process may have left an empty folder
                folder.rmdir()


@contextmanager
def record_change(artifact: LockedArtifact, manifest: Manifest) -> Iterator[Path]:
    """Yield a working folder that contains the old manifest and the new one.

    When the block ends, even if it raises, make the artifact match its manifest and remove the working folder.

    Raises:
        PrecastError: the artifact was replaced.
    """
    data = to_json(manifest).encode()
    # Never write a manifest that the next load would refuse.
    parse_manifest(data, str(artifact.root / MANIFEST_FILE))
    artifact.check()
    parent = artifact.root / artifact.kind.folder
    if not parent.exists():
        parent.mkdir()
    folder, mark = folders.temporary_name(parent, artifact.kind.purpose), None
    with on_interrupt(partial(_tidy, artifact, folder)):
        try:
            mark = folders.make_marked(folder)
            _write_synced(folder / _OLD, artifact.data)
            _write_synced(folder / MANIFEST_FILE, data)
            folders.sync(folder)
            yield folder
        finally:
            try:
                _tidy(artifact, folder)
            finally:
                if mark is not None:
                    os.close(mark)


def _tidy(artifact: LockedArtifact, folder: Path) -> None:
    """Make the artifact match its manifest, then remove the working folder."""
    if not artifact.is_there():  # the path may now lead to another artifact
        return
    if folder.exists():
        _settle(artifact.root, folder)
        folders.remove(folder)
    with suppress(OSError):
        folder.parent.rmdir()


def write_files(artifact: LockedArtifact, folder: Path, contents: Mapping[str, Parts]) -> None:
    """Add new files to an artifact atomically, all of them in one new folder.

    Args:
        artifact: the artifact.
        folder: the working folder of the change.
        contents: each file's contents, in parts, by the file's name in the artifact.
    """
    final = artifact.root / PurePosixPath(next(iter(contents))).parent
    unfinished = folder / _NEW_FILES
    artifact.check()
    # This folder becomes part of the artifact, so it needs the user's usual permissions. mkdtemp would restrict them.
    unfinished.mkdir()
    for name, parts in contents.items():
        _write_synced(unfinished / PurePosixPath(name).name, *parts)
    folders.sync(unfinished)
    unfinished.rename(final)
    folders.sync(final.parent)


def replace_manifest(artifact: LockedArtifact, folder: Path) -> bool:
    """Replace the old manifest with the new one; return True if the old one was signed."""
    root, signature = artifact.root, artifact.root / SIGNATURE_FILE
    artifact.check()
    signed, aside = signature.exists(), folder / SIGNATURE_FILE
    try:
        if signed:
            signature.rename(aside)
        (folder / MANIFEST_FILE).replace(root / MANIFEST_FILE)
    except BaseException:
        if aside.exists() and (folder / MANIFEST_FILE).exists():
            aside.rename(signature)
        raise
    # The new manifest is now in place. If this sync fails, only a power cut could undo the rename.
    with suppress(OSError):
        folders.sync(root)
    return signed


def _settle(root: Path, folder: Path) -> None:
    """Restore the signature if it matches the manifest, and remove files that only the other manifest lists.

    Ignore errors, because a file that is left behind does no harm.
    """
    with suppress(OSError, PrecastError):
        data = files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
        _put_signature_back(root, folder / SIGNATURE_FILE, data)
        listed = parse_manifest(data, str(root)).files
        for name in (_OLD, MANIFEST_FILE):
            if not (folder / name).exists():
                continue
            noted = parse_manifest(files.read(folder, name, limit=MAX_JSON_BYTES), str(folder)).files
            for file in sorted(set(noted) - set(listed)):
                _remove_if(root, file, noted[file].sha256)
                _remove_empty(root, PurePosixPath(*files.split_name(root, file)).parent)


def _remove_if(root: Path, name: str, sha256: str) -> None:
    """Remove a file of the artifact if its hash is `sha256`."""
    with suppress(OSError, PrecastError):
        path = files.member_path(root, name)
        if files.sha256_of(path) == sha256:
            path.unlink()


def _remove_empty(root: Path, name: PurePosixPath) -> None:
    """Remove a folder of the artifact if it is empty and no part of its path is a symlink."""
    with suppress(OSError):
        if (root / name).resolve() == root.resolve() / name:
            (root / name).rmdir()


def _put_signature_back(root: Path, kept: Path, manifest: bytes) -> None:
    """Move the signature back from the working folder if it matches the manifest."""
    signature = root / SIGNATURE_FILE
    if os.path.lexists(signature) or not os.path.lexists(kept):
        return
    with suppress(PrecastError):
        data = files.read(kept.parent, kept.name, limit=MAX_SIGNATURE_BYTES)
        if signed_digest(data, str(kept.parent)) == hashlib.sha256(manifest).hexdigest():
            kept.rename(signature)


def _write_synced(path: Path, *parts: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
