"""What the readers share: hashing, JSON, names and licences."""

import json
import re
import stat
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.files import sha256_of

from .base import SourceFile

# Hugging Face and GGUF write licences in lower case, SPDX does not; a licence that is not here is passed on
# as written.
_SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC-BY-4.0",
        "CC-BY-NC-4.0",
        "CC-BY-NC-SA-4.0",
        "CC-BY-SA-4.0",
        "CC0-1.0",
        "ISC",
        "MIT",
        "MPL-2.0",
        "Unlicense",
    )
}


# By the kind that the mode of a path states.
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def plain_file(path: Path) -> bool:
    """Return True for a file with a beginning and an end, False where there is nothing of that name.

    Raises:
        PrecastError: for anything else, such as a FIFO, on which reading would wait without end, and for a link to
            nothing.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise PrecastError(
                f"{path}: is a link to {path.readlink()}, which is not there; fetch the file again."
            ) from None
        return False
    except OSError as error:
        raise PrecastError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions."
        ) from error
    except ValueError:  # a NUL, or half of a surrogate pair: no file has such a name
        return False
    if kind != stat.S_IFREG:
        raise PrecastError(
            f"{path}: expected a file, found {_KINDS.get(kind, 'something else')}; replace it by the file."
        )
    return True


def hash_file(path: Path) -> SourceFile:
    """Name, size and sha256 of a file, which is read in pieces.

    Raises:
        PrecastError: when it cannot be read.
    """
    try:
        return SourceFile(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
    except OSError as error:
        raise PrecastError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions."
        ) from error


def read_text(path: Path) -> str:
    """A file as UTF-8.

    Raises:
        PrecastError: when it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PrecastError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise PrecastError(
            f"{path}: expected UTF-8 text, found the byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start}; fetch the file again."
        ) from error


def read_json(path: Path) -> dict[str, object]:
    """A JSON file that holds an object.

    Raises:
        PrecastError: when it cannot be read, is not JSON or holds something else.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise PrecastError(f"{path}: is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(value, dict):
        raise PrecastError(
            f"{path}: expected a JSON object, found {type(value).__name__}; fetch the file again."
        )
    return value


def optional_json(path: Path) -> dict[str, object]:
    """A JSON file that may be missing: then an empty object.

    Raises:
        PrecastError: as `read_json`.
    """
    return read_json(path) if path.is_file() else {}


def slug(text: str) -> str:
    """A name fit for a folder: lower case, and only letters, digits, ``.``, ``_`` and single ``-``."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._") or "model"


def spdx(licence: object) -> str | None:
    """A licence as SPDX spells it where that is known, otherwise as the source does; None for none."""
    if not isinstance(licence, str) or not licence.strip():
        return None
    return _SPDX.get(licence.strip().lower(), licence.strip())
