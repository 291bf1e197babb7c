"""Files of an artifact: names that stay inside, contents that match their hashes."""

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
_NOTES_KEPT_S = 180 * 24 * 3600


def cache_folder() -> Path:
    """Where precast keeps what it can make again: ``PRECAST_CACHE``, or ``precast`` in the user's cache folder.

    Raises:
        PrecastError: when neither is set and the user has no home folder.
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
    """Say why folder `name` of the cache folder cannot be written to, and the remedy, without a full stop."""
    if cache_problem(name) is not None:  # the warning was given before
        return f"the cache folder {cache_folder()} is not used"
    try:
        return f"{cache_folder() / name} cannot be written to; set PRECAST_CACHE to a folder that can be"
    except PrecastError:
        return "this user has no home folder to keep it in; set PRECAST_CACHE to a folder"


class UntrustedCache(PrecastError):
    """The cache folder may have been written to by another user."""


def trusted_cache(name: str) -> Path:
    """Return a part of the cache folder that only this user and root can have written to.

    Raises:
        UntrustedCache: somebody else can have written to it.
        PrecastError: as `cache_folder`.
    """
    if (problem := cache_problem(name)) is not None:
        raise UntrustedCache(f"{problem}.")
    return cache_folder() / name


def cache_problem(name: str) -> str | None:
    """Explain why precast ignores a part of the cache folder, and give the remedy; return None if it is safe to use.

    Check owner and mode of the folder and its parents, as ssh does for its own folder. A missing folder is safe,
    because `make_private` makes it for this user alone.
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
    """Describe the first of a folder and its parents that another user can have written to.

    Args:
        path: of the folder, absolute.
        own: length of the path of precast's own folder within it; no group may write there.
    """
    users, place, linked = (0, os.geteuid()), path, False
    while True:
        try:
            status = os.lstat(place)
        except OSError:  # not there yet
            status = None
        if status is not None:
            if status.st_uid not in users:
                return f"{place} belongs to user {status.st_uid}, and this is user {users[1]}"
            is_link = stat.S_ISLNK(status.st_mode)
            linked = linked or is_link
            # A group may write to the parents, and anybody to a parent with the sticky bit: it protects others' files.
            inside = len(place) < own
            wrong = 0 if is_link else status.st_mode & (0o002 if inside else 0o022)
            if wrong and not (inside and status.st_mode & stat.S_ISVTX):
                return f"others may write to {place} (mode {stat.S_IMODE(status.st_mode):o})"
        if place == "/":
            break
        place = os.path.dirname(place)
    if not linked:
        return None
    real = os.path.realpath(path)
    return _untrusted(real, len(real) - (len(path) - own)) if real != path else None


def make_private(folder: Path) -> None:
    """Make a part of the cache folder and its missing parents, accessible to this user alone.

    Raises:
        OSError: when the system refuses.
    """
    if not folder.is_dir():
        make_private(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(0o700)


def split_name(root: Path | str, name: str) -> tuple[str, ...]:
    """The folders and the file that a name of the artifact at `root` has, whether or not they are there.

    Raises:
        PrecastError: for a name that is absolute, or has ``..`` or odd parts.
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
    """The path of a file of the artifact at `root`.

    Raises:
        PrecastError: for a name that is absolute, has ``..`` or odd parts, or is not a plain file below `root`
            reached without a symbolic link.
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
    """Open a regular file for reading; a pipe would wait for its writer, and a device might never end.

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
    """Hex digest of a file, read once."""
    with open_plain(path) as file:
        return digest_of(file)


def digest_of(file: BinaryIO, report: Callable[[int], None] = lambda _: None) -> str:
    """Hex sha256 of an open file, from where it stands to its end; `report` is told of bytes as they are read."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
        report(len(block))
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
    """Reads a file of the artifact at `root` whole, unchecked.

    Raises:
        PrecastError: when it is not there, cannot be read, or has more than `limit` bytes.
    """
    with _reading(root, name):
        path = member_path(root, name)
        if limit is not None and (size := path.stat().st_size) > limit:
            raise PrecastError(f"{path}: expected at most {limit} bytes, found {size}.")
        with open_plain(path) as file:
            return file.read()


def read_checked(root: Path, name: str, entry: FileEntry) -> bytes:
    """Reads a file whole; the bytes returned are the bytes that were hashed.

    Raises:
        PrecastError: when the file is not what the manifest says.
    """
    _check_size(root, name, entry, member_path(root, name).stat().st_size)
    data = read(root, name)
    _check_hash(root, name, entry, hashlib.sha256(data).hexdigest())
    return data


def open_checked(root: Path, name: str, entry: FileEntry, *, rehash: bool) -> BinaryIO:
    """Opens a file too large to read whole at every start, and checks what it has opened.

    A file that passed before and has kept its device, inode, size and times is not read again, unless `rehash`.

    Raises:
        PrecastError: when the file is not what the manifest says.
    """
    with _reading(root, name), ExitStack() as cleanup:
        file = cleanup.enter_context(open_plain(member_path(root, name)))
        status = os.fstat(file.fileno())
        _check_size(root, name, entry, status.st_size)
        identity = _identity(status)
        if rehash or _remembered(identity) != entry.sha256:
            digest = digest_of(file)
            _check_hash(root, name, entry, digest)
            _check_unchanged(str(root / name), file, status)
            # The file as it was before it was read: what changes it from then on makes it another.
            _record_hash(identity, digest)
        file.seek(0)
        cleanup.pop_all()
    return file


class Watch:
    """Notices when a file that is mapped is written to, which would change what has been checked.

    Args:
        file: open; it may be closed afterwards.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._name, self._status = file.name, os.fstat(file.fileno())
        self._handle = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._handle)

    def check(self) -> None:
        """Costs about a microsecond.

        Raises:
            PrecastError: when the file is not as it was.
        """
        _check_unchanged(self._name, self._handle, self._status)


def _check_unchanged(name: str, file: BinaryIO | int, before: os.stat_result) -> None:
    # Not the change time: renaming and removing a file leave what is mapped of it as it was.
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
    report: Callable[[int], None] = lambda _: None,
    *,
    note: bool = True,
) -> None:
    """Reads a file from its first byte to its last, whatever is remembered of it.

    Args:
        root: the artifact.
        name: of the file.
        entry: what the manifest says of it.
        report: told of bytes as they are read.
        note: whether it is noted in the cache folder, so that it need not be read again.

    Raises:
        PrecastError: when the file is not what the manifest says.
    """
    with _reading(root, name), open_plain(member_path(root, name)) as file:
        status = os.fstat(file.fileno())
        _check_size(root, name, entry, status.st_size)
        digest = digest_of(file, report)
        _check_hash(root, name, entry, digest)
        if note:
            _record_hash(_identity(status), digest)


def unlisted_files(root: Path, listed: Iterable[str]) -> list[str]:
    """Names of what lies in the artifact's folder beside the files listed, the manifest and its signature.

    Links are named whatever they lead to, and are not followed. Folders are named where nothing is in them.

    Raises:
        PrecastError: for a folder that cannot be read.
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
    """Notes that the file at `path` has this sha256. Where that cannot be written, it is hashed again next time."""
    _record_hash(_identity(path.stat()), digest)


def _record_hash(identity: str, digest: str) -> None:
    with suppress(OSError, PrecastError):
        record = _record_of(identity)
        make_private(record.parent)
        remove_old(record.parent)
        write_atomically(record, json.dumps({"sha256": digest}).encode())


def remove_old(folder: Path) -> None:
    """Removes notes of the cache folder that were written more than half a year ago."""
    oldest = time.time() - _NOTES_KEPT_S
    for note in folder.iterdir():
        with suppress(OSError):
            if note.stat().st_mtime < oldest:
                note.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is whole or absent at any moment."""
    import tempfile  # 2 ms that a start which only reads does not need

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
    # The change time catches a rewrite whose author set the modification time back.
    fields = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join(map(str, fields))


def _record_of(identity: str) -> Path:
    return trusted_cache("verified") / f"{identity}.json"


def _remembered(identity: str) -> str | None:
    try:
        value = json.loads(_record_of(identity).read_bytes())
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
    """Every file below `root` but the manifest and its signature, hashed; `known` digests are taken as they are."""
    entries = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if name not in (MANIFEST_FILE, SIGNATURE_FILE):
            entries[name] = FileEntry(bytes=path.stat().st_size, sha256=known.get(name) or sha256_of(path))
    return entries
