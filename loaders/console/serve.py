"""The command ``precast serve``."""

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.errors import PrecastError, printable
from ..artifact.frozen import Frozen
from ..artifact.interrupt import raise_on_interrupt
from .run import LoadOptions, fast_start

if TYPE_CHECKING:
    from ..serving.settings import ServeSettings

_NEEDED = ("prometheus_client", "pydantic", "starlette", "uvicorn")
# Seconds that threads may take to end after the server.
_JOIN_S = 1.0


class ServeOptions(Frozen):
    """The command line's options for serving; sizes in the units of the command line."""

    host: str
    port: int
    api_key_file: Path | None
    cors_origins: tuple[str, ...]
    max_queue: int
    max_tokens: int | None
    max_body: float
    request_timeout: float
    drain_timeout: float
    idle_unload: float | None
    memory: float | None
    literal: bool
    answer_format: str | None


def run(artifacts: Sequence[Path | str], *, options: ServeOptions, loading: LoadOptions) -> int:
    """Serve artifacts over HTTP until SIGTERM or Ctrl-C.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: the extra `serve` is missing, an option is wrong, there is no artifact, or the server cannot
            listen on its address.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise PrecastError(
            f"precast serve needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed:"
            " pip install 'precast[serve]'"
        )
    from ..serving.listening import listen
    from ..serving.logs import Log
    from ..serving.sources import named_sources

    settings, sources = _settings(options, loading), named_sources(artifacts)

    def announce(url: str) -> None:
        print(printable(f"Serving {', '.join(sources)} at {url}/v1; Ctrl-C stops the server."), flush=True)

    # Clients that connect now wait until the server accepts connections.
    log, listener = Log(), listen(settings)
    # A search for pydantic's plugins reads a file of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    with raise_on_interrupt():  # the server handles Ctrl-C itself
        with fast_start(next(iter(sources.values()))):
            _import_http()
            from ..serving.loading import early_load

            early = early_load(sources, settings, log.message)
            # The model is loaded meanwhile.
            from ..serving.routes import import_chat

            import_chat()
        from ..serving.server import serve

        serve(sources, settings, log, listener, early=early, on_start=announce)
    _end_threads()
    return 0


def _import_http() -> None:
    """Import the packages for HTTP, and open jaxlib's library meanwhile in a thread.

    `dlopen` takes a lock, and an import that waits for it holds Python's lock. So import modules that have libraries of
    their own before that.
    """
    from ..background import BackgroundCall
    from ..runtime.native_libraries import open_jaxlib

    for name in ("asyncio", "concurrent.futures.thread", "pickle", "random"):
        import_module(name)
    opening = BackgroundCall(open_jaxlib)
    for name in ("h11", "uvicorn"):
        import_module(name)
    opening.join()


def _end_threads() -> None:
    """End the process if threads still run, such as an interrupted load; Python would wait for them."""
    end = time.monotonic() + _JOIN_S
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(end - time.monotonic(), 0))
            if thread.is_alive():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)


def _settings(options: ServeOptions, loading: LoadOptions) -> "ServeSettings":
    """Return the settings that the options ask for.

    Raises:
        PrecastError: an option is out of range.
    """
    from ..serving.access import read_keys
    from ..serving.settings import MIB, ServeSettings

    least = {
        "max_queue": 0,
        "max_tokens": 1,
        "max_body": 0.001,
        "request_timeout": 0.001,
        "drain_timeout": 0,
        "idle_unload": 0.001,
        "memory": 0.001,
    }
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= 10**9:
            raise PrecastError(
                f"--{name.replace('_', '-')}: expected a number from {low} to 1,000,000,000, found {value}."
            )
    return ServeSettings(
        host=options.host,
        port=options.port,
        api_keys=read_keys(options.api_key_file, os.environ),
        cors_origins=options.cors_origins,
        max_queue=options.max_queue,
        max_tokens=options.max_tokens,
        max_body=int(options.max_body * MIB),
        request_timeout=options.request_timeout,
        drain_timeout=options.drain_timeout,
        idle_unload=options.idle_unload,
        memory=None if options.memory is None else int(options.memory * 1e9),
        literal=options.literal,
        answer_format=options.answer_format,
        loading=loading.given(),
    )
