"""The messages of earlier chats, in a file that only its user can read."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

# Limits of the file: number of messages, total bytes, and bytes of one message.
_MOST, _BYTES, _LONGEST = 1000, 1_000_000, 50_000
SETTING = "PRECAST_HISTORY"


def history_file() -> Path | None:
    """Return the history file: ``PRECAST_HISTORY``, or a file in the user's state folder; None if history is off."""
    own = os.environ.get(SETTING)
    if own == "off":
        return None
    try:
        if own:
            return Path(own).expanduser()
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:  # a user without a home folder
        return None
    return Path(state) / "precast" / "chat_history"


class History:
    """A file of messages, oldest first, with one line of JSON for each message.

    Attributes:
        messages: messages of earlier chats.
        problem: error text if messages cannot be saved; None if the history works or is off.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.messages: list[str] = []
        self.problem: str | None = None
        if path is not None:
            self._guarded(self._read)

    def add(self, message: str) -> bool:
        """Append a message to the file. Return False, and save nothing, if `_is_kept` rejects the message."""
        fits = _is_kept(message)
        if fits and self._path is not None:
            line = json.dumps(message).encode() + b"\n"
            self._guarded(lambda path: _append(path, line))
        return fits

    def _guarded(self, work: Callable[[Path], None]) -> None:
        """Call `work` with the file's path. If it fails, set `problem`, and stop using the file."""
        assert self._path is not None
        try:
            work(self._path)
        except OSError as error:
            self.problem = (
                f"the history of this chat is not saved: {self._path}: {error.strerror or error};"
                f" set {SETTING} to another file, or to off."
            )
            self._path = None

    def _read(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(_open(path), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _BYTES))
            lines = file.read().split(b"\n")[:-1]
        found = [m for line in lines[-_MOST:] if (m := _parsed(line)) is not None]
        self.messages = found
        if size > _BYTES or len(lines) > _MOST:
            _replace(path, b"".join(json.dumps(m).encode() + b"\n" for m in found[-_MOST // 2 :]))


def _parsed(line: bytes) -> str | None:
    """Parse the message in a line; return None for a truncated or altered line."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, str) and _is_kept(message) else None


def _is_kept(message: str) -> bool:
    """Return True if a message is short enough and acceptable to line editors."""
    try:
        return 0 < len(message.encode()) <= _LONGEST and "\0" not in message
    except UnicodeEncodeError:
        return False


def _open(path: Path) -> int:
    """Open the file for reading and appending, and deny other users access.

    Raises:
        OSError: the file cannot be opened, or it is a symlink or not a regular file of this user.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, 0o600)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise OSError("it is not a file of this user")
        if stat.S_IMODE(found.st_mode) != 0o600:
            os.fchmod(handle, 0o600)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _append(path: Path, line: bytes) -> None:
    with os.fdopen(_open(path), "ab") as file:
        file.write(line)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
