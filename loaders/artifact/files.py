"""Read an artifact's files: reject names that lead out of the artifact, and contents that do not match their hashes.

The cache folder records the hashes of large files, so that an unchanged file is hashed only once.
"""

import errno
import hashlib
import json
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from .cache_folder import make_private, remove_old, trusted_cache
from .errors import PrecastError
from .interrupt import on_interrupt
from .manifest import MANIFEST_FILE, SIGNATURE_FILE, FileEntry

_BLOCK = 1 << 20


def split_name(
    root: Path | str, name: str, remedy: str = "copy or export the artifact again"
) -> tuple[str, ...]:
    """Split the name of an artifact's file at the slashes, after checking it; the file need not exist.

    Args:
        root: the artifact's folder, or another source of the name, for messages.
        name: the name, untrusted.
        remedy: advice to the user about an invalid name, for messages.

    Raises:
        PrecastError: the name is absolute, not normalised, or contains ``..``, a backslash or a NUL.
    """
    parts = PurePosixPath(name).parts
    if (
        not parts
        or name != "/".join(parts)
        or any(p in ("..", ".", "/") or "\\" in p or "\0" in p for p in parts)
    ):
        raise PrecastError(f"{root}: {name!r} is not a valid name for a file of an artifact; {remedy}.")
    return parts


def member_path(root: Path, name: str) -> Path:
    """Return the path of an artifact's file.

    Raises:
        PrecastError: see `split_name`; or the file is missing, is not a regular file, or is reached through a symlink.
    """
    parts, path = split_name(root, name), root
    for i, part in enumerate(parts):
        path = path / part
        try:
            mode = path.lstat().st_mode
        except (OSError, UnicodeEncodeError):
            raise PrecastError(
                f"{root}: file {name!r} is missing; copy or export the artifact again."
            ) from None
        if not (stat.S_ISREG(mode) if i == len(parts) - 1 else stat.S_ISDIR(mode)):
            raise PrecastError(
                f"{root}: expected {name!r} to be a plain file inside the artifact, found a symlink or a folder; copy"
                " the artifact again."
            )
    return path


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Refuse anything else, because reading a pipe could block forever, and a device might never end.

    Raises:
        OSError: the path cannot be opened, or is not a regular file.
    """
    return open(path, "rb", opener=_open_plain)


def _open_plain(path: str, flags: int) -> int:
    try:
        handle = os.open(path, flags | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:  # the error for a socket
            raise
    else:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
    raise OSError(errno.EINVAL, "it is not a plain file", path)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with open_plain(path) as file:
        return digest_of(file)


def digest_of(file: BinaryIO, on_read: Callable[[int], None] = lambda _: None) -> str:
    """Hash an open file from its current position; pass each block's size to `on_read`; return the sha256 in hex."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
        on_read(len(block))
    return digest.hexdigest()


@contextmanager
def _reading(root: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PrecastError(
            f"{root}: file {name!r} cannot be read ({error.strerror or error}); check its permissions and its disk."
        ) from None


def read(root: Path, name: str, *, limit: int | None = None) -> bytes:
    """Return the contents of an artifact's file without checking their hash.

    Args:
        root: the artifact's folder.
        name: the file's name in the manifest.
        limit: maximum size in bytes.

    Raises:
        PrecastError: the file is missing, unreadable, or larger than `limit`.
    """
    with _reading(root, name):
        path = member_path(root, name)
        if limit is not None and (size := path.stat().st_size) > limit:
            raise PrecastError(
                f"{path}: expected at most {limit} bytes, found {size}; copy or export the artifact again."
            )
        with open_plain(path) as file:
            return file.read()


def read_checked(root: Path, name: str, entry: FileEntry) -> bytes:
    """Return the contents of a file after checking them. The returned bytes are the bytes that were hashed.

    Raises:
        PrecastError: the file does not match `entry`.
    """
    _check_size(root, name, entry, member_path(root, name).stat().st_size)
    data = read(root, name)
    _check_hash(root, name, entry, hashlib.sha256(data).hexdigest())
    return data


def open_checked(
    root: Path,
    name: str,
    entry: FileEntry,
    *,
    rehash: bool,
    on_read: Callable[[int], None] = lambda _: None,
) -> BinaryIO:
    """Open a file that is too large to hash at every start, and check it.

    The file is hashed at its first use, and the hash is recorded in the cache folder. Later calls rely on the record
    while the file's device, inode, size and times stay the same.

    Args:
        root: the artifact's folder.
        name: the file's name in the manifest.
        entry: the file's size and hash in the manifest.
        rehash: hash the file even if its hash is recorded.
        on_read: called with the size of each hashed block, in bytes.

    Raises:
        PrecastError: the file does not match `entry`.
    """
    with _reading(root, name), ExitStack() as cleanup:
        file = cleanup.enter_context(open_plain(member_path(root, name)))
        status = os.fstat(file.fileno())
        _check_size(root, name, entry, status.st_size)
        identity = _identity(status)
        if rehash or _recorded_hash(identity) != entry.sha256:
            digest = digest_of(file, on_read)
            _check_hash(root, name, entry, digest)
            _check_unchanged(str(root / name), file, status)
            # Record the identity from before the read. If the file changes afterwards, its identity changes, and this
            # record no longer applies.
            _record_hash(identity, digest)
        file.seek(0)
        cleanup.pop_all()
    return file


class Watch:
    """A detector of writes to a mapped file. A write would change bytes that have already been checked.

    Args:
        file: the open file. The caller may close it afterwards.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._name, self._status = file.name, os.fstat(file.fileno())
        self._handle = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._handle)

    def check(self) -> None:
        """Compare the file's size and modification time with the original ones, in about a microsecond.

        Raises:
            PrecastError: the file was written to.
        """
        _check_unchanged(self._name, self._handle, self._status)


def _check_unchanged(name: str, file: BinaryIO | int, before: os.stat_result) -> None:
    # The change time is left out: renaming or removing a file changes it, but not the mapped contents.
    now = os.fstat(file if isinstance(file, int) else file.fileno())
    if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise PrecastError(
            f"{name}: was written to while it was in use; load the artifact again, and replace its folder instead"
            " of writing to its files."
        )


def rehash_file(
    root: Path,
    name: str,
    entry: FileEntry,
    on_read: Callable[[int], None] = lambda _: None,
    *,
    record: bool = True,
) -> None:
    """Hash a whole file again, and compare the hash with the manifest.

    Args:
        root: the artifact's folder.
        name: the file's name in the manifest.
        entry: the file's size and hash in the manifest.
        on_read: called with the size of each hashed block, in bytes.
        record: record the hash in the cache folder, so that `open_checked` need not hash the file.

    Raises:
        PrecastError: the file does not match `entry`.
    """
    with _reading(root, name), open_plain(member_path(root, name)) as file:
        status = os.fstat(file.fileno())
        _check_size(root, name, entry, status.st_size)
        digest = digest_of(file, on_read)
        _check_hash(root, name, entry, digest)
        if record:
            _record_hash(_identity(status), digest)


def unlisted_files(root: Path, listed: Iterable[str]) -> list[str]:
    """Return the sorted names of the files in an artifact's folder that the manifest does not list.

    The manifest and its signature count as listed. Symlinks are always reported and never followed. An empty folder is
    reported with a slash after its name.

    Raises:
        PrecastError: a folder cannot be read.
    """
    expected = {*listed, MANIFEST_FILE, SIGNATURE_FILE}
    found = []

    def refuse(error: OSError) -> None:
        raise PrecastError(
            f"{error.filename}: cannot be read ({error.strerror}); check its permissions."
        ) from None

    for folder, folders, names in os.walk(root, onerror=refuse):
        place = Path(folder)
        inside = [*names, *(name for name in folders if (place / name).is_symlink())]
        if not inside and not folders and place != root:
            found.append(place.relative_to(root).as_posix() + "/")
        relative = [(place / name).relative_to(root).as_posix() for name in inside]
        found += [name for name in relative if name not in expected or (root / name).is_symlink()]
    return sorted(found)


def record_hash(path: Path, digest: str) -> None:
    """Record in the cache folder that the file at `path` has this sha256, if the cache folder can be written to."""
    _record_hash(_identity(path.stat()), digest)


def _record_hash(identity: str, digest: str) -> None:
    with suppress(OSError, PrecastError):
        record = _record_path(identity)
        make_private(record.parent)
        remove_old(record.parent)
        write_atomically(record, json.dumps({"sha256": digest}).encode())


def write_atomically(path: Path, *parts: bytes | memoryview, sync: bool = False) -> None:
    """Write a temporary file and rename it to `path`, so that the file at `path` is never half written.

    Args:
        path: the file to write. Only this user may read it afterwards.
        parts: the contents of the file, in parts.
        sync: flush the contents to disk before the rename. After a power cut, `path` is then either the old file or the
            new one.
    """
    import tempfile  # a lazy import, because it takes 2 ms and most starts write no file

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with on_interrupt(partial(os.unlink, temporary)):
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(parts)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def _identity(status: os.stat_result) -> str:
    # The change time reveals a rewrite whose modification time was set back.
    fields = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join(map(str, fields))


def _record_path(identity: str) -> Path:
    return trusted_cache("verified") / f"{identity}.json"


def _recorded_hash(identity: str) -> str | None:
    try:
        value = json.loads(_record_path(identity).read_bytes())
    except (OSError, ValueError, RecursionError, PrecastError):
        return None
    return value.get("sha256") if isinstance(value, dict) else None


def _check_size(root: Path, name: str, entry: FileEntry, size: int) -> None:
    if size != entry.bytes:
        raise PrecastError(
            f"{root}: file {name!r} has {size} bytes, expected {entry.bytes}; it has been truncated or altered: copy or"
            " export the artifact again."
        )


def _check_hash(root: Path, name: str, entry: FileEntry, digest: str) -> None:
    if digest != entry.sha256:
        raise PrecastError(
            f"{root}: file {name!r} has sha256 {digest[:12]}…, expected {entry.sha256[:12]}…; it has been altered:"
            " copy or export the artifact again."
        )


def hash_files(root: Path, known: Mapping[str, str]) -> dict[str, FileEntry]:
    """Return the size and hash of every file below `root` except the manifest and its signature.

    Args:
        root: the artifact's folder.
        known: sha256 of the files that the caller has already hashed, by name.
    """
    entries = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if name not in (MANIFEST_FILE, SIGNATURE_FILE):
            entries[name] = FileEntry(bytes=path.stat().st_size, sha256=known.get(name) or sha256_of(path))
    return entries
