"""The local files of pulls, below ``pulled/`` in the cache folder.

::

    pieces/ab/abcd…        pieces that have arrived, until the artifact that they are for is complete
    folders/HASH.json      index of a pulled artifact and where it is: its pieces need not be fetched for another
    artifacts/KEY/SHA256/  artifacts pulled to be run from their URL, by their manifests' sha256
    urls/KEY/HASH          manifest's sha256 that a URL led to last, for when it cannot be reached

KEY is the sha256 of the public key that an artifact was checked with, or "unsigned". So a pull without a key, or with
another key, never replaces an artifact that was checked with a key.

All of it is a convenience that may be deleted at any time. Nothing read from it is used before it has been hashed.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..artifact import files
from ..artifact.errors import PrecastError
from ..artifact.manifest import MANIFEST_FILE
from .index import Index, Piece, parse_index

# Age at which a piece that is being written, and one that is waiting for the others, is nobody's any more.
_UNFINISHED_S, _ABANDONED_S = 3600, 30 * 24 * 3600
_Place = tuple[Path, int]
# Stands for a key's sha256 in unchecked pulls.
UNSIGNED = "unsigned"


def folder() -> Path:
    """Return the folder of all these files.

    Raises:
        PrecastError: others may write to it, so it is unsafe for pulling.
    """
    return files.trusted_cache("pulled")


@contextmanager
def keeping() -> Iterator[None]:
    """Turns what the system refuses while the block writes to the cache folder into a sentence.

    Raises:
        PrecastError: naming the folder.
    """
    try:
        yield
    except OSError as error:
        raise PrecastError(
            f"{folder()}: what arrives cannot be kept there ({error.strerror or error}); make room, or set"
            " PRECAST_CACHE to another folder."
        ) from None


def artifact_folder(manifest: str, key: str) -> Path:
    """Return the folder that an artifact with this manifest and key runs from."""
    return folder() / "artifacts" / key / manifest


# --- pieces -------------------------------------------------------------------------------------------------


def load_piece(piece: Piece) -> bytes | None:
    """A piece that has arrived; None where it has not, or is not what it should be."""
    try:
        with files.open_plain(folder() / piece.path) as file:
            return _checked(file.read(piece.bytes + 1), piece)
    except OSError:
        return None


def has_piece(piece: Piece) -> bool:
    """Whether a piece of this name and size has arrived."""
    try:
        return (folder() / piece.path).stat().st_size == piece.bytes
    except OSError:
        return False


def save_piece(piece: Piece, data: bytes) -> None:
    path = folder() / piece.path
    with keeping():
        files.make_private(path.parent)
        files.write_atomically(path, data)


def drop_pieces(index: Index) -> None:
    """Removes the pieces of an artifact that is complete, and what pulls left that never came to their end."""
    for piece in index.pieces.values():
        with suppress(OSError):
            (folder() / piece.path).unlink()
    now = time.time()
    for path in (folder() / "pieces").glob("*/*"):
        with suppress(OSError):
            if now - path.stat().st_mtime > (_UNFINISHED_S if path.name.startswith(".") else _ABANDONED_S):
                path.unlink()


def _checked(data: bytes, piece: Piece) -> bytes | None:
    return data if hashlib.sha256(data).hexdigest() == piece.sha256 else None


# --- artifacts that are here --------------------------------------------------------------------------------


def note_folder(path: Path, index: Index, key: str) -> None:
    """Record that the artifact of this index is in the folder `path`, and was checked with the key of this sha256."""
    note = {"folder": str(path.resolve()), "index": dataclasses.asdict(index), "key": key}
    _write_note("folders", _note_of(path), json.dumps(note))


def _note_of(path: Path) -> str:
    return f"{_hash(str(path.resolve()))}.json"


def checked_with(path: Path) -> tuple[str, str] | None:
    """Return the sha256 of the key and of the manifest with which a folder's artifact was checked when pulled.

    Return None if no key was used, or if the folder now holds another artifact.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, PrecastError):
        note = json.loads((folder() / "folders" / _note_of(path)).read_bytes())
        key, manifest = note["key"], note["index"]["manifest"]
        if key != UNSIGNED and files.sha256_of(files.member_path(path, MANIFEST_FILE)) == manifest:
            return key, manifest
    return None


def places(wanted: Mapping[str, Piece]) -> dict[str, _Place]:
    """Files and offsets where pieces may be found on this machine, by the piece's sha256."""
    found: dict[str, _Place] = {}
    for root, index in _noted():
        for name, file in index.files.items():
            at = 0
            for piece in file.pieces:
                if piece.sha256 in wanted:
                    found.setdefault(piece.sha256, (root.joinpath(*files.split_name(root, name)), at))
                at += piece.bytes
    return found


def read_place(place: _Place, piece: Piece) -> bytes | None:
    """The piece, if it is still there."""
    path, offset = place
    try:
        with files.open_plain(path) as file:
            file.seek(offset)
            return _checked(file.read(piece.bytes), piece)
    except OSError:
        return None


def _noted() -> Iterator[tuple[Path, Index]]:
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
    """Notes what a URL led to. The URL itself, which may hold secrets, is not written down."""
    _write_note(f"urls/{key}", _hash(url), manifest)


def last_of(url: str, key: str) -> Path | None:
    """Return the artifact that a URL last led to with this key, if it is still here."""
    with suppress(OSError, ValueError):
        manifest = (folder() / "urls" / key / _hash(url)).read_text("ascii").strip()
        root = artifact_folder(manifest, key)
        if len(manifest) == 64 and manifest.isalnum() and files.sha256_of(root / MANIFEST_FILE) == manifest:
            return root
    return None


def _write_note(kind: str, name: str, text: str) -> None:
    # Without the note something is fetched again, no more.
    with suppress(OSError):
        path = folder() / kind / name
        files.make_private(path.parent)
        files.write_atomically(path, text.encode())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
