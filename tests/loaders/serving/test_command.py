"""Errors of the command precast serve before it serves: options, missing packages, and the address."""

import asyncio
import importlib.util
import json
import socket
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from precast import cli
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.serving.app import Paths
from precast.loaders.serving.listening import listen
from precast.loaders.serving.route import Deferred
from precast.loaders.serving.routes import ROUTES
from precast.loaders.serving.settings import ServeSettings


def refusal(*arguments: object) -> str:
    result = CliRunner().invoke(cli.main, ["serve", *map(str, arguments)])
    assert result.exit_code == 2
    return result.stderr.strip()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--max-queue", "-1", "--max-queue: expected a number from 0 to 1,000,000,000, found -1."),
        (
            "--request-timeout",
            "0",
            "--request-timeout: expected a number from 0.001 to 1,000,000,000, found 0.0.",
        ),
        ("--memory", "nan", "--memory: expected a number from 0.001 to 1,000,000,000, found nan."),
    ],
)
def test_options_out_of_range(tiny_artifact, option, value, text) -> None:
    assert refusal(tiny_artifact, option, value) == f"error: {text}"


def test_missing_packages(tiny_artifact, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "starlette" else found(name)
    )
    assert refusal(tiny_artifact) == (
        "error: precast serve needs starlette, which is not installed: pip install 'precast[serve]'"
    )


def test_a_path_without_an_artifact(tmp_path) -> None:
    assert "expected" in refusal(tmp_path / "nothing")
    assert "Missing argument" in refusal()


def test_an_address_in_use_or_of_another_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PrecastError) as caught:
            listen(ServeSettings(port=port))
        assert (
            str(caught.value)
            == f"127.0.0.1:{port}: cannot listen there (Address already in use); choose another --port."
        )
    with pytest.raises(PrecastError, match=r"^192\.0\.2\.1:8000: cannot listen there"):
        listen(ServeSettings(host="192.0.2.1"))


LOADED = """
import json, os, sys
from precast import cli
from precast.loaders.serving.logs import Log
def message(self, text):
    if ": loaded" in text:
        print(json.dumps(sorted(sys.modules)), flush=True)
        os._exit(0)
Log.message = message
cli.main(["serve", "--port", "0", sys.argv[1]])
"""
# The modules that the first request for a chat does not need, in the server and in other packages.
DEFERRED = {
    *(
        "anthropic.messages",
        "anthropic.schemas",
        "description",
        "openai.completions",
        "openai.response_schemas",
    ),
    *("openai.responses", "openai.schemas", "prometheus", "reply_schemas", "schema", "tokens"),
}
FOREIGN = {
    *(
        "encodings.idna",
        "fsspec",
        "http.server",
        "httpx",
        "jax",
        "jinja2.debug",
        "numpy.random",
        "prometheus_client",
    ),
    *("pydantic", "rich", "starlette"),
}


def test_modules_that_the_start_defers(tiny_artifact) -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOADED, str(tiny_artifact)], capture_output=True, text=True, check=True
    )
    modules = set(json.loads(found.stdout.splitlines()[-1]))
    prefix = "precast.loaders.serving."
    assert {f"{prefix}openai.chat", f"{prefix}openai.plain"} <= modules
    assert not {prefix + name for name in DEFERRED} & modules
    assert not FOREIGN & modules


FROZEN = """
import gc, os, signal, sys, threading, time
from precast import cli
from precast.loaders.serving import server
server._REST_S = 0
counts = [gc.get_freeze_count()]
def watch():
    while not (gc.get_freeze_count() and gc.isenabled()):
        time.sleep(0.01)
    counts.append("precast.loaders.serving.anthropic.messages" in sys.modules)
    counts.append(gc.isenabled())
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
try:
    cli.main(["serve", "--port", "0", sys.argv[1]])
finally:
    print([*counts, gc.get_freeze_count()], flush=True)
"""


def test_garbage_collections_skip_all_that_the_start_has_imported(tiny_artifact) -> None:
    """A full collection of all modules would stop the event loop. At the end, the process is as before."""
    command = [sys.executable, "-c", FROZEN, str(tiny_artifact)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.splitlines()[-1] == "[0, True, True, 0]"


def test_the_deferred_modules_exist() -> None:
    assert all(importlib.util.find_spec(f"precast.loaders.serving.{name}") for name in DEFERRED)


def test_all_handlers_and_schemas_exist() -> None:
    """The routes name them as texts."""
    assert all(callable(r.handler.get()) for r in ROUTES if isinstance(r.handler, Deferred))
    assert sum(r.schema is not None and "model" in r.schema.model_fields for r in ROUTES) == 7


def test_paths_with_variables() -> None:
    async def reached(path: str) -> Any:
        seen: list[Any] = []

        async def endpoint(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["path_params"])

        async def send(message: Any) -> None:
            seen.append(message.get("status"))

        await Paths({"/a": endpoint, "/a.b/{name}": endpoint})({"path": path}, None, send)
        return seen[0]

    expected = {"/a": {}, "/a.b/x y": {"name": "x y"}, "/a.b/": 404, "/a.b/x/y": 404, "/axb/x": 404}
    expected |= {"/a.b/{name}": {"name": "{name}"}, "/a/": 404, "/a.b/x\n": {"name": "x\n"}}
    assert {path: asyncio.run(reached(path)) for path in expected} == expected
