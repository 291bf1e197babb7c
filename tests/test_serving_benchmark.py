"""The client of the benchmark of servers: events, times and counts of streamed answers; and the benchmark's ratios."""

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Return the modules of benchmarks/peers, which import each other by bare names."""
    monkeypatch.syspath_prepend(str(PEERS))
    before = set(sys.modules)
    import serving_client
    import serving_report

    yield SimpleNamespace(client=serving_client, report=serving_report)
    for name in set(sys.modules) - before:
        del sys.modules[name]


def event(**value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(**fields: Any) -> bytes:
    return event(choices=[{"delta": fields}])


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def answered(peers: SimpleNamespace, *pieces: bytes) -> Any:
    """Ask a server that sends these pieces, 50 ms after one another."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                for piece in pieces:
                    time.sleep(0.05)
                    connection.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return peers.client.ask(listener.getsockname()[1], [{"messages": []}])[1][0]
        finally:
            thread.join()


def test_events_have_the_time_of_their_last_byte(peers: SimpleNamespace) -> None:
    first, second = chunk(delta(content="a")), chunk(delta(content="b é"))
    end = chunk(event(choices=[], usage=USAGE)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    role = HEAD + chunk(delta(role="assistant", content=""))
    found = answered(peers, role, first[:9], first[9:], second + end)
    assert (found.text, found.prompt_tokens, found.cached_tokens, found.tokens) == ("ab é", 9, 4, 2)
    assert 0.15 <= found.first_s <= found.last_s - 0.05
    assert len(found.gaps_s) == 1


def test_an_event_may_span_chunks(peers: SimpleNamespace) -> None:
    text = delta(content="whole")
    parts = chunk(text[:12]) + chunk(text[12:] + event(choices=[], usage=USAGE)) + b"0\r\n\r\n"
    assert answered(peers, HEAD + parts).text == "whole"


@pytest.mark.parametrize(
    "response",
    [b"HTTP/1.1 503 Service Unavailable\r\n\r\n", HEAD + chunk(event(error={"code": 500})) + b"0\r\n\r\n"],
    ids=["status", "event"],
)
def test_errors_are_no_answers(peers: SimpleNamespace, response: bytes) -> None:
    with pytest.raises(peers.client.Refused):
        answered(peers, response)


def test_percentiles_by_nearest_rank(peers: SimpleNamespace) -> None:
    values = [float(n) for n in range(1, 9)]
    assert [peers.report.percentile(values, p) for p in (0, 50, 95, 100)] == [1.0, 4.0, 8.0, 8.0]


def test_ratios_are_those_of_the_rounds(peers: SimpleNamespace) -> None:
    contenders = {
        "ours": SimpleNamespace(group="int8", is_precast=True),
        "theirs": SimpleNamespace(group="int8", is_precast=False),
    }
    first = [SimpleNamespace(first_s=s) for s in (1.0, 2.0)]
    runs = {
        "ours": [{"seconds": 1.0, "answers": first}, {"seconds": 1.0, "answers": first}],
        "theirs": [{"seconds": 2.0, "answers": first}, {"seconds": 4.0, "answers": first[:1]}],
    }
    starts = {"ours": [1.0, 1.0], "theirs": [2.0, 1.0]}
    found = peers.report.ratios({"eight": runs}, starts, contenders)["int8"]
    assert (found["start"]["min"], found["start"]["max"]) == (0.5, 1.0)
    assert (found["eight"]["tokens_per_s"]["min"], found["eight"]["tokens_per_s"]["max"]) == (2.0, 4.0)
    assert found["eight"]["first_token_p95_s"]["max"] == 2.0


def test_the_document_shows_the_committed_results(peers: SimpleNamespace) -> None:
    result = json.loads((PEERS.parent / "results" / "serving.json").read_text())
    assert peers.report.summary(result) in (PEERS.parents[1] / "docs" / "performance.md").read_text()
