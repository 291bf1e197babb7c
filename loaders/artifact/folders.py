"""Create folders atomically.

Only a few commands write folders, so this module is separate from `files`, which every start imports.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex

from .errors import PrecastError
from .interrupt import on_interrupt
from .manifest import MANIFEST_FILE

# The file that marks a temporary folder. A leftover folder is removed only if its name matches the pattern below and it
# is empty or contains this file.
_MARK = "precast-partial"
_MARK_TEXT = b"precast was filling this folder. Its next command that writes here removes it.\n"
_TEMPORARY = re.compile(r"\.(.+)\.precast-[0-9a-f]{12}\.partial", re.DOTALL)
# From Linux's headers, for renameat2(2).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty temporary folder, and rename it to `path` when the block succeeds.

    If the block fails, `path` is unchanged and the temporary folder is removed.

    Raises:
        PrecastError: `path` exists and may not be replaced (see `check_free`), or writing fails.
    """
    check_free(path, overwrite)
    marked = temporary_name(path.parent, path.name)
    with on_interrupt(partial(remove, marked)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, path.name)
            lock = make_marked(marked)
        except OSError as error:
            raise PrecastError(
                f"{path}: cannot be created ({error.strerror}); choose another folder with -o."
            ) from None
        try:
            # Fill a subfolder of the marked folder, so that the mark stays out of the artifact.
            temporary = marked / path.name
            temporary.mkdir()
            yield temporary
            _finish(temporary, path, overwrite)
        except OSError as error:
            raise PrecastError(
                f"{path}: writing stopped ({error.strerror or error}), and the unfinished folder was removed; free some"
                " space on the disk, or choose another folder with -o."
            ) from error
        finally:
            try:
                remove(marked)
            finally:
                os.close(lock)


def _finish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Flush a complete folder to disk, then give it its final name."""
    for file in sorted(temporary.rglob("*"), reverse=True):
        sync(file)
    sync(temporary)
    check_free(path, overwrite)
    _swap(temporary, path, overwrite)
    # The artifact is complete. This sync makes its new name survive a power cut.
    with suppress(OSError):
        sync(path.parent)


def temporary_name(parent: Path, name: str) -> Path:
    """Return a new random path in `parent` for a temporary folder; `name` is its final name or its purpose."""
    return parent / f".{name}.precast-{token_hex(6)}.partial"


def make_marked(folder: Path) -> int:
    """Create a temporary folder with the mark that `remove_leftovers` looks for.

    Args:
        folder: a path from `temporary_name`.

    Returns:
        A file descriptor of the folder. Its lock protects the folder until the descriptor is closed.

    Raises:
        OSError: the folder cannot be created.
    """
    while (lock := _try_to_mark(folder)) is None:
        pass
    return lock


def _try_to_mark(folder: Path) -> int | None:
    """Create, lock and mark a folder; return None if another process removes the folder before it is locked."""
    # Do not use mkdtemp, which denies access to the group and to others.
    folder.mkdir()
    with ExitStack() as undo:
        undo.callback(remove, folder)
        try:
            lock = os.open(folder, os.O_RDONLY)
            undo.callback(os.close, lock)
            with suppress(OSError):  # a file system without locks, where `remove_leftovers` removes nothing
                fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / _MARK).write_bytes(_MARK_TEXT)
        except FileNotFoundError:
            return None
        undo.pop_all()
    return lock


def remove(folder: Path) -> None:
    """Remove a temporary folder; ignore errors.

    The mark is removed last, so that an interrupted removal leaves a folder that is marked or empty.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            path = folder / name
            if stat.S_ISDIR(path.lstat().st_mode):
                shutil.rmtree(path, ignore_errors=True)
            elif name != _MARK:
                path.unlink(missing_ok=True)
        if os.listdir(folder) == [_MARK]:
            (folder / _MARK).unlink()
        folder.rmdir()


def remove_leftovers(parent: Path, name: str, rescue: Callable[[Path], None] = lambda _: None) -> None:
    """Remove the marked or empty temporary folders for `name` that this user's killed processes left behind.

    Args:
        parent: the folder that contains the temporary folders.
        name: the name given to `temporary_name`.
        rescue: called with each folder before its removal.

    Raises:
        OSError: `parent` cannot be read.
    """
    for leftover in sorted(parent.iterdir()):
        match = _TEMPORARY.fullmatch(leftover.name)
        if match is None or match[1] != name:
            continue
        with suppress(OSError):
            lock = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_ours(lock):
                    rescue(leftover)
                    remove(leftover)
            finally:
                os.close(lock)


def _is_ours(folder: int) -> bool:
    """Return True if an open folder belongs to this user, and contains the mark or nothing."""
    if os.fstat(folder).st_uid != os.geteuid():
        return False
    if not os.listdir(folder):
        return True
    # Open the mark without blocking, because opening a named pipe would wait for a writer.
    mark = os.open(_MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        return stat.S_ISREG(os.fstat(mark).st_mode) and os.read(mark, len(_MARK_TEXT) + 1) == _MARK_TEXT
    finally:
        os.close(mark)


def check_free(path: Path, overwrite: bool) -> None:
    """Check that a new folder may be created at a path.

    The path must be free or lead to an empty folder. With `overwrite`, it may also lead to an artifact.

    Raises:
        PrecastError: the path is taken, or is a mount point or the current folder.
    """
    if not os.path.lexists(path):
        return
    if _is_empty_folder(path):
        # The new folder replaces the empty one, but a mount point and the current folder cannot be replaced.
        if os.path.ismount(path) or path.samefile(os.curdir):
            what = "a mount point" if os.path.ismount(path) else "the current folder"
            raise PrecastError(
                f"{path}: is {what}, which cannot be replaced; choose a folder inside it with -o."
            )
        return
    if not overwrite:
        raise PrecastError(
            f"{path}: exists already; choose another folder with -o, or replace it with --overwrite."
        )
    if path.is_symlink() or not (path / MANIFEST_FILE).is_file():
        raise PrecastError(
            f"{path}: exists and is not an artifact, so --overwrite does not replace it; remove it yourself."
        )


def _is_empty_folder(path: Path) -> bool:
    try:
        return not path.is_symlink() and not os.listdir(path)
    except OSError:  # a file, or a folder that this user may not read
        return False


def _swap(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename `temporary` to `path`.

    With `overwrite`, an artifact at `path` gets the name `temporary` in exchange. If the system cannot exchange names,
    that artifact is removed.
    """
    if not overwrite or not path.exists():
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another process has created `path` meanwhile
                check_free(path, overwrite)
            raise
        return
    if _exchange(temporary, path):
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
    try:
        path.rename(old / "artifact")
        try:
            temporary.rename(path)
        except BaseException:
            (old / "artifact").rename(path)
            raise
    except BaseException:
        # rmdir removes only an empty folder, so the old artifact stays here if moving it back has failed.
        with suppress(OSError):
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders atomically; return False if the system cannot do so."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
