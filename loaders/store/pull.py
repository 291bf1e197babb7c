"""From a store to a folder."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import date
from pathlib import Path

from ..artifact import files, folders
from ..artifact.errors import PrecastError
from ..artifact.manifest import MANIFEST_FILE, SIGNATURE_FILE, WEIGHTS_FILE, FileEntry
from ..artifact.manifest_parser import parse_manifest
from ..artifact.pages import HugePageWriter
from ..artifact.record import MAX_JSON_BYTES
from ..progress import Progress, Step
from ..signing import check_bytes, fingerprint, signed_digest
from . import cache
from .index import Index, Piece, StoredFile, check_against, parse_index
from .remote import Missing, Store, Unreachable, open_store
from .transfer import Moved, in_parallel, moved, showing

_Log = Callable[[str], None]


def pull(
    url: str,
    folder: Path | None,
    *,
    overwrite: bool,
    require_signature: Path | None,
    log: _Log,
    progress: Progress | None = None,
) -> Moved:
    """Fetches an artifact into a folder, which appears when all of it has arrived and every hash has matched.

    Args:
        url: as it was pushed to.
        folder: to write; ``artifacts/NAME`` by default. Where it holds this very artifact already, nothing is done.
        overwrite: replace another artifact in the folder.
        require_signature: file of a public key; no more than manifest and signature is fetched before it is checked.
        log: where messages go.
        progress: receives the number of bytes done; shown on standard error by default.

    Raises:
        PrecastError: when the store cannot be reached, holds no such artifact, or one that is not whole, or when it is
            not signed as required.
    """
    holder = _holder(require_signature)
    store = open_store(url)
    index = _read_index(store)
    root = folder or Path("artifacts") / store.name
    with _alone(root, log):
        manifest, signature, fetched = _head(store, index, require_signature)
        if not _is_there(root, index, manifest):
            folders.check_free(root, overwrite)
            if require_signature is None:
                _keep_what_was_checked(root)
            fetched += _receive_or_find(store, index, root, holder, overwrite, progress, manifest)
        elif require_signature is not None or cache.checked_with(root) is None:
            if signature is not None:
                _put_signature(root, signature)
            cache.note_folder(root, index, holder)
    return moved(root, store, index, fetched)


def _holder(key: Path | None) -> str:
    """Return the name of the cache's part for a key.

    Raises:
        PrecastError: the file does not contain a key.
    """
    return cache.UNSIGNED if key is None else fingerprint(key)


def _keep_what_was_checked(root: Path) -> None:
    """Refuse to replace an artifact that was checked with a key by an unchecked one.

    Raises:
        PrecastError: names the key.
    """
    if (checked := cache.checked_with(root)) is not None:
        raise PrecastError(
            f"{root}: its artifact was checked with the key of sha256 {checked[0]:.12}… when it was pulled, and is not"
            " replaced by one that is not checked; name a key with --require-signature, or another folder with -o."
        )


def fetch(url: str, *, require_signature: Path | None, log: _Log) -> Path:
    """The artifact that a URL leads to, in the cache folder; fetched unless it is there already.

    A copy of which a file has changed is mended. A store that cannot be reached is no reason to stop where it was
    reached before: what the URL led to last is taken, and said.

    Raises:
        PrecastError: as `pull`.
    """
    holder = _holder(require_signature)
    store, last = open_store(url), cache.last_of(url, holder)
    try:
        index = _read_index(store, attempts=4 if last is None else 1)
    except Unreachable as error:
        if last is None:
            raise
        pulled = date.fromtimestamp((last / MANIFEST_FILE).stat().st_mtime)
        log(f"{error} Going on with what was pulled on {pulled}.")
        return last
    root = cache.artifact_folder(index.manifest, holder)
    if not _is_whole(root, index):
        with cache.keeping():
            _fill_cache(store, index, root, require_signature, holder, log)
    elif SIGNATURE_FILE in index.files:
        _renew_signature(store, index, root, require_signature, log)
    cache.note_url(url, index.manifest, holder)
    return root


def _fill_cache(store: Store, index: Index, root: Path, key: Path | None, holder: str, log: _Log) -> None:
    with _alone(root, log):
        *_, fetched = _head(store, index, key)
        if _is_whole(root, index):  # another process was quicker
            return
        if not (root / MANIFEST_FILE).exists():
            shutil.rmtree(root, ignore_errors=True)
        files.make_private(root.parent)
        fetched += _receive(store, index, root, holder, overwrite=True, progress=None)
    size = sum(piece.bytes for piece in fetched)
    log(f"{store}: pulled {size / 1e6:,.1f} MB into {root}")


# --- before anything is written -----------------------------------------------------------------------------


def _read_index(store: Store, *, attempts: int = 4) -> Index:
    name = f"{store.name}.json"
    try:
        data = store.read(name, MAX_JSON_BYTES, attempts=attempts)
    except Missing:
        raise Missing(
            f"{store}: there is no artifact of this name; check the URL, or put one there with precast push."
        ) from None
    return parse_index(data, f"{store}: {name}")


def _head(store: Store, index: Index, key: Path | None) -> tuple[bytes, bytes | None, list[Piece]]:
    """The bytes of manifest and signature, checked against key and index, and the pieces fetched for that."""
    fetched: list[Piece] = []
    manifest = _join(store, index.files[MANIFEST_FILE], fetched)
    signature = _signature(store, index, manifest, key, fetched)
    check_against(index, parse_manifest(manifest, f"{store}: {MANIFEST_FILE}"), f"{store}: {store.name}.json")
    return manifest, signature, fetched


def _signature(
    store: Store, index: Index, manifest: bytes, key: Path | None, fetched: list[Piece]
) -> bytes | None:
    """The store's signature, checked with the key; without one it must at least be over this manifest."""
    stored = index.files.get(SIGNATURE_FILE)
    signature = None if stored is None else _join(store, stored, fetched)
    if key is not None:
        check_bytes(manifest, signature, key, str(store))
    elif signature is not None and signed_digest(signature, str(store)) != index.manifest:
        raise PrecastError(
            f"{store}: {SIGNATURE_FILE} is not over this {MANIFEST_FILE}; have the artifact signed and pushed again."
        )
    return signature


def _join(store: Store, file: StoredFile, fetched: list[Piece]) -> bytes:
    """A small file, whole."""
    parts = []
    for piece in file.pieces:
        data, was_fetched = _obtain(store, piece)
        fetched += [piece] if was_fetched else []
        parts.append(data)
    if hashlib.sha256(contents := b"".join(parts)).hexdigest() != file.sha256:
        raise PrecastError(
            f"{store}: its index names other pieces than its files have; push the artifact again."
        )
    return contents


def _has_sizes(root: Path, index: Index) -> bool:
    """Whether every file is in the folder, as far as names and sizes tell."""
    try:
        manifest = files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
        return hashlib.sha256(manifest).hexdigest() == index.manifest and all(
            files.member_path(root, name).stat().st_size == file.bytes
            for name, file in index.files.items()
            if name != SIGNATURE_FILE
        )
    except (OSError, PrecastError):
        return False


def _is_whole(root: Path, index: Index) -> bool:
    """Whether every file is what it should be. What was hashed before and has not changed since is not read again."""
    if not _has_sizes(root, index):
        return False
    try:
        for name, file in index.files.items():
            if name not in (MANIFEST_FILE, SIGNATURE_FILE):
                entry = FileEntry(bytes=file.bytes, sha256=file.sha256)
                files.open_checked(root, name, entry, rehash=False).close()
    except PrecastError:
        return False
    return True


def _is_there(root: Path, index: Index, manifest: bytes) -> bool:
    """Whether the folder holds this artifact, every byte of it."""
    if not _has_sizes(root, index):
        return False
    listed = parse_manifest(manifest, str(root)).files
    try:
        return all(files.sha256_of(files.member_path(root, n)) == entry.sha256 for n, entry in listed.items())
    except (OSError, PrecastError):
        return False


# --- pieces -------------------------------------------------------------------------------------------------


def _obtain(
    store: Store, piece: Piece, places: Mapping[str, tuple[Path, int]] | None = None
) -> tuple[bytes, bool]:
    """A piece from wherever it is nearest, and whether that was the store.

    `places` are those where it may be on this machine, looked up if not given.
    """
    if (data := cache.load_piece(piece)) is not None:
        return data, False
    place = (cache.places({piece.sha256: piece}) if places is None else places).get(piece.sha256)
    data = None if place is None else cache.read_place(place, piece)
    fetched = data is None
    if data is None:
        data = _fetch(store, piece)
    cache.save_piece(piece, data)
    return data, fetched


def _fetch(store: Store, piece: Piece) -> bytes:
    # Twice, for one that was damaged on the way, or was just being written.
    for _ in range(2):
        data = store.read(piece.path, piece.bytes)
        if len(data) == piece.bytes and hashlib.sha256(data).hexdigest() == piece.sha256:
            return data
    raise PrecastError(
        f"{store}: {piece.path:.24}… is not what its name says, it is altered or cut short; have the artifact pushed"
        " again with precast push --verify."
    )


def _receive(
    store: Store, index: Index, root: Path, holder: str, overwrite: bool, progress: Progress | None
) -> list[Piece]:
    """Fills the folder, and returns the pieces that were fetched."""
    pieces = index.pieces
    total, done, fetched = sum(piece.bytes for piece in pieces.values()), 0, []
    _check_room(store, index, root)
    places = cache.places(pieces)

    def obtain(piece: Piece) -> tuple[Piece, bool]:
        return piece, _obtain(store, piece, places)[1]

    with (
        showing(progress) as show,
        closing(in_parallel(obtain, iter(pieces.values()))) as results,
    ):
        for piece, was_fetched in results:
            fetched += [piece] if was_fetched else []
            done += piece.bytes
            show(Step(text="pulling", done=done, total=total, unit="bytes"))
    with folders.new_folder(root, overwrite=overwrite) as temporary:
        for name, file in index.files.items():
            _write(store, file, temporary.joinpath(*files.split_name(root, name)), name)
    files.record_hash(root / WEIGHTS_FILE, index.files[WEIGHTS_FILE].sha256)
    # First that these pieces are here, then away with their copies: another pull finds them at any moment.
    cache.note_folder(root, index, holder)
    cache.drop_pieces(index)
    return fetched


def _receive_or_find(
    store: Store,
    index: Index,
    root: Path,
    holder: str,
    overwrite: bool,
    progress: Progress | None,
    manifest: bytes,
) -> list[Piece]:
    """As `_receive`; that somebody else, with another cache folder, put the same artifact there first is as good."""
    try:
        return _receive(store, index, root, holder, overwrite, progress)
    except PrecastError:
        if not _is_there(root, index, manifest):
            raise
        return []


def _write(store: Store, file: StoredFile, path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("xb") as out:
        writer, at = HugePageWriter(out, file.bytes), 0
        for piece in file.pieces:
            data, _ = _obtain(store, piece)
            digest.update(data)
            writer.write(at, data)
            at += len(data)
    if digest.hexdigest() != file.sha256:
        raise PrecastError(
            f"{store}: the pieces of {name!r} do not make the file that the manifest lists; push the artifact again."
        )


def _check_room(store: Store, index: Index, root: Path) -> None:
    """Before the first byte: pieces are kept until the folder is complete, so both must fit."""
    missing = sum(piece.bytes for piece in index.pieces.values() if not cache.has_piece(piece))
    needed: dict[int, list] = {}
    for folder, size in ((cache.folder(), missing), (root, index.bytes)):
        there = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.is_dir())
        place = needed.setdefault(there.stat().st_dev, [there, 0])
        place[1] += size
    for there, size in needed.values():
        free = shutil.disk_usage(there).free
        if size > free:
            raise PrecastError(
                f"{store}: pulling it takes {size / 1e6:,.1f} MB in {there}, where {free / 1e6:,.1f} MB are free; make"
                " room, or choose other folders: with -o, and with PRECAST_CACHE for what is kept meanwhile."
            )


# --- in the folder ------------------------------------------------------------------------------------------


def _renew_signature(store: Store, index: Index, root: Path, key: Path | None, log: _Log) -> None:
    """An artifact may be signed after it was pulled first. What does not hold replaces nothing, and is said."""
    with suppress(OSError, PrecastError):
        if files.sha256_of(files.member_path(root, SIGNATURE_FILE)) == index.files[SIGNATURE_FILE].sha256:
            return
    try:
        manifest = files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
        if (signature := _signature(store, index, manifest, key, [])) is not None:
            _put_signature(root, signature)
    except PrecastError as error:
        log(f"{error} Going on with what was pulled before.")


def _put_signature(root: Path, signature: bytes) -> None:
    path = root / SIGNATURE_FILE
    try:
        if path.is_file() and not path.is_symlink() and path.read_bytes() == signature:
            return
        files.write_atomically(path, signature)
        path.chmod((root / MANIFEST_FILE).stat().st_mode & 0o777)
    except OSError as error:
        raise PrecastError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder's permissions and its disk."
        ) from None


@contextmanager
def _alone(root: Path, log: _Log) -> Iterator[None]:
    """Of several processes that pull to one folder, the first fetches; the others wait, and find it there."""
    import fcntl

    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()
    path = cache.folder() / "locks" / name
    with cache.keeping():
        files.make_private(path.parent)
        file = path.open("w")
    with file:
        # A file system without locks: then each fetches, and all but the first find that it is there.
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"{root}: another process is pulling to it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
