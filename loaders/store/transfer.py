"""The common part of push and pull.

An artifact is transferred in pieces. A piece that is already at the destination is not transferred again, so an
interrupted transfer resumes, and a second version of an artifact transfers only the changes. `index` describes the
layout of a store, and `cache` describes the files that pulls store on this machine.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..artifact.manifest import SIGNATURE_FILE
from ..progress import Progress, progress_on_terminal
from .index import Index, Piece
from .remote import Store

_THREADS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The result of a push or a pull.

    Attributes:
        path: the artifact's folder.
        store: the artifact's URL, without secrets.
        manifest: sha256 of the manifest.
        signed: True if the artifact has a signature.
        pieces: number of pieces of the artifact.
        bytes: size of all pieces.
        moved_pieces: number of pieces that were sent or fetched.
        moved_bytes: size of these pieces.
    """

    path: Path
    store: str
    manifest: str
    signed: bool
    pieces: int
    bytes: int
    moved_pieces: int
    moved_bytes: int


def summarise(root: Path, store: Store, index: Index, moved: Sequence[Piece]) -> Transfer:
    """Return the result of a transfer.

    Args:
        root: the artifact's folder.
        store: the store.
        index: the artifact's index.
        moved: the pieces that were sent or fetched.
    """
    return Transfer(
        path=root,
        store=str(store),
        manifest=index.manifest,
        signed=SIGNATURE_FILE in index.files,
        pieces=len(index.pieces),
        bytes=sum(piece.bytes for piece in index.pieces.values()),
        moved_pieces=len(moved),
        moved_bytes=sum(piece.bytes for piece in moved),
    )


def map_in_threads(
    function: Callable[[Item], Result], items: Iterator[Item]
) -> Generator[Result, None, None]:
    """Call a function for each item in threads, and yield the results in the order of completion.

    At most one item waits for a thread, because an item may contain megabytes.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        pending: set[Future[Result]] = set()
        try:
            for item in items:
                pending.add(pool.submit(function, item))
                if len(pending) > _THREADS:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in as_completed(pending))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def shown(progress: Progress | None) -> AbstractContextManager[Progress]:
    """Yield `progress`. If it is None, yield a function that shows progress if standard error is a terminal."""
    return progress_on_terminal() if progress is None else nullcontext(progress)
