"""Helpers for reading the files of a source: hashes, JSON, names and licences."""

import json
import os
import re
import stat
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.files import open_plain, sha256_of

from .base import SourceFile

# Names of licences in SPDX's spelling. Hugging Face and GGUF write them in lower case. Other licences are passed on as
# written.
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


# Limit in bytes for text and JSON files. The longest is tokenizer.json: published ones reach 35 MB.
_LONGEST_TEXT = 1 << 28

# A JSON escape for one half of a surrogate pair.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

# Names of file kinds, by st_mode.
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def plain_file(path: Path) -> bool:
    """Return True if the path is a regular file, False if it does not exist.

    Raises:
        PrecastError: the path is a dangling symlink, or is not a regular file. Reading a FIFO could block forever.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise PrecastError(
                f"{path}: is a symlink to {path.readlink()}, which does not exist; fetch the file again."
            ) from None
        return False
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError:  # no file name contains a NUL or half of a surrogate pair
        return False
    if kind != stat.S_IFREG:
        raise PrecastError(
            f"{path}: expected a file, found {_KINDS.get(kind, 'something else')}; replace it with the file."
        )
    return True


def _unreadable(path: Path, error: OSError) -> PrecastError:
    return PrecastError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions.")


def hash_file(path: Path) -> SourceFile:
    """Return name, size and sha256 of a file.

    Raises:
        PrecastError: the file cannot be read.
    """
    try:
        return SourceFile(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
    except OSError as error:
        raise _unreadable(path, error) from error


# Placeholders that a download may leave in place of a file: the first bytes in lower case, and a description with the
# remedy.
_STAND_INS = (
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` in its folder"),
    (b"<!doctype html", "a web page; fetch the file itself, with a token if the model is gated"),
    (b"<html", "a web page; fetch the file itself, with a token if the model is gated"),
)


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first `count` bytes of a plain file.

    Raises:
        PrecastError: the file cannot be read.
    """
    try:
        with open_plain(path) as stream:
            return stream.read(count)
    except OSError as error:
        raise _unreadable(path, error) from error


def refuse_stand_in(path: Path) -> None:
    """Refuse a placeholder that a download left in place of a file.

    Raises:
        PrecastError: the file is such a placeholder; the error names the remedy.
    """
    begin = first_bytes(path, 32).lower()
    for mark, found in _STAND_INS:
        if begin.startswith(mark):
            raise PrecastError(f"{path}: expected the model's file, found {found}.")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        PrecastError: the file cannot be read, is not UTF-8, or is longer than `_LONGEST_TEXT`.
    """
    refuse_stand_in(path)
    try:
        with open_plain(path) as stream:
            if (size := os.fstat(stream.fileno()).st_size) > _LONGEST_TEXT:
                raise PrecastError(
                    f"{path}: expected at most {_LONGEST_TEXT:,} bytes, found {size:,}; fetch the file again."
                )
            data = stream.read()
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")  # universal newlines
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise PrecastError(
            f"{path}: expected UTF-8 text, found the byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start}; fetch the file again."
        ) from error


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file.

    Raises:
        PrecastError: the file cannot be read, is not valid JSON, or contains something other than an object.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PrecastError(
            f"{path}: expected text, found an unpaired surrogate ({error.object[error.start]!a}); save the file again."
        ) from error
    # A number with thousands of digits raises a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise PrecastError(f"{path}: is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(value, dict):
        raise PrecastError(
            f"{path}: expected a JSON object, found {type(value).__name__}; fetch the file again."
        )
    return value


def optional_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file, or an empty object if the file is missing.

    Raises:
        PrecastError: as `read_json`.
    """
    return read_json(path) if plain_file(path) else {}


def slug(text: str) -> str:
    """Return a name suitable for a folder: lower case, with only letters, digits, ``.``, ``_`` and single ``-``."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._") or "model"


def spdx(licence: object) -> str | None:
    """Return the name of a known licence in SPDX's spelling, of another one unchanged; None without a licence."""
    if not isinstance(licence, str) or not licence.strip():
        return None
    return _SPDX.get(licence.strip().lower(), licence.strip())
