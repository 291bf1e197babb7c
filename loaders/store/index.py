"""What a store says of an artifact: its files, cut into pieces that are named by their sha256.

::

    STORE/NAME.json               the index of one artifact: files and the pieces that they are made of
    STORE/pieces/ab/abcd…         a piece; artifacts of one store that have it in common share it

An index is written when all its pieces are there. It is a stranger's text to whoever pulls: no name and no size in
it is used before it has been compared with the manifest, and the manifest with a key, where one is required.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..artifact.errors import PrecastError
from ..artifact.files import open_plain, split_name
from ..artifact.manifest import MANIFEST_FILE, SIGNATURE_FILE, FileEntry, Manifest
from ..artifact.record import MAX_JSON_BYTES, from_json, parse_json
from ..signing import MAX_SIGNATURE_BYTES

INDEX_VERSION = 1
# Small enough that an altered tensor costs little and a lost connection less, large enough that requests are few.
PIECE_BYTES = 16 << 20
# What a piece may have that another version of precast cut.
MOST_PIECE_BYTES = 64 << 20
# Tensors of at least this size begin a piece, wherever in the file they stand.
_OWN_PIECE_BYTES = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_MAX_HEADER = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Piece:
    bytes: int
    sha256: str

    @property
    def path(self) -> str:
        """Where it is, in a store and in the cache."""
        return f"pieces/{self.sha256[:2]}/{self.sha256}"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    bytes: int
    sha256: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Index:
    """All of an artifact's files, the manifest and its signature among them.

    Attributes:
        index_version: of this layout.
        manifest: the manifest's sha256, which names the artifact.
    """

    index_version: int
    manifest: str
    files: Mapping[str, StoredFile]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @property
    def pieces(self) -> dict[str, Piece]:
        """Every piece once, by its sha256."""
        return {piece.sha256: piece for file in self.files.values() for piece in file.pieces}


def parse_index(data: bytes, where: str) -> Index:
    """Parses and checks the text of an index, as far as it can be without the manifest.

    Raises:
        PrecastError: for another version, for any key or value out of place, and for sizes that do not add up.
    """
    value = parse_json(data, where)
    version = value.get("index_version") if isinstance(value, dict) else None
    if version != INDEX_VERSION:
        what = f"version {version}" if type(version) is int else "none"
        raise PrecastError(
            f"{where}: expected an index of version {INDEX_VERSION}, found {what}; check the URL, or update precast."
        )
    index = from_json(Index, value, where)
    for name, file in index.files.items():
        _check_file(name, file, where)
    if len({(p.sha256, p.bytes) for f in index.files.values() for p in f.pieces}) != len(index.pieces):
        raise PrecastError(f"{where}: one piece has two sizes; push the artifact again.")
    _check_head(index, where)
    return index


def _check_file(name: str, file: StoredFile, where: str) -> None:
    split_name(where, name)
    if not all(_SHA256.fullmatch(digest) for digest in (file.sha256, *(p.sha256 for p in file.pieces))):
        raise PrecastError(f"{where}: file {name!r}: expected sha256 as 64 hex digits, found something else.")
    if not all(1 <= piece.bytes <= MOST_PIECE_BYTES for piece in file.pieces):
        raise PrecastError(
            f"{where}: file {name!r}: expected pieces of 1 to {MOST_PIECE_BYTES} bytes, found others."
        )
    if (total := sum(piece.bytes for piece in file.pieces)) != file.bytes:
        raise PrecastError(f"{where}: file {name!r} has {file.bytes} bytes, its pieces have {total}.")


def _check_head(index: Index, where: str) -> None:
    manifest = index.files.get(MANIFEST_FILE)
    if manifest is None or manifest.sha256 != index.manifest or manifest.bytes > MAX_JSON_BYTES:
        raise PrecastError(
            f"{where}: it names no {MANIFEST_FILE} of a possible size; push the artifact again."
        )
    if SIGNATURE_FILE in index.files and index.files[SIGNATURE_FILE].bytes > MAX_SIGNATURE_BYTES:
        raise PrecastError(
            f"{where}: {SIGNATURE_FILE} is larger than any signature; push the artifact again."
        )


def check_against(index: Index, manifest: Manifest, where: str) -> None:
    """The files of an index must be the manifest's, to the byte.

    Raises:
        PrecastError: naming the first that is not.
    """
    beside = (MANIFEST_FILE, SIGNATURE_FILE)
    stored = {n: FileEntry(bytes=f.bytes, sha256=f.sha256) for n, f in index.files.items() if n not in beside}
    for name in sorted({*stored, *manifest.files}):
        if name in beside or stored.get(name) != manifest.files.get(name):
            raise PrecastError(
                f"{where}: its file {name!r} is not the one that the manifest lists; push the artifact again."
            )


# --- cutting ------------------------------------------------------------------------------------------------


def lengths(size: int, starts: Sequence[int]) -> Iterator[int]:
    """Lengths of the pieces of a file of `size` bytes, with a new piece at each of `starts`."""
    bounds = [0, *sorted({s for s in starts if 0 < s < size}), size]
    for begin, end in pairwise(bounds):
        for at in range(begin, end, PIECE_BYTES):
            yield min(PIECE_BYTES, end - at)


def tensor_starts(path: Path) -> list[int]:
    """Where large tensors of a safetensors file begin and end.

    Pieces cut there are the same in another file with the same tensor, wherever it stands: an artifact with a longer
    context, or with one tensor more, shares all other weights. A file that is not understood gives none.
    """
    with open_plain(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            return []
        text = file.read(length)
    try:
        header = parse_json(text, str(path))
        places = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        large = [(begin, end) for begin, end in places if end - begin >= _OWN_PIECE_BYTES]
        if not all(type(offset) is int for place in large for offset in place):
            raise ValueError
    except (AttributeError, KeyError, PrecastError, TypeError, ValueError):
        return []
    return [8 + length + offset for place in large for offset in place]
