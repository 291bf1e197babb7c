"""Push an artifact from a folder to a store."""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..artifact.errors import PrecastError
from ..artifact.files import member_path, open_plain, read
from ..artifact.json_records import MAX_JSON_BYTES
from ..artifact.manifest import MANIFEST_FILE, SIGNATURE_FILE, WEIGHTS_FILE, FileEntry
from ..artifact.manifest_parser import parse_manifest
from ..locate import find_artifact
from ..progress import Progress, Step
from ..signing import MAX_SIGNATURE_BYTES, signed_digest
from .index import INDEX_VERSION, Index, Piece, StoredFile, lengths, tensor_starts
from .remote import Store, open_store
from .transfer import Transfer, map_in_threads, shown, summarise


def push(path: Path, url: str, *, rehash: bool = False, progress: Progress | None = None) -> Transfer:
    """Send an artifact to a store.

    Each file is hashed during the transfer, and its hash is compared with the manifest. The index is sent last, because
    it makes the artifact visible in the store. A push removes nothing from a store.

    Args:
        path: the artifact's folder, or a folder that contains exactly one artifact.
        url: the store's URL, followed by the artifact's name in the store.
        rehash: read back the pieces that are already in the store, and send damaged pieces again.
        progress: receives the number of bytes done; None for a display on standard error.

    Raises:
        PrecastError: the artifact is incomplete, or the store refuses it.
    """
    root = find_artifact(path)
    store = open_store(url)
    contents = _contents(root)
    files: dict[str, StoredFile] = {}
    total, done, sent = sum(content.entry.bytes for content in contents), 0, []
    pieces = _cut_all(root, contents, files)
    with (
        shown(progress) as show,
        closing(map_in_threads(lambda item: _send(store, *item, rehash), pieces)) as results,
    ):
        for piece, was_sent in results:
            sent += [piece] if was_sent else []
            done += piece.bytes
            show(Step(text="pushing", done=done, total=total, unit="bytes"))
        # A piece that occurs several times was counted once, so the sum may be below the total.
        show(Step(text="pushing", done=total, total=total, unit="bytes"))
    index = Index(index_version=INDEX_VERSION, manifest=files[MANIFEST_FILE].sha256, files=files)
    store.write(f"{store.name}.json", (json.dumps(dataclasses.asdict(index)) + "\n").encode())
    return summarise(root, store, index, sent)


def _send(store: Store, piece: Piece, data: bytes, rehash: bool) -> tuple[Piece, bool]:
    """Send a piece that the store lacks, or with `rehash` a piece that is damaged in the store.

    Returns:
        The piece, and True if it was sent.
    """
    if store.size(piece.path) == piece.bytes and not (rehash and _is_damaged(store, piece)):
        return piece, False
    store.write(piece.path, data)
    return piece, True


def _is_damaged(store: Store, piece: Piece) -> bool:
    return hashlib.sha256(store.read(piece.path, piece.bytes)).hexdigest() != piece.sha256


@dataclass(frozen=True, kw_only=True)
class _Content:
    """A file to send.

    Attributes:
        data: the file's contents; None for a file that is read later, when it is cut into pieces.
    """

    name: str
    entry: FileEntry
    data: bytes | None = None


def _contents(root: Path) -> list[_Content]:
    manifest = read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
    listed = parse_manifest(manifest, str(root / MANIFEST_FILE)).files
    contents = [_in_memory(MANIFEST_FILE, manifest)]
    if os.path.lexists(root / SIGNATURE_FILE):
        signature = read(root, SIGNATURE_FILE, limit=MAX_SIGNATURE_BYTES)
        if signed_digest(signature, str(root)) != contents[0].entry.sha256:
            raise PrecastError(
                f"{root}: {SIGNATURE_FILE} does not match {MANIFEST_FILE}, which has changed since it was"
                " signed; sign the artifact again, or remove the signature."
            )
        contents.append(_in_memory(SIGNATURE_FILE, signature))
    return contents + [_Content(name=name, entry=entry) for name, entry in sorted(listed.items())]


def _in_memory(name: str, data: bytes) -> _Content:
    entry = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return _Content(name=name, entry=entry, data=data)


def _cut_all(
    root: Path, contents: Sequence[_Content], files: dict[str, StoredFile]
) -> Iterator[tuple[Piece, bytes]]:
    """Yield each distinct piece once, with its bytes. After the pieces of a file, add the file to `files`."""
    seen = set()
    for content in contents:
        pieces = []
        for piece, data in _cut(root, content):
            pieces.append(piece)
            if piece.sha256 not in seen:
                seen.add(piece.sha256)
                yield piece, data
        files[content.name] = StoredFile(
            bytes=content.entry.bytes, sha256=content.entry.sha256, pieces=tuple(pieces)
        )


def _cut(root: Path, content: _Content) -> Iterator[tuple[Piece, bytes]]:
    """Yield the pieces of a file with their bytes. After the last piece, check the hash of the file.

    Raises:
        PrecastError: the hash differs from the hash in the manifest.
    """
    path, size = member_path(root, content.name), content.entry.bytes
    starts = tensor_starts(path) if content.name == WEIGHTS_FILE else []
    digest = hashlib.sha256()
    with open_plain(path) if content.data is None else io.BytesIO(content.data) as file:
        for length in lengths(size, starts):
            data = file.read(length)
            if not data:
                break
            digest.update(data)
            yield Piece(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()), data
        if digest.hexdigest() != content.entry.sha256 or file.read(1):
            raise PrecastError(
                f"{root}: file {content.name!r} is damaged: its hash differs from the manifest's; copy or export the"
                " artifact again."
            )
