"""The models of a server: each is loaded at its first request, and unloaded when it is idle or memory is short."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import ref

from ..artifact.errors import PrecastError
from ..artifact.units import size_text
from ..text.known_tokenizers import KnownTokenizers
from .errors import ApiError
from .loading import EarlyLoad, Loaded, Log, load_verified, measure
from .settings import ServeSettings

if TYPE_CHECKING:
    from ..generation.model import Model

# Slots that are assumed until a model is loaded.
_SLOTS = 8
_RETRY_S = 1


class Lease:
    """The use of a model by one request.

    Attributes:
        model: the model; None while the request waits for it.
    """

    def __init__(self) -> None:
        self.model: Model | None = None


class Entry:
    """A model that the server offers.

    Attributes:
        name: its name.
        source: its folder or URL.
        created: time of the artifact's last change, or of the server's start for a URL; seconds since 1970.
        model: the model while it is loaded.
        bytes: estimated memory of the loaded model.
        in_flight: number of answers that wait or run.
        leases: the requests that use the model, or wait for it.
        counts: number of requests among them that ask for no answer.
        gives_way: True if new requests wait, because the model will be unloaded for another one.
        last_used: time of `time.monotonic` at which the last answer ended.
        loaded_at: time of `time.monotonic` at which the model was loaded.
        problem: the reason why the last load failed; None if it has not failed.
    """

    def __init__(self, name: str, source: Path | str) -> None:
        self.name, self.source = name, source
        self.created = int(time.time() if isinstance(source, str) else source.stat().st_mtime)
        self.model: Model | None = None
        self.loading: asyncio.Task[None] | None = None
        self.bytes = self.in_flight = self.counts = 0
        self.leases: set[Lease] = set()
        self.gives_way = False
        self.last_used = self.loaded_at = time.monotonic()
        self.problem: str | None = None

    @property
    def is_idle(self) -> bool:
        """True if the model is loaded and no request uses it."""
        return self.model is not None and all(lease.model is None for lease in self.leases)

    def grant(self) -> None:
        """Give the loaded model to all requests that wait for it."""
        self.gives_way = False
        for lease in self.leases:
            lease.model = lease.model or self.model


class Pool:
    """The models of a server. Only the event loop's thread may use it.

    Args:
        sources: folder or URL of each model, by name.
        settings: the server's settings.
        log: receives messages.
        early: the load of the only model, which has begun already; None without one.
    """

    def __init__(
        self,
        sources: Mapping[str, Path | str],
        settings: ServeSettings,
        log: Log,
        early: EarlyLoad | None = None,
    ) -> None:
        self.entries = {name: Entry(name, source) for name, source in sources.items()}
        self._settings, self._log, self._early = settings, log, early
        self._lock = asyncio.Lock()  # for loads, which take turns
        self._changed = asyncio.Event()  # set whenever a lease ends
        self._is_preloaded = False
        # Loading a model again need not parse its tokenizer, which would stop the event loop.
        self._tokenizers = KnownTokenizers()

    def entry(self, name: str) -> Entry:
        """Return a model by name.

        Raises:
            ApiError: there is no such model.
        """
        if name not in self.entries:
            raise ApiError(
                404, f"The model {name!r:.200} does not exist.", param="model", code="model_not_found"
            )
        return self.entries[name]

    @asynccontextmanager
    async def lease(self, name: str, answers: int = 0) -> "AsyncIterator[Model]":
        """Load a model if needed, and yield it. It stays loaded until the block ends.

        Args:
            name: name of the model.
            answers: number of answers that the caller will ask for; 0 to count or convert tokens only.

        Raises:
            ApiError: there is no such model, the queue is full, or the model does not load.
        """
        entry = self.entry(name)
        slots = _SLOTS if entry.model is None else entry.model.engine.slots
        most = slots + self._settings.max_queue
        if answers > most:
            raise ApiError(
                400, f"Expected at most {most} answers in one request, found {answers}.", param="n"
            )
        if (entry.in_flight + answers if answers else entry.counts + 1) > most:
            raise ApiError(
                429,
                "Too many requests are waiting; try again later.",
                code="queue_full",
                retry_after=_RETRY_S,
            )
        entry.in_flight += answers
        entry.counts += not answers
        entry.leases.add(lease := Lease())
        try:
            if entry.model is None or entry.gives_way:
                await self._loaded(entry)
            else:
                entry.grant()
            assert lease.model is not None
            yield lease.model
        finally:
            entry.in_flight -= answers
            entry.counts -= not answers
            entry.leases.remove(lease)
            entry.last_used = time.monotonic()
            self._changed.set()

    async def preload(self) -> None:
        """If the server offers only one model, load it now. Several models are loaded at their first requests."""
        try:
            if len(self.entries) == 1:
                with suppress(ApiError):  # the entry keeps the reason
                    await self._loaded(*self.entries.values())
        finally:
            self._is_preloaded = True

    @property
    def obstacle(self) -> str | None:
        """The reason why the server cannot answer; None if it can."""
        if not self._is_preloaded:
            return "The model is being loaded and verified; try again later."
        if len(self.entries) == 1 and any(entry.problem for entry in self.entries.values()):
            return "The model could not be loaded; the server's log gives the reason."
        return None

    async def unload_idle(self) -> None:
        """Unload models that are idle for too long, in an endless loop; return at once if there is no time limit."""
        limit = self._settings.idle_unload
        while limit is not None:
            await asyncio.sleep(min(limit / 4, 1.0))
            async with self._lock:  # or a load would count memory as free before it is
                for entry in self.entries.values():
                    if entry.is_idle and time.monotonic() - entry.last_used >= limit:
                        await self._unload(entry)

    async def _loaded(self, entry: Entry) -> None:
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._load(entry))
            # All requests that wait may be cancelled; the error is then in the log.
            entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(entry.loading)

    async def _load(self, entry: Entry) -> None:
        try:
            if (early := self._early) is not None:
                self._early = None  # a later load starts anew
                found, entry.bytes = await asyncio.to_thread(early.result)
                self._tokenizers.keep(found.model.manifest, found.model.tokenizer)
                self._note_load(entry, found, early.began)
                entry.grant()
            else:
                await self._load_now(entry)
        except ApiError:
            raise
        except Exception as error:
            entry.problem = str(error) if isinstance(error, PrecastError) else repr(error)
            self._log(f"{entry.name}: {entry.problem}")
            # The reason may name files, so only the log has it.
            raise ApiError(
                503,
                f"The model {entry.name!r} could not be loaded; the server's log gives the reason.",
                param="model",
                code="model_not_loaded",
            ) from None
        finally:
            entry.loading = None
            if entry.model is None:
                entry.bytes = 0

    async def _load_now(self, entry: Entry) -> None:
        # Outside the lock, because a store that hangs must not block the other models.
        root, size = await asyncio.to_thread(measure, entry.source, self._settings, self._log)
        async with self._lock:
            if entry.model is None:
                await self._make_room(entry, size)
                began = time.monotonic()
                work = partial(load_verified, root, self._settings, self._log, self._tokenizers)
                found = await asyncio.to_thread(work)
                self._note_load(entry, found, began)
            entry.grant()

    def _note_load(self, entry: Entry, found: Loaded, began: float) -> None:
        entry.model = found.model
        entry.problem, entry.loaded_at = None, time.monotonic()
        entry.last_used = entry.loaded_at
        seconds = f"{entry.loaded_at - began:.1f} s"
        if found.is_replayed:
            self._log(f"{entry.name}: loaded and verified in {seconds}")
        else:
            self._log(f"{entry.name}: loaded in {seconds}; an earlier load on this machine has verified it")

    async def _make_room(self, entry: Entry, size: int) -> None:
        """Unload models until another one fits, and reserve its memory.

        Raises:
            PrecastError: the model is larger than the limit.
            ApiError: no request waits for the model any more.
        """
        limit = self._settings.memory
        if limit is not None and size > limit:
            raise PrecastError(
                f"needs {size_text(size)}, but --memory allows {size_text(limit)}; raise --memory."
            )
        try:
            while limit is not None and size + sum(e.bytes for e in self.entries.values()) > limit:
                if not entry.leases:
                    raise ApiError(503, "The request was given up.", code="model_not_loaded")
                await self._unload_one()
        finally:
            for other in self.entries.values():
                if other.gives_way:
                    other.grant()
        entry.bytes = size

    async def _unload_one(self) -> None:
        """Unload the idle model that was used least recently; if none is idle, wait until a request ends.

        Meanwhile, the model that was loaded first gives way, or its requests could keep the others waiting for ever.
        """
        loaded = [entry for entry in self.entries.values() if entry.model is not None]
        if idle := [entry for entry in loaded if entry.is_idle]:
            await self._unload(min(idle, key=lambda entry: entry.last_used))
            return
        min(loaded, key=lambda entry: entry.loaded_at).gives_way = True
        self._changed.clear()
        await self._changed.wait()

    async def _unload(self, entry: Entry) -> None:
        """Unload a model, and return once its memory is free. The caller holds the lock of loads."""
        self._log(f"{entry.name}: unloaded")
        models = [entry.model]
        entry.model, entry.bytes, entry.gives_way = None, 0, False
        await asyncio.to_thread(_free, models)


def _free(models: "list[Model | None]") -> None:
    """Drop the last reference to a model, and collect garbage only if the model remains, in a reference cycle."""
    model = ref(models.pop())
    if model() is not None:
        was_frozen = gc.get_freeze_count() > 0
        gc.unfreeze()  # the model may be among the objects that collections skip
        gc.collect()
        if was_frozen:
            gc.freeze()  # or each later full collection would take 29 ms again
