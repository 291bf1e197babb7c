"""Read an artifact's files: reject names that lead outside, and contents that do not match their hashes.

The cache folder records which files have been hashed.
"""

import errno
import hashlib
import json
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from .errors import PrecastError
from .interrupt import on_interrupt
from .manifest import MANIFEST_FILE, SIGNATURE_FILE, FileEntry

_BLOCK = 1 << 20
# Half a year.
_MAX_AGE_S = 180 * 24 * 3600


def cache_folder() -> Path:
    """Return the cache folder: ``PRECAST_CACHE``, or ``precast`` in the user's own cache folder.

    Every file in it can be computed or fetched again.

    Raises:
        PrecastError: no variable names a folder, and the user has no home folder.
    """
    try:
        if own := os.environ.get("PRECAST_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "precast"
    except RuntimeError:
        raise PrecastError(
            "cache: this user has no home folder to keep it in; set PRECAST_CACHE to a folder."
        ) from None


def unwritable_reason(name: str) -> str:
    """Explain, without a full stop, why subfolder `name` of the cache cannot be written to; name the remedy."""
    if cache_problem(name) is not None:  # `load` has already given the full warning
        return f"the cache folder {cache_folder()} is not used"
    try:
        return f"{cache_folder() / name} cannot be written to; set PRECAST_CACHE to a folder that can be"
    except PrecastError:
        return "this user has no home folder to keep it in; set PRECAST_CACHE to a folder"


class UntrustedCache(PrecastError):
    """Another user may have written to the cache folder."""


def trusted_cache(name: str) -> Path:
    """Return a subfolder of the cache folder that only this user and root can write to.

    Raises:
        UntrustedCache: another user can write to it.
        PrecastError: as `cache_folder`.
    """
    if (problem := cache_problem(name)) is not None:
        raise UntrustedCache(f"{problem}.")
    return cache_folder() / name


def cache_problem(name: str) -> str | None:
    """Explain why a subfolder of the cache folder is untrusted, and name the remedy; return None if it is safe to use.

    Check owner and mode of the folder and its parents, as ssh does for its own folder. A missing folder is safe,
    because `make_private` creates it for this user alone.
    """
    try:
        folder = cache_folder()
    except PrecastError:
        return None
    path = os.path.abspath(folder / name)
    if (found := _untrusted(path, len(os.path.abspath(folder)))) is None:
        return None
    return (
        f"{found}, so nothing in the cache folder {folder} is used; set PRECAST_CACHE to a folder of your own"
        + (f", or run chmod -R go-w {folder}" if "mode" in found else "")
    )


def _untrusted(path: str, own: int) -> str | None:
    """Describe the first folder on a path that another user can write to; return None if there is none.

    Args:
        path: absolute path of a folder.
        own: length of the leading part of `path` that is the cache folder. No group may write to it or below it.
    """
    users, place, linked = (0, os.geteuid()), path, False
    while True:
        try:
            status = os.lstat(place)
        except OSError:  # not there yet
            status = None
        if status is not None:
            if status.st_uid not in users:
                return f"{place} belongs to user {status.st_uid}, but this process runs as user {users[1]}"
            is_link = stat.S_ISLNK(status.st_mode)
            linked = linked or is_link
            # Parents may be writable by their group. The sticky bit protects files in a world-writable parent.
            is_parent = len(place) < own
            wrong = 0 if is_link else status.st_mode & (0o002 if is_parent else 0o022)
            if wrong and not (is_parent and status.st_mode & stat.S_ISVTX):
                return f"others may write to {place} (mode {stat.S_IMODE(status.st_mode):o})"
        if place == "/":
            break
        place = os.path.dirname(place)
    if not linked:
        return None
    real = os.path.realpath(path)
    return _untrusted(real, len(real) - (len(path) - own)) if real != path else None


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents with access for this user alone.

    Raises:
        OSError: the folder cannot be created.
    """
    if not folder.is_dir():
        make_private(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(0o700)


def split_name(root: Path | str, name: str) -> tuple[str, ...]:
    """Split the name of an artifact's file into its folders and its file name; the file may be missing.

    Raises:
        PrecastError: the name is absolute, not normalised, or contains ``..``, a backslash or a NUL.
    """
    parts = PurePosixPath(name).parts
    if (
        not parts
        or name != "/".join(parts)
        or any(p in ("..", ".", "/") or "\\" in p or "\0" in p for p in parts)
    ):
        raise PrecastError(f"{root}: {name!r} is not the name of a file inside an artifact.")
    return parts


def member_path(root: Path, name: str) -> Path:
    """Return the path of an artifact's file.

    Raises:
        PrecastError: as `split_name`; also if the file is missing, is not a regular file, or is reached through a
            symlink.
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
                f"{root}: {name!r} is not a plain file inside the artifact (a link, or a folder)."
            )
    return path


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe could block forever, and a device might never end.

    Raises:
        OSError: the path cannot be opened, or is not a regular file.
    """
    return open(path, "rb", opener=_open_plain)


def _open_plain(path: str, flags: int) -> int:
    try:
        handle = os.open(path, flags | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
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
    """Return the sha256, in hex, of an open file from its current position; pass each block's size to `on_read`."""
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
    """Return the contents of an artifact's file without comparing them with its hash.

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
            raise PrecastError(f"{path}: expected at most {limit} bytes, found {size}.")
        with open_plain(path) as file:
            return file.read()


def read_checked(root: Path, name: str, entry: FileEntry) -> bytes:
    """Return the contents of a file after comparing these same bytes with the file's hash.

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

    The hash of a file is recorded in the cache folder, and is valid while its device, inode, size and times stay the
    same.

    Args:
        root: the artifact's folder.
        name: the file's name in the manifest.
        entry: the file's size and hash in the manifest.
        rehash: hash the file even if its hash is recorded.
        on_read: called with the number of bytes of each block that is hashed.

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
            # The identity from before the read: a later change gives the file another.
            _record_hash(identity, digest)
        file.seek(0)
        cleanup.pop_all()
    return file


class Watch:
    """A detector for writes to a mapped file, which would change bytes that have been checked.

    Args:
        file: the open file; it may be closed afterwards.
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
            f"{name}: was written to while it was in use; load the artifact again, and replace artifacts whole rather"
            " than in place."
        )


def rehash_file(
    root: Path,
    name: str,
    entry: FileEntry,
    on_read: Callable[[int], None] = lambda _: None,
    *,
    record: bool = True,
) -> None:
    """Hash a whole file again and compare it with the manifest.

    Args:
        root: the artifact's folder.
        name: the file's name in the manifest.
        entry: the file's size and hash in the manifest.
        on_read: called with the size of each block.
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
    """Return the names of files in an artifact's folder that its manifest does not list, sorted.

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


def remove_old(folder: Path) -> None:
    """Remove the files in a folder that were written more than half a year ago."""
    oldest = time.time() - _MAX_AGE_S
    for file in folder.iterdir():
        with suppress(OSError):
            if file.stat().st_mtime < oldest:
                file.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file through a temporary one and a rename, so that it is never half written."""
    import tempfile  # 2 ms of import, which a start that only reads avoids

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with on_interrupt(partial(os.unlink, temporary)):
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
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
            f"{root}: file {name!r} has {size} bytes, expected {entry.bytes}; it is truncated or altered: copy or"
            " export the artifact again."
        )


def _check_hash(root: Path, name: str, entry: FileEntry, digest: str) -> None:
    if digest != entry.sha256:
        raise PrecastError(
            f"{root}: file {name!r} has sha256 {digest[:12]}…, expected {entry.sha256[:12]}…; it is altered: copy or"
            " export the artifact again."
        )


def hash_files(root: Path, known: Mapping[str, str]) -> dict[str, FileEntry]:
    """Return the size and hash of every file below `root` except the manifest and its signature.

    Args:
        root: the artifact's folder.
        known: sha256 of files that need not be hashed, by name.
    """
    entries = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if name not in (MANIFEST_FILE, SIGNATURE_FILE):
            entries[name] = FileEntry(bytes=path.stat().st_size, sha256=known.get(name) or sha256_of(path))
    return entries
