"""Clients that disconnect, senders that are slow, and servers that stop."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import uvicorn

from precast.loaders.serving import app, protocol, requests
from precast.loaders.serving.logs import Log
from precast.loaders.serving.route import ApiRoute

LONG: dict[str, Any] = {
    "model": "demo",
    "prompt": "Once upon a time",
    "max_tokens": 1500,
    "ignore_eos": True,
    "temperature": 1.0,
}
SHORT = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 8}


def send(server: Any, value: Any, name: str, path: str = "/v1/completions") -> socket.socket:
    body = json.dumps(value).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nx-request-id: {name}\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture
def clean(demo_server):
    """After the test, the server is idle and answers as before."""
    before = demo_server.request("/v1/completions", SHORT)[2]["choices"][0]["text"]
    yield
    demo_server.wait_for(lambda: demo_server.running() == 0)
    assert demo_server.request("/v1/completions", SHORT)[2]["choices"][0]["text"] == before


@pytest.mark.parametrize("stream", [True, False])
def test_fault_19_a_disconnect_while_tokens_are_generated(demo_server, clean, stream) -> None:
    name = f"decode-{stream}"
    with send(demo_server, LONG | {"stream": stream}, name) as connection:
        if stream:
            assert connection.recv(100)
        demo_server.wait_for(lambda: demo_server.running() == 1)
    (record,) = demo_server.wait_for(lambda: demo_server.records(request_id=name))
    assert record["status"] == 499
    assert record["finish_reasons"] == ["unfinished"]
    assert record["completion_tokens"] < 1500


def test_fault_19_a_disconnect_while_the_prompt_is_read(demo_server, clean) -> None:
    prompt = list(range(1000, 2900))
    send(demo_server, LONG | {"prompt": prompt, "max_tokens": 100}, "prefill").close()
    (record,) = demo_server.wait_for(lambda: demo_server.records(request_id="prefill"))
    assert record["status"] == 499
    assert record.get("completion_tokens", 0) == 0


def test_fault_19_a_disconnect_in_the_queue(demo_server, clean) -> None:
    with send(demo_server, LONG | {"n": 8}, "slots"):
        demo_server.wait_for(lambda: demo_server.running() == 8)
        with send(demo_server, LONG, "queue"):
            demo_server.wait_for(lambda: demo_server.running() == 9)
        (record,) = demo_server.wait_for(lambda: demo_server.records(request_id="queue"))
        assert record["completion_tokens"] == 0
        assert demo_server.running() == 8
    demo_server.wait_for(lambda: demo_server.records(request_id="slots"))


def test_fault_16_health_is_answered_while_requests_are_hard(demo_server, clean) -> None:
    """A deep schema, a costly regular expression and long prompts are prepared outside the event loop."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "array", "items": deep, "anyOf": [{}, {"type": "array"}]}
    hard: list[dict[str, Any]] = [
        SHORT | {"json_schema": deep},
        SHORT | {"regex": "(a|b)*" * 400},
        SHORT | {"prompt": "the cat " * 200_000},
    ]
    connections = [send(demo_server, value, f"hard-{i}") for i, value in enumerate(hard)]
    for _ in range(20):
        assert demo_server.request("/health")[0] == 200
    for connection in connections:
        assert connection.recv(20).startswith(b"HTTP/1.1 ")
        connection.close()


def test_fault_17_slow_headers(monkeypatch) -> None:
    """A connection without complete headers is closed; one with an answer in progress is not."""
    monkeypatch.setattr(protocol, "HEADERS_S", 0.2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.5)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def talk(port: int, data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(100), 20)
        writer.close()
        return answer

    async def main() -> list[bytes]:
        requests = (b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: a\r\n", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        async with listening(app) as (_, port):
            return list(await asyncio.gather(*(talk(port, data) for data in requests)))

    *slow, whole = asyncio.run(main())
    assert slow == [b"", b"", b""]
    assert whole.startswith(b"HTTP/1.1 204")


@contextlib.asynccontextmanager
async def listening(app: Any) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """Serve an application with precast's protocol; yield the server and its port."""
    config = uvicorn.Config(app, http=protocol.Protocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    listener = socket.create_server(("127.0.0.1", 0))
    await server.startup([listener])
    try:
        yield server, listener.getsockname()[1]
    finally:
        await server.shutdown([listener])


class Reading:
    """An application with one route, whose events never end; the deadline of its requests has passed."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.facts: dict[str, Any] = {}

    async def handle(self, *_: Any) -> requests.EventReply:
        async def events() -> AsyncIterator[bytes]:
            while True:
                yield b"a" * 100_000
                await asyncio.sleep(0)

        closing = contextlib.AsyncExitStack()
        closing.callback(self.closed.set)
        return requests.EventReply(events=events(), closing=closing)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        route = ApiRoute(method="GET", path="/", handler=self.handle, summary="")
        endpoint = app.Endpoint(services=cast("Any", None), log=Log(), methods={"GET": route})
        request = requests.Request(
            id="", headers={}, path_params={}, deadline=time.monotonic(), facts=self.facts
        )
        await endpoint({**scope, "path_params": {}, "precast.request": request}, receive, send)


def test_fault_17_a_client_that_stops_reading(monkeypatch) -> None:
    """After the deadline, the answer ends, and the connection is aborted."""
    monkeypatch.setattr(requests, "_GRACE_S", 0.3)
    reading = Reading()

    async def main() -> bytes:
        async with listening(reading) as (server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
            try:
                writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                async with asyncio.timeout(30):
                    await reading.closed.wait()
                    while server.server_state.connections:
                        await asyncio.sleep(0.01)
                return await reader.read(12)
            finally:
                writer.close()

    assert asyncio.run(main()) == b"HTTP/1.1 200"
    assert reading.facts == {"status": 499}


def test_a_client_that_does_not_read_the_last_message() -> None:
    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        transport = requests.Transport(receive, send, time.monotonic() - requests._GRACE_S + 0.2)
        last = transport.send({"type": "http.response.body", "body": b""})
        async with asyncio.timeout(10):
            with pytest.raises(requests.Disconnected):
                await transport.until_disconnect(last)

    asyncio.run(main())


HANGING = """
import sys, threading
from precast import cli
from precast.loaders.serving import loading
loading.load_verified = lambda *_: threading.Event().wait()
cli.main(["serve", "--port", "0", "--drain-timeout", "0.1", sys.argv[1]])
"""


def test_a_load_that_hangs_does_not_delay_the_end(tiny_artifact) -> None:
    command = [sys.executable, "-c", HANGING, str(tiny_artifact)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"Serving ")
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_sigterm_lets_answers_finish(start_server, tool_artifact) -> None:
    server = start_server(tool_artifact)
    ask = LONG | {"model": "tools", "max_tokens": 40, "stream": True}
    with send(server, ask, "last") as connection:
        first = connection.recv(65536)
        assert first
        server.process.send_signal(signal.SIGTERM)
        text = first + read_all(connection)
    assert b'"finish_reason":"length"' in text
    assert b"data: [DONE]" in text[-100:]
    assert server.process.wait(60) == 0
    (record,) = server.records(request_id="last")
    assert (record["status"], record["completion_tokens"]) == (200, 40)


def test_answers_end_after_the_drain_timeout(start_server, tool_artifact) -> None:
    """A stream is cut; an answer that has not begun is an error in the API's form."""
    server = start_server(tool_artifact, "--drain-timeout", "0.3")
    ask = LONG | {"model": "tools", "n": 4}
    with send(server, ask | {"stream": True}, "cut") as cut, send(server, ask, "refused") as refused:
        assert cut.recv(65536)
        server.wait_for(lambda: server.running() == 8)
        server.process.send_signal(signal.SIGTERM)
        assert b"[DONE]" not in read_all(cut)
        head, _, body = read_all(refused).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(body)["error"]["code"] == "server_stopping"
    assert server.process.wait(60) == 0
    assert server.records(level="error", error="CancelledError()") == []
    (record,) = server.records(request_id="cut")
    assert record["completion_tokens"] < 6000


def test_ctrl_c_stops_an_idle_server(start_server, tiny_artifact) -> None:
    server = start_server(tiny_artifact)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
