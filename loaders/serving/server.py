"""Run a server until it is asked to stop, and let the answers in progress finish."""

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread

import uvicorn

from ..collection import no_collection
from .access import is_local
from .answers import Services
from .app import make_app
from .listening import BACKLOG
from .loading import EarlyLoad
from .logs import Log, LogHandler
from .metrics import Metrics
from .openai.response_store import ResponseStore
from .pool import Pool
from .preparing import Preparing
from .protocol import Protocol
from .requests import Arriving
from .routes import import_others
from .settings import ServeSettings

# Requests in preparation, besides those that the queues of the models hold.
_PREPARING = 64
# Bodies of the maximum size that may arrive at the same time.
_ARRIVING = 32
# Threads besides one for each model, which computes: for loading models and for closing streams.
_SPARE_THREADS = 8
# Seconds from the load of the only model to the import of modules that its first answer does not need.
_REST_S = 2.0
# Seconds for which a thread keeps Python's lock while other threads wait for it.
_TURN_S = 0.001
# Maximum size of a request's headers, in bytes.
_MOST_HEADERS = 32 << 10


def serve(
    sources: Mapping[str, Path | str],
    settings: ServeSettings,
    log: Log,
    listener: socket.socket,
    *,
    early: EarlyLoad | None = None,
    on_start: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve models until SIGTERM or SIGINT.

    Args:
        sources: folder or URL of each model, by name.
        settings: the settings.
        log: receives a line for each request, and messages.
        listener: the socket on which the server listens; closed at the end.
        early: the load of the only model, which has begun already; None without one.
        on_start: a function that is called with the server's URL once it accepts connections.
    """
    host, port = listener.getsockname()[:2]
    with listener, _logging(log), _short_turns(), _unfreezing():
        if not (is_local(str(host)) or settings.api_keys):
            log.message(
                f"Listening on {host} without API keys: everybody who reaches this address may use the server."
            )
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        pool = partial(Pool, sources, settings, log.message, early)
        asyncio.run(_serve(pool, settings, log, listener, lambda: on_start(url)))


class _Threads(ThreadPoolExecutor):
    """Threads that asyncio does not wait for at the end: a load may take minutes."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Drop the calls that wait, and let the threads end without waiting for them."""
        super().shutdown(wait=False, cancel_futures=True)


async def _serve(
    make_pool: Callable[[], Pool],
    settings: ServeSettings,
    log: Log,
    listener: socket.socket,
    on_start: Callable[[], None],
) -> None:
    pool = make_pool()
    models = len(pool.entries)
    asyncio.get_running_loop().set_default_executor(_Threads(models + _SPARE_THREADS, "precast-compute"))
    preparing = Preparing(_PREPARING + settings.max_queue * models)
    services = Services(
        settings=settings,
        pool=pool,
        preparing=preparing,
        metrics=Metrics(pool),
        responses=ResponseStore(),
        arriving=Arriving(_ARRIVING * settings.max_body),
        address=str(listener.getsockname()[0]),
    )
    server = _Server(_config(services, log), on_start)
    tasks = [asyncio.create_task(work) for work in (_prepare(pool, services.metrics), pool.unload_idle())]
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in tasks:
            task.cancel()
        preparing.close()


async def _prepare(pool: Pool, metrics: Metrics) -> None:
    """Load the only model, and import the remaining modules later, when the first answer needs no core."""
    await pool.preload()
    await asyncio.sleep(_REST_S)
    with _objects_that_stay():
        await metrics.start()
        await asyncio.to_thread(import_others)


def _config(services: Services, log: Log) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(services, log),
        log_config=None,
        access_log=False,
        loop="asyncio",
        http=Protocol,
        ws="none",
        lifespan="off",
        server_header=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=_MOST_HEADERS,
        timeout_graceful_shutdown=services.settings.drain_timeout,
    )


class _Server(uvicorn.Server):
    """A server that ends without an error after SIGTERM or SIGINT.

    Args:
        config: uvicorn's settings.
        on_start: a function that is called once the server listens.
    """

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._on_start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop gracefully at the first signal, and at once at a second SIGINT; uvicorn would raise the signal again."""
        if current_thread() is not main_thread():  # Python delivers signals to the main thread only
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


@contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads that wait for Python's lock have it after a millisecond instead of five.

    Each call of the event loop that sends or receives gives up the lock, and then waits for it while another thread
    checks a request or renders a chat template.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _objects_that_stay() -> Iterator[None]:
    """Collect no garbage inside the block, and let later collections skip all objects that exist at its end.

    A full collection of all modules would take 29 ms, in which the event loop stands still.
    """
    with no_collection():
        yield
        if not gc.get_freeze_count():
            gc.freeze()


@contextmanager
def _unfreezing() -> Iterator[None]:
    """At the end, undo the exemption of objects from garbage collection, unless it existed before."""
    was_frozen = gc.get_freeze_count() > 0
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()


@contextmanager
def _logging(log: Log) -> Iterator[None]:
    """Write the warnings of libraries to the log."""
    root, handler = logging.getLogger(), LogHandler(log)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
