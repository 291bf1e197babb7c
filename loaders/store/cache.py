"""The files that pulls store on this machine, below ``pulled/`` in the cache folder.

::

    pieces/ab/abcd…        pieces of incomplete artifacts
    folders/HASH.json      folder and index of a pulled artifact, so that other pulls can reuse its pieces
    artifacts/KEY/SHA256/  artifacts that run from their URLs, by the sha256 of their manifests
    urls/KEY/HASH          sha256 of the manifest last pulled from a URL, in case the store is unreachable

KEY is the sha256 of the public key that an artifact was checked with, or "unsigned". So a pull without a key, or with
another key, never replaces an artifact that was checked with a key.

Any of these files may be deleted at any time. Every file is hashed before it is used.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..artifact import cache_folder, files
from ..artifact.errors import PrecastError
from ..artifact.manifest import MANIFEST_FILE
from .index import Index, Piece, parse_index

# Age in seconds above which a partly written piece, or a piece of an incomplete artifact, is removed as orphaned.
_ORPHANED_PARTIAL_S, _ORPHANED_PIECE_S = 3600, 30 * 24 * 3600
# A file and an offset in it.
Place = tuple[Path, int]
# The value of KEY for pulls without a key.
UNSIGNED = "unsigned"


def folder() -> Path:
    """Return the folder of this module's files.

    Raises:
        PrecastError: other users may write to it.
    """
    return cache_folder.trusted_cache("pulled")


@contextmanager
def explaining_write_errors() -> Iterator[None]:
    """Turn an error of writing to the cache folder into a PrecastError.

    Raises:
        PrecastError: a write fails; the message names the cache folder.
    """
    try:
        yield
    except OSError as error:
        raise PrecastError(
            f"{folder()}: cannot be written to ({error.strerror or error}); make room, or set PRECAST_CACHE to another"
            " folder."
        ) from None


def artifact_folder(manifest: str, key: str) -> Path:
    """Return the folder of an artifact that runs from its URL.

    Args:
        manifest: sha256 of the artifact's manifest.
        key: sha256 of the key that the artifact was checked with, or `UNSIGNED`.
    """
    return folder() / "artifacts" / key / manifest


# --- pieces -------------------------------------------------------------------------------------------------


def load_piece(piece: Piece) -> bytes | None:
    """Return the contents of a piece; None if the piece has not arrived or is damaged."""
    try:
        with files.open_plain(folder() / piece.path) as file:
            return _if_intact(file.read(piece.bytes + 1), piece)
    except OSError:
        return None


def has_piece(piece: Piece) -> bool:
    """Return True if a piece of this name and size has arrived."""
    try:
        return (folder() / piece.path).stat().st_size == piece.bytes
    except OSError:
        return False


def save_piece(piece: Piece, data: bytes) -> None:
    """Save a piece that has arrived.

    Raises:
        PrecastError: the cache folder cannot be written to.
    """
    path = folder() / piece.path
    with explaining_write_errors():
        cache_folder.make_private(path.parent)
        files.write_atomically(path, data)


def drop_pieces(index: Index) -> None:
    """Remove the pieces of a complete artifact, and orphaned pieces of interrupted pulls."""
    for piece in index.pieces.values():
        with suppress(OSError):
            (folder() / piece.path).unlink()
    now = time.time()
    for path in (folder() / "pieces").glob("*/*"):
        with suppress(OSError):
            if now - path.stat().st_mtime > (
                _ORPHANED_PARTIAL_S if path.name.startswith(".") else _ORPHANED_PIECE_S
            ):
                path.unlink()


def _if_intact(data: bytes, piece: Piece) -> bytes | None:
    return data if hashlib.sha256(data).hexdigest() == piece.sha256 else None


# --- artifacts on this machine ------------------------------------------------------------------------------


def note_folder(path: Path, index: Index, key: str) -> None:
    """Record a pulled artifact.

    Args:
        path: the artifact's folder.
        index: the artifact's index.
        key: sha256 of the key that the artifact was checked with, or `UNSIGNED`.
    """
    note = {"folder": str(path.resolve()), "index": dataclasses.asdict(index), "key": key}
    _write_note("folders", _note_name(path), json.dumps(note))


def _note_name(path: Path) -> str:
    return f"{_hash(str(path.resolve()))}.json"


def checked_with(path: Path) -> tuple[str, str] | None:
    """Return the sha256 of the key that a pulled artifact was checked with, and of the artifact's manifest.

    Return None if no key was used, or if the folder now contains another artifact.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, PrecastError):
        note = json.loads((folder() / "folders" / _note_name(path)).read_bytes())
        key, manifest = note["key"], note["index"]["manifest"]
        if key != UNSIGNED and files.sha256_of(files.member_path(path, MANIFEST_FILE)) == manifest:
            return key, manifest
    return None


def places(wanted: Mapping[str, Piece]) -> dict[str, Place]:
    """Return places in pulled artifacts that may contain the wanted pieces, by the sha256 of the piece."""
    found: dict[str, Place] = {}
    for root, index in _noted_artifacts():
        for name, file in index.files.items():
            offset = 0
            for piece in file.pieces:
                if piece.sha256 in wanted:
                    found.setdefault(piece.sha256, (root.joinpath(*files.split_name(root, name)), offset))
                offset += piece.bytes
    return found


def read_place(place: Place, piece: Piece) -> bytes | None:
    """Return a piece from a file on this machine; None if the file no longer contains the piece."""
    path, offset = place
    try:
        with files.open_plain(path) as file:
            file.seek(offset)
            return _if_intact(file.read(piece.bytes), piece)
    except OSError:
        return None


def _noted_artifacts() -> Iterator[tuple[Path, Index]]:
    """Yield the folder and index of each recorded artifact; remove the record if the folder is gone."""
    for path in sorted((folder() / "folders").glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, PrecastError):
            note = json.loads(path.read_bytes())
            root = Path(note["folder"])
            if not os.path.isdir(root):
                path.unlink()
                continue
            yield root, parse_index(json.dumps(note["index"]).encode(), str(path))


# --- URLs ---------------------------------------------------------------------------------------------------


def note_url(url: str, manifest: str, key: str) -> None:
    """Record the manifest pulled from a URL. Only a hash of the URL is stored, because a URL may contain secrets."""
    _write_note(f"urls/{key}", _hash(url), manifest)


def last_artifact(url: str, key: str) -> Path | None:
    """Return the folder of the artifact last pulled from a URL with this key; None if no such folder exists."""
    with suppress(OSError, ValueError):
        manifest = (folder() / "urls" / key / _hash(url)).read_text("ascii").strip()
        root = artifact_folder(manifest, key)
        if len(manifest) == 64 and manifest.isalnum() and files.sha256_of(root / MANIFEST_FILE) == manifest:
            return root
    return None


def _write_note(kind: str, name: str, text: str) -> None:
    # Ignore errors, because a missing note only causes another download.
    with suppress(OSError):
        path = folder() / kind / name
        cache_folder.make_private(path.parent)
        files.write_atomically(path, text.encode())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
