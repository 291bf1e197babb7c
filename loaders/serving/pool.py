"""The models of a server: each is loaded at its first request, and unloaded when it is idle or memory is short."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.compat import choose_target
from ..artifact.errors import PrecastError
from ..artifact.units import size_text
from ..audit.replayed import replay_once
from ..generation.scheduler import Scheduler
from ..load import load
from ..locate import find_artifact, read_manifest
from ..runtime.installed import this_machine
from ..runtime.limits import need
from .errors import ApiError
from .settings import ServeSettings

if TYPE_CHECKING:
    from ..generation.model import Model

# Slots that are assumed until a model is loaded.
_SLOTS = 8
_RETRY_S = 1
_Log = Callable[[str], None]


class Entry:
    """A model that the server offers.

    Attributes:
        name: its name.
        source: its folder or URL.
        created: time of the artifact's last change, or of the server's start for a URL; seconds since 1970.
        model: the model while it is loaded.
        bytes: estimated memory of the loaded model.
        in_flight: number of answers that wait or run.
        leases: number of requests that use the model.
        counts: number of requests among them that ask for no answer.
        last_used: time of `time.monotonic` at which the last answer ended.
        problem: the reason why the last load failed; None if it has not failed.
    """

    def __init__(self, name: str, source: Path | str) -> None:
        self.name, self.source = name, source
        self.created = int(time.time() if isinstance(source, str) else source.stat().st_mtime)
        self.model: Model | None = None
        self.loading: asyncio.Task[Model] | None = None
        self.bytes = self.in_flight = self.leases = self.counts = 0
        self.last_used = time.monotonic()
        self.problem: str | None = None

    @property
    def is_idle(self) -> bool:
        """True if the model is loaded and no request uses it."""
        return self.model is not None and self.leases == 0


class Pool:
    """The models of a server. Only the event loop's thread may use it.

    Args:
        sources: folder or URL of each model, by name.
        settings: the server's settings.
        log: receives messages.
    """

    def __init__(self, sources: Mapping[str, Path | str], settings: ServeSettings, log: _Log) -> None:
        self.entries = {name: Entry(name, source) for name, source in sources.items()}
        self._settings, self._log = settings, log
        self._lock = asyncio.Lock()
        self._is_preloaded = False

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
        entry.leases += 1
        try:
            yield await self._loaded(entry)
        finally:
            entry.in_flight -= answers
            entry.counts -= not answers
            entry.leases -= 1
            entry.last_used = time.monotonic()

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
            for entry in self.entries.values():
                if entry.is_idle and time.monotonic() - entry.last_used >= limit:
                    self._unload(entry)

    async def _loaded(self, entry: Entry) -> "Model":
        if entry.model is not None:
            return entry.model
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._load(entry))
            # All requests that wait may be cancelled; the error is then in the log.
            entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(entry.loading)

    async def _load(self, entry: Entry) -> "Model":
        try:
            # Outside the lock, because a store that hangs must not block the other models.
            root, size = await asyncio.to_thread(_measure, entry.source, self._settings, self._log)
            async with self._lock:
                self._make_room(entry, size)
                began = time.monotonic()
                work = partial(load_verified, root, self._settings, self._log)
                entry.model = await asyncio.to_thread(work)
                entry.problem, entry.last_used = None, time.monotonic()
                self._log(f"{entry.name}: loaded and verified in {entry.last_used - began:.1f} s")
                return entry.model
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

    def _make_room(self, entry: Entry, size: int) -> None:
        """Unload idle models, the least recently used first, until a model fits.

        Raises:
            PrecastError: the model is larger than the limit.
            ApiError: the other models are in use.
        """
        limit = self._settings.memory
        if limit is not None:
            if size > limit:
                raise PrecastError(
                    f"needs {size_text(size)}, but --memory allows {size_text(limit)}; raise --memory."
                )
            idle = sorted((e for e in self.entries.values() if e.is_idle), key=lambda e: e.last_used)
            while size + sum(e.bytes for e in self.entries.values()) > limit:
                if not idle:
                    raise ApiError(
                        503,
                        "Other models are in use, and memory is short; try again later.",
                        code="memory_full",
                        retry_after=_RETRY_S,
                    )
                self._unload(idle.pop(0))
        entry.bytes = size

    def _unload(self, entry: Entry) -> None:
        self._log(f"{entry.name}: unloaded")
        entry.model, entry.bytes = None, 0
        gc.collect()  # models are in reference cycles, and hold gigabytes


def _measure(source: Path | str, settings: ServeSettings, log: _Log) -> tuple[Path, int]:
    """Return an artifact's folder, after pulling it from a URL if needed, and the memory that the model may take."""
    if isinstance(source, str):
        from ..store.pull import fetch

        source = fetch(source, require_signature=settings.signature, log=log)
    root = find_artifact(source)
    manifest = read_manifest(root, require_signature=settings.signature)
    machine = this_machine(cuda=any(t.platform == "cuda" for t in manifest.targets))
    given = settings.loading or {}
    target = choose_target(
        manifest,
        machine,
        str(root),
        name=given.get("target"),
        allow_compile=given.get("allow_compile", False),
    )
    needed = need(manifest, target)
    return root, needed.all + needed.idle


def load_verified(root: Path, settings: ServeSettings, log: _Log) -> "Model":
    """Load an artifact, and replay its golden answers if that has not been done on this machine.

    Raises:
        PrecastError: the artifact does not load, or an answer differs.
    """
    given = settings.loading or {}
    model = load(root, **given, log=log)
    replay_once(model, root, again=given.get("rehash", False))
    # One KV cache: the scheduler queues the answers beyond its slots.
    model.scheduler = Scheduler(model.engine, caches=1, prefixes=model.prefixes)
    return model
