"""The cache folder: its path, the check of its owner and mode, and the removal of its old files."""

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from .errors import PrecastError

# Half a year, in seconds.
_MAX_AGE_S = 180 * 24 * 3600


def cache_folder() -> Path:
    """Return the cache folder: ``PRECAST_CACHE``, or ``precast`` in the user's general cache folder.

    Every file in the cache folder can be computed or fetched again.

    Raises:
        PrecastError: the user has no home folder, and neither ``PRECAST_CACHE`` nor ``XDG_CACHE_HOME`` names a folder.
    """
    try:
        if own := os.environ.get("PRECAST_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "precast"
    except RuntimeError:
        raise PrecastError(
            "cache folder: this user has no home folder to hold it; set PRECAST_CACHE to a folder."
        ) from None


def unwritable_reason(name: str) -> str:
    """Return the reason why subfolder `name` of the cache folder is not used.

    The reason includes the remedy, unless `load` has already logged it. The reason has no full stop, because it becomes
    part of a longer message.
    """
    if cache_problem(name) is not None:  # `load` has already given the full warning
        return f"the cache folder {cache_folder()} is not used"
    try:
        return f"{cache_folder() / name} cannot be written to; set PRECAST_CACHE to a writable folder"
    except PrecastError:
        return "this user has no home folder to hold the cache folder; set PRECAST_CACHE to a folder"


class UntrustedCache(PrecastError):
    """The error for a cache folder that another user can write to."""


def trusted_cache(name: str) -> Path:
    """Return the path of a subfolder of the cache folder, after checking that only this user and root can write to it.

    Raises:
        UntrustedCache: another user can write to it.
        PrecastError: there is no cache folder (see `cache_folder`).
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
    """Describe the first folder on a path that another user can write to; return None if there is no such folder.

    Args:
        path: absolute path of a folder.
        own: length of the part of `path` that names the cache folder. A group may write to the parents of the cache
            folder, but neither to the folder itself nor to anything below it.
    """
    users, place, linked = (0, os.geteuid()), path, False
    while True:
        try:
            status = os.lstat(place)
        except OSError:  # the folder does not exist yet
            status = None
        if status is not None:
            if status.st_uid not in users:
                return f"{place} belongs to user {status.st_uid}, but this process runs as user {users[1]}"
            is_link = stat.S_ISLNK(status.st_mode)
            linked = linked or is_link
            # Parents may be writable by their group. The sticky bit protects the files in a world-writable parent, such
            # as /tmp.
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


def remove_old(folder: Path) -> None:
    """Remove the files in a folder that were written more than half a year ago."""
    oldest = time.time() - _MAX_AGE_S
    for file in folder.iterdir():
        with suppress(OSError):
            if file.stat().st_mtime < oldest:
                file.unlink()
