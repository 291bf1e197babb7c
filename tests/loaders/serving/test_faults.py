"""FAULTS 14 to 20, on a server of the tiny model: absurd parameters, bad grammars, long texts, slow bodies, UTF-8.

Further tests of these faults are in the files on connections, errors, limits and access.
"""

import asyncio
import json
import select
import socket
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import pytest

from precast.loaders.serving import requests
from precast.loaders.serving.errors import ApiError
from precast.loaders.serving.requests import Arriving, Disconnected, read_body
from precast.loaders.serving.settings import ServeSettings

TEXT: Mapping[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 4}
JSON = {"content-type": "application/json"}
# Absurd values of each parameter; most are refused, and some are legal.
ABSURD: Mapping[str, list[Any]] = {
    "n": [10**9, -1, 0, 3],
    "temperature": [-1, 1e-320, 2, 3, "hot"],
    "top_p": [0, 1e-300, 1, 2],
    "top_k": [-5, 0, 1, 2**62, 2**80],
    "min_p": [0, 1, -0.5],
    "presence_penalty": [-2, 2, 9],
    "frequency_penalty": [-2, 2, -3],
    "repetition_penalty": [1e-30, 1e30, 0, -1],
    "logit_bias": [{"99999999": 1}, {"-1": 1}, {str(i): -100 for i in range(320)}, {"5": 100}],
    "max_tokens": [0, 1, 2**62, 2**70, -1],
    "min_tokens": [0, 3, 2**62, -1],
    "seed": [-(2**63), 2**70, 0],
    "no_repeat_ngram_size": [1, 64, 65, -1],
    "logprobs": [0, 5, 21, -1],
    "stop": [[""], ["t"] * 16, ["a"] * 17, "\0"],
    "bad_words": [["the"], [""], ["\ud800"]],
    "stop_token_ids": [[5], [-1], [2**40]],
    "echo": [True],
    "best_of": [1, 10**9],
}
BAD_GRAMMARS: Mapping[str, dict[str, Any]] = {
    "60,000 nested groups": {"regex": "(" * 60_000 + ")" * 60_000},
    "9,000 nested groups": {"regex": "(" * 4500 + "a" + ")" * 4500},
    "backtracking": {"regex": "(a+)+(b+)+(a|a?)+$"},
    "nested counts": {"regex": "((a{1,999}){1,999}){1,999}"},
    "a lookahead": {"regex": "(?=a)b"},
    "no regex": {"regex": "[z-a"},
    "references in a circle": {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    "an unknown type": {"json_schema": {"type": "king"}},
    "a schema of a number": {"json_schema": 3},
    "a bad pattern": {"json_schema": {"type": "string", "pattern": "(((("}},
    "a grammar of noise": {"grammar": "\0start: ::= ("},
    "a grammar without an end": {"grammar": "start: start start"},
}


def answer(server: Any) -> str:
    status, _, body = server.request("/v1/completions", TEXT)
    assert status == 200
    return str(body["choices"][0]["text"])


@pytest.fixture
def unharmed(tiny_server) -> Iterator[None]:
    """After the test, the server is idle and answers as before."""
    before = answer(tiny_server)
    yield
    tiny_server.wait_for(lambda: tiny_server.running() == 0)
    assert answer(tiny_server) == before


@pytest.mark.parametrize("seed", range(4))
def test_fault_14_absurd_parameters_and_odd_combinations(tiny_server, unharmed, seed) -> None:
    random = Random(seed)
    for _ in range(15):
        names = random.sample(sorted(ABSURD), random.randint(1, 6))
        chosen = {name: random.choice(ABSURD[name]) for name in names}
        status, _, body = tiny_server.request("/v1/completions", {**TEXT, **chosen})
        assert status in (200, 400), (chosen, body)
        assert list(body) == ["error"] if status == 400 else body["choices"], (chosen, body)


@pytest.mark.parametrize("name", BAD_GRAMMARS)
def test_fault_15_a_bad_grammar_harms_nobody(tiny_server, unharmed, name) -> None:
    status, _, body = tiny_server.request("/v1/completions", {**TEXT, **BAD_GRAMMARS[name]})
    assert status in (200, 400), body
    if status == 400:
        assert len(body["error"]["message"]) < 1000
        assert body["error"]["type"] == "invalid_request_error"


def test_fault_16_health_is_answered_while_a_long_text_is_tokenised(tiny_server, unharmed) -> None:
    body = json.dumps({"model": "tiny", "prompt": "the cat " * 450_000}).encode()
    head = "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        for _ in range(10):
            assert tiny_server.request("/health")[0] == 200
        assert select.select([connection], [], [], 0)[0] == []  # the text is still being tokenised
        assert connection.recv(12) == b"HTTP/1.1 200"


# --- 17: bodies ---------------------------------------------------------------------------------------------


async def arriving(pieces: list[bytes], memory: Arriving, *, last: asyncio.Event | None = None) -> bytes:
    """Read a body whose pieces arrive one by one, the last of them after an event."""
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        if len(left) == 1 and last is not None:
            await last.wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    return await read_body(JSON, receive, 100, memory)


def test_fault_17_slow_senders_share_a_limit_of_memory() -> None:
    async def main() -> None:
        memory, end = Arriving(150), asyncio.Event()
        slow = asyncio.create_task(arriving([b"a" * 80, b"b"], memory, last=end))
        await asyncio.sleep(0.01)
        assert await arriving([b"c" * 60], memory) == b"c" * 60
        with pytest.raises(ApiError, match="Too many long requests are arriving; try again later") as caught:
            await arriving([b"c" * 40, b"c" * 40], memory)
        assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})
        end.set()
        assert await slow == b"a" * 80 + b"b"
        assert len(await arriving([b"c" * 40, b"c" * 40], memory)) == 80

    asyncio.run(main())


def test_fault_17_memory_of_bodies_that_never_arrive_is_free_again(monkeypatch) -> None:
    monkeypatch.setattr(requests, "_BODY_S", 0.05)

    async def leaving() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def main() -> None:
        memory = Arriving(100)
        with pytest.raises(ApiError) as caught:
            await arriving([b"a" * 90, b"b"], memory, last=asyncio.Event())
        assert caught.value.status == 408
        with pytest.raises(Disconnected):
            await read_body(JSON, leaving, 100, memory)
        with pytest.raises(ApiError) as caught:
            await arriving([b"a" * 90, b"b" * 90], memory)
        assert caught.value.status == 413
        assert len(await arriving([b"a" * 99], memory)) == 99

    asyncio.run(main())


def test_fault_18_only_this_machine_is_served_unless_told_otherwise() -> None:
    assert ServeSettings().host == "127.0.0.1"


# --- 20: UTF-8 ----------------------------------------------------------------------------------------------


def test_fault_20_characters_of_several_tokens_are_streamed_whole(tiny_server) -> None:
    wanted = "é🦊 日"
    ask = {**TEXT, "choice": [wanted], "max_tokens": 40, "stream": True}
    text = tiny_server.request("/v1/completions", ask)[2]
    parts = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    pieces = [part["choices"][0]["text"] for part in parts]
    assert "".join(pieces) == wanted
    assert len([piece for piece in pieces if piece]) > 2


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_fault_20_a_character_cut_short_is_valid_text(tiny_server, tokens) -> None:
    for stream in (False, True):
        ask = {**TEXT, "choice": ["🦊"], "max_tokens": tokens, "stream": stream}
        status, _, body = tiny_server.request("/v1/completions", ask)
        assert status == 200
        assert "\ufffd" in json.dumps(body, ensure_ascii=False)


@pytest.mark.parametrize(
    "model", [b"\\ud800", b"\\udfff x", b"\xc3\xa9\xf0\x9f\xa6\x8a", b"\xed\xa0\x80", b"\xff"]
)
def test_fault_20_error_texts_are_valid(tiny_server, model) -> None:
    data = b'{"model": "' + model + b'", "prompt": "a"}'
    status, _, body = tiny_server.request("/v1/completions", data)  # decodes the body strictly
    assert status in (400, 404)
    assert body["error"]["message"].isprintable()
