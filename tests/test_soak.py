"""A short run of `make soak`, and proof that it notices wrong answers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soak
import soak_requests
from soak_requests import Case

FUZZ = Path(__file__).resolve().parent / "fuzz"
HEADERS = {"x-request-id": "a", "content-type": "application/json"}
STREAM = {**HEADERS, "content-type": "text/event-stream; charset=utf-8"}
CASE = next(soak_requests.good("tiny", "the cat"))


@pytest.mark.parametrize("count", [1, 3])
def test_a_mixed_load(python, export_tiny, tiny_source, count):
    """Three models share the memory of two."""
    source = tiny_source(config={"max_position_embeddings": 512})
    artifact = export_tiny(source, context=512, buckets=(16, 64), targets=("cpu",))
    more = ["--memory", str(2.5 * _gigabytes(artifact))] if count > 1 else []
    artifacts = [part for _ in range(count) for part in ("--artifact", str(artifact))]
    result = python(str(FUZZ / "soak.py"), "--minutes", "0.3", *artifacts, *more)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["soak"]["findings"] == found["unsupported"] == 0
    assert found["requests"]["200"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_its_server(tiny_artifact, number):
    command = [sys.executable, str(FUZZ / "soak.py"), "--artifact", str(tiny_artifact)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert run.stderr is not None
        server = int(run.stderr.readline().rpartition(" ")[2])
        run.send_signal(number)
        assert run.wait(60) != 0
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)
    finally:
        run.kill()
        run.stderr.close()


def _gigabytes(artifact: Path) -> float:
    from precast.loaders.serving.loading import measure
    from precast.loaders.serving.settings import ServeSettings

    return measure(artifact, ServeSettings(), lambda _: None)[1] / 1e9


def chat(text: str) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"content": text}}]}).encode()


def streamed(*texts: str, end: bytes = b"data: [DONE]\n\n") -> bytes:
    parts = ({"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts)
    return b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts) + end


ERROR = {"error": {"message": "No.", "type": "a", "param": None, "code": None}}
SLOW = {
    "error": {**ERROR["error"], "message": "The answer took longer than the server allows; ask for less."}
}


@pytest.mark.parametrize(
    ("status", "headers", "body", "text"),
    [
        (200, HEADERS, chat("cat"), None),
        (200, HEADERS, chat("dog"), "answered"),
        (200, STREAM, streamed("c", "at"), None),
        (200, STREAM, streamed("c"), "streamed"),
        (200, STREAM, streamed("cat", end=b""), "a stream ended with"),
        (200, STREAM, streamed("c", end=b"data: " + json.dumps(SLOW).encode() + b"\n\n"), None),
        (
            200,
            STREAM,
            streamed("c", end=b"data: " + json.dumps(ERROR).encode() + b"\n\n"),
            "a stream ended with",
        ),
        (429, HEADERS, json.dumps(ERROR).encode(), None),
        (429, HEADERS, b'{"detail": "no"}', "an error of another form"),
        (429, {}, json.dumps(ERROR).encode(), "no x-request-id"),
        (500, HEADERS, json.dumps(ERROR).encode(), "status 500"),
        (503, HEADERS, json.dumps(ERROR).encode(), "status 503"),
    ],
)
def test_wrong_answers_are_noticed(status: int, headers: Any, body: bytes, text: str | None) -> None:
    found = soak_requests.fault(CASE, status, headers, body, {0: ("cat", "")})
    assert found is None if text is None else found is not None and found.startswith(text)


def test_every_bad_request_that_is_answered_is_noticed() -> None:
    case = Case(name="", path="/v1/completions", body=b"{}", statuses=frozenset({400}))
    assert soak_requests.fault(case, 200, HEADERS, b"{}", None) == "status 200"


def sample(own: int, health: float = 1.0) -> dict[str, Any]:
    counts = dict.fromkeys(("files", "threads", "running", "waiting"), 9)
    return {"health_ms": health, "own": own, "resident": own, **counts}


def test_growing_memory_and_a_slow_loop_are_noticed() -> None:
    flat = soak.figures([sample(10**9)] * 50)
    assert soak.faults_of(flat, is_warm=True, is_strict=True) == []
    growing = soak.figures([sample(10**9 + n * 10**7, health=200.0) for n in range(50)])
    first, second = soak.faults_of(growing, is_warm=True, is_strict=True)
    assert first == "memory grew from 1,145,000,000 to 1,445,000,000 bytes"
    assert second == "100.0% of /health's answers took longer than 100 ms"
    assert soak.leaks({"files": 9, "threads": 9}, {"files": 30, "threads": 9}) == [
        "files: 9 before the load, 30 after it"
    ]
