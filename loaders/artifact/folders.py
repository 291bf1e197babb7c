"""Folders that appear whole. Apart from `files`, because every start reads and few write."""

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

# Every temporary folder contains this file. Only folders with it, and with a name of the form below, are removed.
_MARK = "precast-partial"
_MARK_TEXT = b"precast was filling this folder. Its next command that writes here removes it.\n"
_TEMPORARY = re.compile(r"\.(.+)\.precast-[0-9a-f]{12}\.partial", re.DOTALL)
# Linux's AT_FDCWD and RENAME_EXCHANGE, renameat2(2).
_HERE, _RENAME_EXCHANGE = -100, 2


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary sibling of `path` to fill; when the block ends well, it becomes `path` at once.

    Whatever goes wrong, `path` is as it was and the temporary folder is gone.

    Raises:
        PrecastError: when `path` exists and `overwrite` is false or it is no artifact, and when the disk does not
            take what is written.
    """
    check_free(path, overwrite)
    made = temporary_name(path.parent, path.name)
    with on_interrupt(partial(shutil.rmtree, made, ignore_errors=True)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, path.name)
            lock = make_marked(made)
        except OSError as error:
            raise PrecastError(
                f"{path}: cannot write there ({error.strerror}); choose another folder with -o."
            ) from None
        try:
            # Inside the marked folder, so that the mark does not become part of the artifact.
            temporary = made / path.name
            temporary.mkdir()
            yield temporary
            _finish(temporary, path, overwrite)
        except OSError as error:
            raise PrecastError(
                f"{path}: writing stopped ({error.strerror or error}); nothing was left behind: make room and try"
                " again."
            ) from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
            os.close(lock)


def _finish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Sync a complete folder to disk, then give it its final name."""
    for file in sorted(temporary.rglob("*"), reverse=True):
        sync(file)
    sync(temporary)
    check_free(path, overwrite)
    _swap(temporary, path, overwrite)
    # The artifact is complete: without this sync only a power cut could still lose its name.
    with suppress(OSError):
        sync(path.parent)


def temporary_name(parent: Path, name: str) -> Path:
    """Return a path for a temporary folder in `parent`, for `name`."""
    return parent / f".{name}.precast-{token_hex(6)}.partial"


def make_marked(folder: Path) -> int:
    """Make a temporary folder with the mark that `remove_leftovers` looks for.

    Args:
        folder: its path, from `temporary_name`.

    Returns:
        A descriptor that locks the folder until this process ends.

    Raises:
        OSError: when the system refuses.
    """
    # Not mkdtemp: what becomes the artifact has the permissions that the user's other folders have.
    folder.mkdir()
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        lock = os.open(folder, os.O_RDONLY)
        undo.callback(os.close, lock)
        with suppress(OSError):  # a file system without locks: then nobody removes it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Mark it only after locking it: unmarked folders are never removed.
        (folder / _MARK).write_bytes(_MARK_TEXT)
        undo.pop_all()
    return lock


def remove_leftovers(parent: Path, name: str, rescue: Callable[[Path], None] = lambda _: None) -> None:
    """Remove the marked temporary folders for `name` that killed processes of this user left.

    Args:
        parent: the folder that they are in.
        name: as given to `temporary_name`.
        rescue: called with each before it is removed.

    Raises:
        OSError: when `parent` cannot be read.
    """
    for left in sorted(parent.iterdir()):
        form = _TEMPORARY.fullmatch(left.name)
        if form is None or form[1] != name:
            continue
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_marked(lock):
                    rescue(left)
                    shutil.rmtree(left)
            finally:
                os.close(lock)


def _is_marked(folder: int) -> bool:
    """Tell whether an open folder is this user's and holds the mark."""
    if os.fstat(folder).st_uid != os.geteuid():
        return False
    # Not blocking: a pipe of that name would wait for a writer.
    mark = os.open(_MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        return stat.S_ISREG(os.fstat(mark).st_mode) and os.read(mark, len(_MARK_TEXT) + 1) == _MARK_TEXT
    finally:
        os.close(mark)


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse an existing folder, unless it is empty, or an artifact with `overwrite` set.

    Raises:
        PrecastError: names the folder.
    """
    if not os.path.lexists(path):
        return
    if _is_empty_folder(path):
        # The new folder replaces the empty one.
        if os.path.ismount(path) or path.samefile(os.curdir):
            what = "a mount point" if os.path.ismount(path) else "the current folder"
            raise PrecastError(
                f"{path}: is {what}, which nothing can replace; choose a folder in it with -o."
            )
        return
    if not overwrite:
        raise PrecastError(
            f"{path}: exists already; choose another folder with -o, or replace it with --overwrite."
        )
    if path.is_symlink() or not (path / MANIFEST_FILE).is_file():
        raise PrecastError(
            f"{path}: exists and is no artifact, so --overwrite does not replace it; remove it yourself."
        )


def _is_empty_folder(path: Path) -> bool:
    try:
        return not path.is_symlink() and not os.listdir(path)
    except OSError:  # a file, or a folder that this user may not read
        return False


def _swap(temporary: Path, path: Path, overwrite: bool) -> None:
    """Renames `temporary` to `path`, at once; an artifact that was there has its name then, or is gone."""
    if not overwrite or not path.exists():
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # somebody else was quicker, by a moment
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
        # Removed only if empty: an old artifact that could not be put back is kept rather than lost.
        with suppress(OSError):
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two folders change names, so that neither name is free for a moment; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0)
