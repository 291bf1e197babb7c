"""Keys, origins, sizes, deadlines and the bounded queue, with a server of the demo model that allows little."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KEY = {"authorization": "Bearer sesame"}
LONG: dict[str, Any] = {
    "model": "tools",
    "prompt": "Once upon a time",
    "max_tokens": 1500,
    "ignore_eos": True,
    "temperature": 1.0,
}


@pytest.fixture(scope="module")
def limited(start_server: Callable[..., Any], tool_artifact: Path, tmp_path_factory) -> Iterator[Any]:
    """Return a server that knows two keys, and ends answers after two seconds."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("other\nsesame\n")
    options = ("--api-key-file", keys, "--request-timeout", "2", "--max-queue", "1", "--max-tokens", "1500")
    server = start_server(
        tool_artifact, *options, "--max-body", "0.01", "--cors-origin", "https://example.org"
    )
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/metrics", "/v1/chat/completions", "/tokenize", "/nothing", "/v1/../health", "//health"],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer sesam"},
        {"authorization": "Basic sesame"},
        {"authorization": "sesame"},
        {"x-api-key": "é"},
        {"host": "sesame", "x-forwarded-for": "127.0.0.1"},
    ],
)
def test_fault_18_every_route_needs_a_key(limited, path, headers) -> None:
    status, _, body = limited.request(path, {} if "chat" in path else None, headers=headers)
    assert status == 401
    assert body["error"]["code"] == "invalid_api_key"
    assert body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("headers", [KEY, {"authorization": "bearer other"}, {"x-api-key": "sesame"}])
def test_each_key_is_accepted(limited, headers) -> None:
    assert limited.request("/v1/models", headers=headers)[0] == 200


def test_probes_need_no_key(limited) -> None:
    assert limited.request("/health")[0] == limited.request("/ready")[0] == 200


def test_an_allowed_origin(limited) -> None:
    asking = {"origin": "https://example.org", "access-control-request-method": "POST"}
    status, headers, _ = limited.request("/v1/completions", method="OPTIONS", headers=asking)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://example.org")
    refused = limited.request("/v1/models", headers={"origin": "https://example.org"})
    assert refused[0] == 401
    assert refused[1]["access-control-allow-origin"] == "https://example.org"


def test_other_origins(limited, tiny_server) -> None:
    for server in (limited, tiny_server):
        headers = server.request("/v1/models", headers={"origin": "https://evil.example", **KEY})[1]
        assert "access-control-allow-origin" not in headers


def test_a_body_in_chunks_that_is_too_long(limited) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nx-api-key: sesame\r\n"
    )
    with socket.create_connection(("127.0.0.1", limited.port)) as connection:
        connection.sendall(
            head + b"transfer-encoding: chunked\r\n\r\n" + b"4000\r\n" + b" " * 0x4000 + b"\r\n"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_more_tokens_than_the_limit(limited) -> None:
    status, _, body = limited.request("/v1/completions", LONG | {"max_tokens": 1501}, headers=KEY)
    assert status == 400
    assert body["error"]["message"] == "max_tokens: expected at most 1500 (the server's limit), found 1501."


def test_more_answers_than_the_queue_holds(limited) -> None:
    status, _, body = limited.request("/v1/completions", LONG | {"n": 10}, headers=KEY)
    assert status == 400
    assert body["error"]["message"] == "Expected at most 9 answers in one request, found 10."


def test_a_deadline(limited) -> None:
    status, _, body = limited.request("/v1/completions", LONG, headers=KEY)
    assert (status, body["error"]["code"]) == (504, "request_timeout")
    limited.wait_for(lambda: limited.running() == 0)


def test_a_deadline_in_a_stream(limited) -> None:
    status, headers, text = limited.request("/v1/completions", LONG | {"stream": True}, headers=KEY)
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert events[0]["choices"][0]["text"]
    assert events[-1]["error"]["code"] == "request_timeout"


def test_a_full_queue(limited) -> None:
    """Ten requests arrive: eight get a slot, one waits, and one is refused."""
    limited.wait_for(lambda: limited.running() == 0)
    body = json.dumps(LONG | {"stream": True, "prompt": "Hello"}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nx-api-key: sesame\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    connections = [socket.create_connection(("127.0.0.1", limited.port)) for _ in range(10)]
    for connection in connections:
        connection.sendall(head + body)
    answers = sorted(connection.recv(65536) for connection in connections)
    statuses = [answer.split()[1] for answer in answers]
    assert statuses == [b"200"] * 9 + [b"429"]
    assert b"\r\nretry-after: 1\r\n" in answers[-1]
    assert b'"code":"queue_full"' in answers[-1]
    for connection in connections:
        connection.close()
    limited.wait_for(lambda: limited.running() == 0)
