"""Pull an artifact from a store into a folder."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from ..artifact import cache_folder, files, folders
from ..artifact.errors import PrecastError
from ..artifact.json_records import MAX_JSON_BYTES
from ..artifact.manifest import MANIFEST_FILE, SIGNATURE_FILE, WEIGHTS_FILE, FileEntry
from ..artifact.manifest_parser import parse_manifest
from ..artifact.pages import HugePageWriter
from ..progress import Progress, Step
from ..signing import check_bytes, fingerprint, signed_digest
from . import cache
from .index import Index, Piece, StoredFile, check_against, parse_index
from .remote import NotFoundError, Store, UnreachableError, open_store
from .transfer import Transfer, map_in_threads, shown, summarise

_Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Pull:
    """A pull of one artifact into one folder.

    Attributes:
        store: the store.
        index: the artifact's index in the store, not yet compared with the manifest.
        root: the folder.
        key: file of the public key that the artifact must be signed with, or None.
        key_name: the key's name in the cache folder.
    """

    store: Store
    index: Index
    root: Path
    key: Path | None
    key_name: str


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The manifest and its signature, checked with the key and against the index.

    Attributes:
        manifest: contents of the manifest.
        signature: contents of the signature; None if there is none.
        fetched: the pieces that were fetched for these two files.
    """

    manifest: bytes
    signature: bytes | None
    fetched: list[Piece]


def pull(
    url: str,
    folder: Path | None,
    *,
    overwrite: bool,
    require_signature: Path | None,
    log: _Log,
    progress: Progress | None = None,
) -> Transfer:
    """Fetch an artifact into a folder. The folder appears once all bytes have arrived and all hashes match.

    Args:
        url: the URL that the artifact was pushed to.
        folder: folder to write; ``artifacts/NAME`` by default. If it contains this artifact already, only the manifest
            and the signature are fetched.
        overwrite: replace another artifact in the folder.
        require_signature: file of the public key that the artifact must be signed with, or None. Only the manifest and
            the signature are fetched before the check.
        log: receives messages.
        progress: receives the number of bytes done; None for a display on standard error.

    Raises:
        PrecastError: the store is unreachable, or its artifact is missing, incomplete, or not signed as required.
    """
    key_name = _key_name(require_signature)
    store = open_store(url)
    index = _read_index(store)
    root = folder or Path("artifacts") / store.name
    job = _Pull(store=store, index=index, root=root, key=require_signature, key_name=key_name)
    with _locked(root, log):
        head = _fetch_head(job)
        fetched = head.fetched
        if not _is_complete(root, index, head.manifest):
            folders.check_free(root, overwrite)
            if require_signature is None:
                _refuse_to_replace_checked(root)
            fetched = fetched + _receive_unless_complete(job, overwrite, progress, head.manifest)
        elif require_signature is not None or cache.checked_with(root) is None:
            if head.signature is not None:
                _write_signature(root, head.signature)
            cache.note_folder(root, index, key_name)
    return summarise(root, store, index, fetched)


def _key_name(key: Path | None) -> str:
    """Return a key's name in the cache folder.

    Raises:
        PrecastError: the file does not contain a key.
    """
    return cache.UNSIGNED if key is None else fingerprint(key)


def _refuse_to_replace_checked(root: Path) -> None:
    """Refuse to replace an artifact that was verified with a key, if the new artifact is unverified.

    Raises:
        PrecastError: the folder contains an artifact that was verified with a key; the message names the key.
    """
    if (checked := cache.checked_with(root)) is not None:
        raise PrecastError(
            f"{root}: the artifact here was verified with a key (sha256 {checked[0]:.12}…) when it was pulled, and an"
            " unverified artifact cannot replace it; name a key with --require-signature, or another folder with -o."
        )


def fetch(url: str, *, require_signature: Path | None, log: _Log, progress: Progress | None = None) -> Path:
    """Return the cached folder of a URL's artifact. Pull the artifact if it is not in the cache.

    Damaged files are fetched again. If the store is unreachable, the artifact last pulled from the URL is used, and
    a message says so.

    Args:
        url: the URL that the artifact was pushed to.
        require_signature: as for `pull`.
        log: receives messages.
        progress: as for `pull`.

    Raises:
        PrecastError: see `pull`.
    """
    key_name = _key_name(require_signature)
    store, last = open_store(url), cache.last_artifact(url, key_name)
    try:
        index = _read_index(store, attempts=4 if last is None else 1)
    except UnreachableError as error:
        if last is None:
            raise
        pulled = date.fromtimestamp((last / MANIFEST_FILE).stat().st_mtime)
        log(f"{error} Using the artifact that was pulled on {pulled}.")
        return last
    root = cache.artifact_folder(index.manifest, key_name)
    job = _Pull(store=store, index=index, root=root, key=require_signature, key_name=key_name)
    if not _is_intact(root, index):
        with cache.explaining_write_errors():
            _fill_cache(job, log, progress)
    elif SIGNATURE_FILE in index.files:
        _renew_signature(job, log)
    cache.note_url(url, index.manifest, key_name)
    return root


def _fill_cache(job: _Pull, log: _Log, progress: Progress | None) -> None:
    root = job.root
    with _locked(root, log):
        fetched = _fetch_head(job).fetched
        if _is_intact(root, job.index):  # another process has pulled it in the meantime
            return
        if not (root / MANIFEST_FILE).exists():
            shutil.rmtree(root, ignore_errors=True)
        cache_folder.make_private(root.parent)
        fetched = fetched + _receive(job, overwrite=True, progress=progress)
    size = sum(piece.bytes for piece in fetched)
    log(f"{job.store}: pulled {size / 1e6:,.1f} MB into {root}")


# --- before anything is written -----------------------------------------------------------------------------


def _read_index(store: Store, *, attempts: int = 4) -> Index:
    name = f"{store.name}.json"
    try:
        data = store.read(name, MAX_JSON_BYTES, attempts=attempts)
    except NotFoundError:
        raise NotFoundError(
            f"{store}: there is no artifact of this name; check the URL, or push an artifact there with precast push."
        ) from None
    return parse_index(data, f"{store}: {name}")


def _fetch_head(job: _Pull) -> _Head:
    store, index = job.store, job.index
    fetched: list[Piece] = []
    manifest = _join(store, index.files[MANIFEST_FILE], fetched)
    signature = _checked_signature(job, manifest, fetched)
    check_against(index, parse_manifest(manifest, f"{store}: {MANIFEST_FILE}"), f"{store}: {store.name}.json")
    return _Head(manifest=manifest, signature=signature, fetched=fetched)


def _checked_signature(job: _Pull, manifest: bytes, fetched: list[Piece]) -> bytes | None:
    """Check the store's signature with the key, or without a key only against the manifest, and return it.

    Args:
        job: the pull.
        manifest: contents of the manifest.
        fetched: receives the pieces that are fetched.

    Raises:
        PrecastError: the signature does not match, or the key requires a signature and there is none.
    """
    store, stored = job.store, job.index.files.get(SIGNATURE_FILE)
    signature = None if stored is None else _join(store, stored, fetched)
    if job.key is not None:
        check_bytes(manifest, signature, job.key, str(store))
    elif signature is not None and signed_digest(signature, str(store)) != job.index.manifest:
        raise PrecastError(
            f"{store}: {SIGNATURE_FILE} does not match the {MANIFEST_FILE} in the store; sign the artifact and push it"
            " again."
        )
    return signature


def _join(store: Store, file: StoredFile, fetched: list[Piece]) -> bytes:
    """Return the contents of a small file. Append the pieces that came from the store to `fetched`."""
    parts = []
    for piece in file.pieces:
        data, was_fetched = _obtain(store, piece)
        fetched += [piece] if was_fetched else []
        parts.append(data)
    if hashlib.sha256(contents := b"".join(parts)).hexdigest() != file.sha256:
        raise PrecastError(
            f"{store}: the pieces of {MANIFEST_FILE} or its signature do not match the file's hash; push the artifact"
            " again."
        )
    return contents


def _has_sizes(root: Path, index: Index) -> bool:
    """Return True if the folder contains the index's manifest, and all files of the index in their listed sizes."""
    try:
        manifest = files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
        return hashlib.sha256(manifest).hexdigest() == index.manifest and all(
            files.member_path(root, name).stat().st_size == file.bytes
            for name, file in index.files.items()
            if name != SIGNATURE_FILE
        )
    except (OSError, PrecastError):
        return False


def _is_intact(root: Path, index: Index) -> bool:
    """Return True if every file matches its hash in the index. Files unchanged since their last hashing are skipped."""
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


def _is_complete(root: Path, index: Index, manifest: bytes) -> bool:
    """Hash every file; return True if all files match their hashes in the manifest."""
    if not _has_sizes(root, index):
        return False
    listed = parse_manifest(manifest, str(root)).files
    try:
        return all(files.sha256_of(files.member_path(root, n)) == entry.sha256 for n, entry in listed.items())
    except (OSError, PrecastError):
        return False


# --- pieces -------------------------------------------------------------------------------------------------


def _obtain(
    store: Store, piece: Piece, places: Mapping[str, cache.Place] | None = None
) -> tuple[bytes, bool]:
    """Return the bytes of a piece from this machine or from the store, and True if the store sent them.

    Args:
        store: the store.
        piece: the piece.
        places: the result of `cache.places` for this piece; None to call it.
    """
    if (data := cache.load_piece(piece)) is not None:
        return data, False
    place = (cache.places({piece.sha256: piece}) if places is None else places).get(piece.sha256)
    data = None if place is None else cache.read_place(place, piece)
    was_fetched = data is None
    if data is None:
        data = _download(store, piece)
    cache.save_piece(piece, data)
    return data, was_fetched


def _download(store: Store, piece: Piece) -> bytes:
    # Retry once, because the piece may have been damaged in transit, or read while it was being written.
    for _ in range(2):
        data = store.read(piece.path, piece.bytes)
        if len(data) == piece.bytes and hashlib.sha256(data).hexdigest() == piece.sha256:
            return data
    raise PrecastError(
        f"{store}: {piece.path:.24}… is damaged: its hash differs from its name; push the artifact again with precast"
        " push --rehash."
    )


def _receive(job: _Pull, *, overwrite: bool, progress: Progress | None) -> list[Piece]:
    """Fill the folder, and return the pieces that were fetched."""
    store, index, root = job.store, job.index, job.root
    pieces = index.pieces
    total, done, fetched = sum(piece.bytes for piece in pieces.values()), 0, []
    _check_room(store, index, root)
    places = cache.places(pieces)

    def obtain(piece: Piece) -> tuple[Piece, bool]:
        return piece, _obtain(store, piece, places)[1]

    with (
        shown(progress) as show,
        closing(map_in_threads(obtain, iter(pieces.values()))) as results,
    ):
        for piece, was_fetched in results:
            fetched += [piece] if was_fetched else []
            done += piece.bytes
            show(Step(text="pulling", done=done, total=total, unit="bytes"))
    with folders.new_folder(root, overwrite=overwrite) as temporary:
        for name, file in index.files.items():
            _write(store, file, temporary.joinpath(*files.split_name(root, name)), name)
    files.record_hash(root / WEIGHTS_FILE, index.files[WEIGHTS_FILE].sha256)
    # Record the folder before dropping the pieces, so that another pull can find the bytes of each piece at any moment.
    cache.note_folder(root, index, job.key_name)
    cache.drop_pieces(index)
    return fetched


def _receive_unless_complete(
    job: _Pull, overwrite: bool, progress: Progress | None, manifest: bytes
) -> list[Piece]:
    """Receive the artifact. Ignore an error if another process, with another cache folder, has completed the folder."""
    try:
        return _receive(job, overwrite=overwrite, progress=progress)
    except PrecastError:
        if not _is_complete(job.root, job.index, manifest):
            raise
        return []


def _write(store: Store, file: StoredFile, path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("xb") as out:
        writer, offset = HugePageWriter(out, file.bytes), 0
        for piece in file.pieces:
            data, _ = _obtain(store, piece)
            digest.update(data)
            writer.write(offset, data)
            offset += len(data)
    if digest.hexdigest() != file.sha256:
        raise PrecastError(
            f"{store}: the pieces of {name!r} do not match the file's hash in the manifest; push the artifact again."
        )


def _check_room(store: Store, index: Index, root: Path) -> None:
    """Check that there is enough free space for the pieces and the folder, which exist at the same time.

    Raises:
        PrecastError: a disk is too full.
    """
    missing = sum(piece.bytes for piece in index.pieces.values() if not cache.has_piece(piece))
    needed: dict[int, tuple[Path, int]] = {}
    for folder, size in ((cache.folder(), missing), (root, index.bytes)):
        existing = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.is_dir())
        device = existing.stat().st_dev
        first, sum_of_sizes = needed.get(device, (existing, 0))
        needed[device] = first, sum_of_sizes + size
    for existing, size in needed.values():
        free = shutil.disk_usage(existing).free
        if size > free:
            raise PrecastError(
                f"{store}: pulling takes {size / 1e6:,.1f} MB in {existing}, but only {free / 1e6:,.1f} MB"
                " are free; make room, or choose other folders with -o and PRECAST_CACHE."
            )


# --- in the folder ------------------------------------------------------------------------------------------


def _renew_signature(job: _Pull, log: _Log) -> None:
    """Replace a pulled artifact's signature with the store's; if the store's is invalid, only log the error."""
    root, index = job.root, job.index
    with suppress(OSError, PrecastError):
        if files.sha256_of(files.member_path(root, SIGNATURE_FILE)) == index.files[SIGNATURE_FILE].sha256:
            return
    try:
        manifest = files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
        if (signature := _checked_signature(job, manifest, [])) is not None:
            _write_signature(root, signature)
    except PrecastError as error:
        log(f"{error} Using the artifact that was pulled before.")


def _write_signature(root: Path, signature: bytes) -> None:
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
def _locked(root: Path, log: _Log) -> Iterator[None]:
    """Lock the folder, so that only one process at a time pulls to it."""
    import fcntl

    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()
    path = cache.folder() / "locks" / name
    with cache.explaining_write_errors():
        cache_folder.make_private(path.parent)
        file = path.open("w")
    with file:
        # On a file system without locks, every process fetches the artifact, and the first one to finish wins.
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"{root}: another process is pulling to it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
