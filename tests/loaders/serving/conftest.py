"""Fixtures for tests of the server: servers in processes of their own, and clients."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tool_template import copy_with_tools

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "artifacts" / "smollm2-135m-instruct-int8"
_STARTED = re.compile(r"Serving .* at (http://\S+)/v1;")


class Server:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.process, self.url, self._log = process, url, log
        self.port = int(url.rpartition(":")[2])

    def records(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the records of the log with the given fields."""
        lines = [line for line in self._log.read_text().splitlines() if line.startswith("{")]
        found = [json.loads(line) for line in lines]
        return [record for record in found if wanted.items() <= record.items()]

    def wait_for(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        """Return the condition's value once it is true."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, self._log.read_text()[-4000:]
            assert self.process.poll() is None, self._log.read_text()[-4000:]
            time.sleep(0.02)
        return value

    def request(
        self,
        path: str,
        value: Any = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Mapping[str, str], Any]:
        """Send a request, and return the status, the headers, and the parsed body."""
        body = value if isinstance(value, bytes | None) else json.dumps(value).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        given = {"content-type": "application/json"} if body is not None else {}
        chosen = method or ("GET" if body is None else "POST")
        with contextlib.closing(connection):
            connection.request(chosen, path, body, {**given, **(headers or {})})
            response = connection.getresponse()
            data = response.read()
            found = {name.lower(): text for name, text in response.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, found, json.loads(data) if is_json and data else data.decode()

    def running(self) -> int:
        """Return the number of answers that wait or hold a slot."""
        text = self.request("/metrics", headers={"authorization": "Bearer sesame"})[2]
        numbers = re.findall(r"^precast:num_requests_(?:running|waiting)\{.*\} (.*)$", text, re.MULTILINE)
        return int(sum(map(float, numbers)))

    def stop(self) -> int:
        """Stop the server, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Return a function that starts `precast serve` with the given arguments, and waits until it is ready."""
    servers = []

    def start(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> Server:
        log = tmp_path_factory.mktemp("server") / "log"
        command = [sys.executable, "-m", "precast", "serve", "--port", "0", *map(str, arguments)]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env={**os.environ, **(environment or {})},
                cwd=tmp_path_factory.getbasetemp(),
            )
        server = Server(process, log, "http://127.0.0.1:0")
        servers.append(server)
        url = server.wait_for(lambda: _STARTED.search(log.read_text()))[1]
        server.url, server.port = url, int(url.rpartition(":")[2])
        server.wait_for(lambda: server.request("/ready")[0] == 200)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def tool_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo artifact with a chat template that offers tools."""
    if not DEMO.exists():
        pytest.skip("the demo artifact is missing: make demo")
    return copy_with_tools(DEMO, tmp_path_factory.mktemp("artifacts") / "tools")


@pytest.fixture(scope="session")
def demo_server(start_server: Callable[..., Server], tool_artifact: Path) -> Server:
    """Return a server of the demo model, as "demo" and, with a template for tools, as "tools"."""
    demo = tool_artifact.parent / "demo"
    demo.symlink_to(DEMO.resolve())
    return start_server(tool_artifact.parent)


@pytest.fixture(scope="session")
def tiny_server(start_server: Callable[..., Server], tiny_artifact: Path) -> Server:
    """Return a server of the tiny model, named "tiny"."""
    return start_server(tiny_artifact)


@pytest.fixture(scope="session")
def openai(demo_server: Server) -> Any:
    """Return OpenAI's client of the demo server."""
    from openai import OpenAI

    with OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
