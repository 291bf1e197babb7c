"""The index of an artifact in a store: the artifact's files, cut into pieces whose names are their sha256.

::

    STORE/NAME.json               the index of one artifact: its files, and the pieces of each file
    STORE/pieces/ab/abcd…         a piece; all artifacts of a store share it

A push writes the index after all pieces. A pull treats the index as untrusted. It first fetches only the manifest and
its signature, whose sizes are bounded, and verifies the signature if one is required. Then it compares every name, size
and hash in the index with the manifest.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..artifact.errors import PrecastError
from ..artifact.files import open_plain, split_name
from ..artifact.json_records import MAX_JSON_BYTES, from_json, parse_json
from ..artifact.manifest import MANIFEST_FILE, SIGNATURE_FILE, FileEntry, Manifest
from ..signing import MAX_SIGNATURE_BYTES

INDEX_VERSION = 1
# The size of a piece. It is so small that a changed tensor or a lost connection costs little, and so large that a
# transfer needs few requests.
PIECE_BYTES = 16 << 20
# The largest piece that a pull accepts, because another version of precast may cut larger pieces.
MAX_PIECE_BYTES = 64 << 20
# A tensor of at least this size begins a new piece, at any offset in the file.
_OWN_PIECE_BYTES = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_MAX_HEADER_BYTES = 16 << 20
_REMEDY = "push the artifact again"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of bytes of a file.

    Attributes:
        bytes: the piece's size.
        sha256: the piece's hash, which is also its name.
    """

    bytes: int
    sha256: str

    @property
    def path(self) -> str:
        """The piece's path in a store and in the cache folder."""
        return f"pieces/{self.sha256[:2]}/{self.sha256}"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of an artifact.

    Attributes:
        bytes: size of the whole file.
        sha256: hash of the whole file.
        pieces: the file's pieces, in order.
    """

    bytes: int
    sha256: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Index:
    """The files of an artifact, including the manifest and its signature.

    Attributes:
        index_version: version of this layout.
        manifest: sha256 of the manifest, which identifies the artifact.
        files: the files, by name.
    """

    index_version: int
    manifest: str
    files: Mapping[str, StoredFile]

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def pieces(self) -> dict[str, Piece]:
        """The distinct pieces, by sha256."""
        return {piece.sha256: piece for file in self.files.values() for piece in file.pieces}


def parse_index(data: bytes, where: str) -> Index:
    """Parse an index, and check everything that can be checked without the manifest.

    Args:
        data: contents of the file.
        where: beginning of error messages.

    Raises:
        PrecastError: the version is unknown, a key or value is wrong, or sizes do not add up.
    """
    value = parse_json(data, where, _REMEDY)
    version = value.get("index_version") if isinstance(value, dict) else None
    if version != INDEX_VERSION:
        found = f"version {version}" if type(version) is int else "none"
        raise PrecastError(
            f"{where}: expected an index of version {INDEX_VERSION}, found {found}; check the URL, or update precast."
        )
    index = from_json(Index, value, where, _REMEDY)
    for name, file in index.files.items():
        _check_file(name, file, where)
    if len({(p.sha256, p.bytes) for f in index.files.values() for p in f.pieces}) != len(index.pieces):
        raise PrecastError(f"{where}: one piece is listed with two sizes; push the artifact again.")
    _check_head(index, where)
    return index


def _check_file(name: str, file: StoredFile, where: str) -> None:
    split_name(where, name, _REMEDY)
    if not all(_SHA256.fullmatch(digest) for digest in (file.sha256, *(p.sha256 for p in file.pieces))):
        raise PrecastError(
            f"{where}: file {name!r}: expected a sha256 of 64 hex digits, found something else; push the artifact"
            " again."
        )
    if not all(1 <= piece.bytes <= MAX_PIECE_BYTES for piece in file.pieces):
        raise PrecastError(
            f"{where}: file {name!r}: expected pieces of 1 to {MAX_PIECE_BYTES} bytes, found other sizes; push the"
            " artifact again."
        )
    if (total := sum(piece.bytes for piece in file.pieces)) != file.bytes:
        raise PrecastError(
            f"{where}: file {name!r} has {file.bytes} bytes, but its pieces have {total}; push the"
            " artifact again."
        )


def _check_head(index: Index, where: str) -> None:
    manifest = index.files.get(MANIFEST_FILE)
    if manifest is None:
        raise PrecastError(f"{where}: {MANIFEST_FILE} is missing; push the artifact again.")
    if manifest.sha256 != index.manifest:
        raise PrecastError(f"{where}: {MANIFEST_FILE} is listed with two hashes; push the artifact again.")
    limits = {MANIFEST_FILE: MAX_JSON_BYTES, SIGNATURE_FILE: MAX_SIGNATURE_BYTES}
    for name, limit in limits.items():
        if name in index.files and index.files[name].bytes > limit:
            raise PrecastError(f"{where}: {name} is larger than {limit >> 20} MiB; push the artifact again.")


def check_against(index: Index, manifest: Manifest, where: str) -> None:
    """Check that an index has the manifest's files with the same sizes and hashes.

    Args:
        index: the index.
        manifest: the manifest.
        where: beginning of error messages.

    Raises:
        PrecastError: a file differs; the message names the first such file.
    """
    unlisted = (MANIFEST_FILE, SIGNATURE_FILE)
    stored = {
        n: FileEntry(bytes=f.bytes, sha256=f.sha256) for n, f in index.files.items() if n not in unlisted
    }
    for name in sorted({*stored, *manifest.files}):
        if name in unlisted or stored.get(name) != manifest.files.get(name):
            raise PrecastError(
                f"{where}: file {name!r} differs from the manifest's entry; push the artifact again."
            )


# --- cutting ------------------------------------------------------------------------------------------------


def lengths(size: int, starts: Sequence[int]) -> Iterator[int]:
    """Yield the lengths of the pieces of a file.

    Args:
        size: bytes of the file.
        starts: offsets where a new piece begins.
    """
    bounds = [0, *sorted({s for s in starts if 0 < s < size}), size]
    for begin, end in pairwise(bounds):
        for offset in range(begin, end, PIECE_BYTES):
            yield min(PIECE_BYTES, end - offset)


def tensor_starts(path: Path) -> list[int]:
    """Return the offsets at which large tensors of a safetensors file begin and end; none if the header is invalid.

    If pieces begin at these offsets, the pieces of a tensor do not depend on its position in the file. Two artifacts
    with different context lengths, or with one different tensor, then share the pieces of all equal tensors.
    """
    with open_plain(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER_BYTES:
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
