"""Folders that appear whole. Apart from `files`, because every start reads and few write."""

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from .errors import PrecastError
from .manifest import MANIFEST_FILE

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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary, lock = _locked_folder(path)
    except OSError as error:
        raise PrecastError(
            f"{path}: cannot write there ({error.strerror}); choose another folder with -o."
        ) from None
    try:
        yield temporary
        for file in sorted(temporary.rglob("*"), reverse=True):
            sync(file)
        sync(temporary)
        check_free(path, overwrite)
        _swap(temporary, path, overwrite)
        # The artifact is there, whole: without this only a power cut could still lose its name.
        with suppress(OSError):
            sync(path.parent)
    except OSError as error:
        raise PrecastError(
            f"{path}: writing stopped ({error.strerror or error}); nothing was left behind: make room and try again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A temporary sibling of `path`, and the descriptor that locks it until this process ends, however it ends."""
    # Not mkdtemp: what becomes the artifact has the permissions that the user's other folders have.
    made = path.parent / f".{path.name}.{token_hex(6)}.new"
    made.mkdir()
    with ExitStack() as undo:
        undo.callback(made.rmdir)
        lock = os.open(made, os.O_RDONLY)
        undo.callback(os.close, lock)
        with suppress(OSError):  # a file system without locks: then nobody removes it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Under the name that others look at only now that it is locked.
        temporary = made.rename(made.with_suffix(".partial"))
        undo.pop_all()
    return temporary, lock


def _remove_leftovers(path: Path) -> None:
    """Removes temporary folders that nobody holds locked: those of exports and pulls to `path` that were killed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


def check_free(path: Path, overwrite: bool) -> None:
    """Refuses a folder that is there already, but for an artifact when `overwrite` is asked for.

    Raises:
        PrecastError: naming it.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise PrecastError(
            f"{path}: exists already; choose another folder with -o, or replace it with --overwrite."
        )
    if path.is_symlink() or not (path / MANIFEST_FILE).is_file():
        raise PrecastError(
            f"{path}: exists and is no artifact, so --overwrite does not replace it; remove it yourself."
        )


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
