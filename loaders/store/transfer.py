"""What pushing and pulling have in common.

An artifact goes to a store and comes from it in pieces. One that is there already is not sent or fetched again, so an
interrupted transfer goes on where it stopped, and a second version costs what changed. `store_index` describes the
layout of a store, `store_cache` what is kept on this machine.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..artifact.manifest import SIGNATURE_FILE
from ..progress import Progress, show_progress
from .index import Index, Piece
from .remote import Store

_THREADS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a push or a pull came to.

    Attributes:
        path: the artifact's folder.
        store: its URL, without secrets.
        manifest: the manifest's sha256.
        signed: whether it has a signature.
        pieces: of all of it.
        bytes: of all of it.
        moved_pieces: those that were sent or fetched.
        moved_bytes: of those.
    """

    path: Path
    store: str
    manifest: str
    signed: bool
    pieces: int
    bytes: int
    moved_pieces: int
    moved_bytes: int


def moved(root: Path, store: Store, index: Index, pieces: Sequence[Piece]) -> Moved:
    """Sums up a transfer of which `pieces` were sent or fetched."""
    return Moved(
        path=root,
        store=str(store),
        manifest=index.manifest,
        signed=SIGNATURE_FILE in index.files,
        pieces=len(index.pieces),
        bytes=sum(piece.bytes for piece in index.pieces.values()),
        moved_pieces=len(pieces),
        moved_bytes=sum(piece.bytes for piece in pieces),
    )


def in_parallel(act: Callable[[Item], Result], items: Iterator[Item]) -> Generator[Result, None, None]:
    """Results as they come. No more items are taken than the threads can use soon: each may be megabytes."""
    with ThreadPoolExecutor(_THREADS) as pool:
        pending: set[Future[Result]] = set()
        try:
            for item in items:
                pending.add(pool.submit(act, item))
                if len(pending) > _THREADS:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in as_completed(pending))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def showing(progress: Progress | None) -> AbstractContextManager[Progress]:
    """Yield `progress`, or by default a function that shows progress on standard error."""
    return show_progress() if progress is None else nullcontext(progress)
