"""Every kind of error has the API's own form: of routes, bodies and parameters."""

import json
import socket
from typing import Any

import pytest

from precast.loaders.serving.openai.schemas import ChatRequest
from precast.loaders.serving.schema import parse

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def fault(server: Any, path: str, value: Any, **options: Any) -> tuple[int, dict[str, Any]]:
    status, headers, body = server.request(path, value, **options)
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return status, body["error"]


@pytest.mark.parametrize(
    ("change", "param", "code", "text"),
    [
        ({"foo": 1}, "foo", "unknown_parameter", "Unknown or unsupported parameter: 'foo'."),
        ({"messages": None}, "messages", "invalid_value", "messages: expected a valid array, found None."),
        ({"model": 3}, "model", "invalid_value", "model: expected a valid string, found 3."),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content",
            "invalid_value",
            "messages[0].content: expected a valid string, found 3.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
            "messages[0].content[0].type",
            "invalid_value",
            "messages[0].content[0].type: expected 'text', found 'image_url'.",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "x": 1}]},
            "messages[0].x",
            "unknown_parameter",
            "Unknown or unsupported parameter: 'messages[0].x'.",
        ),
        (
            {"temperature": 2.5},
            "temperature",
            "invalid_value",
            "temperature: expected less than or equal to 2, found 2.5.",
        ),
        ({"n": 10**9}, "n", "invalid_value", "n: expected less than or equal to 128, found 1000000000."),
        ({"n": 0}, "n", "invalid_value", "n: expected greater than or equal to 1, found 0."),
        ({"n": True}, "n", "invalid_value", "n: expected a valid integer, found True."),
        ({"seed": 2**70}, "seed", "invalid_value", None),
        ({"top_p": -0.1}, "top_p", "invalid_value", None),
        ({"max_tokens": 0}, "max_tokens", None, "max_tokens: expected at least 1, found 0."),
        ({"max_tokens": -1}, "max_tokens", "invalid_value", None),
        ({"stop": [""]}, None, None, "stop must be a list of non-empty strings, found ('',)."),
        ({"stop": ["a"] * 17}, "stop", None, "stop: expected at most 16 strings, found 17."),
        ({"logit_bias": {"99999": 1}}, None, None, None),
        ({"logit_bias": {"fox": 1}}, None, None, None),
        ({"logit_bias": {"3": 101}}, None, None, None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None, None),
        ({"top_logprobs": 3}, "top_logprobs", None, None),
        (
            {"tool_choice": "required"},
            "tool_choice",
            None,
            "tool_choice: expected tools with tool_choice, found none.",
        ),
        ({"tools": [TOOL], "tool_choice": "required"}, None, None, None),
        ({"tools": [TOOL, TOOL]}, None, None, None),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", None, None),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None, None),
        ({"max_completion_tokens": 3}, "max_tokens", None, None),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "invalid_value", None),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unknown_parameter", None),
        ({"messages": []}, None, None, "Chat: expected a list of at least one message, found an empty list."),
        ({"messages": [{"role": "user"}]}, "messages", None, None),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "invalid_value", None),
        ({"chat_template_kwargs": {"messages": []}}, None, None, None),
        ({"regex": "(((a{1000}){1000}){1000}"}, None, None, None),
        ({"regex": "a", "choice": ["b"]}, None, None, None),
        ({"no_repeat_ngram_size": 65}, "no_repeat_ngram_size", "invalid_value", None),
        ({"bad_words": ["a"] * 257}, "bad_words", "invalid_value", None),
        (
            {"logit_bias": {str(i): "a" for i in range(1234)}},
            None,
            "invalid_value",
            "The body must have at most 100 unknown or invalid parameters, found 1,234.",
        ),
        (
            {"messages": [3] * 1000},
            "messages[0]",
            "invalid_value",
            "messages[0]: expected an object, found 3.",
        ),
    ],
)
def test_chat_parameters(tiny_server, change, param, code, text) -> None:
    status, error = fault(tiny_server, "/v1/chat/completions", CHAT | change)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"].endswith(".")
    if text is not None:
        assert error["message"] == text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"prompt": ""}, None),
        ({"prompt": [1, "a"]}, None),
        ({"prompt": [99999]}, None),
        ({"prompt": [-1]}, None),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "a"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_completion_parameters(tiny_server, change, param) -> None:
    status, error = fault(tiny_server, "/v1/completions", TEXT | change)
    assert status == 400
    if param is not None:
        assert error["param"] == param


def test_a_missing_parameter(tiny_server) -> None:
    status, error = fault(tiny_server, "/v1/chat/completions", {"messages": CHAT["messages"]})
    assert (status, error["param"], error["code"]) == (400, "model", "missing_required_parameter")


def test_a_prompt_beyond_the_context(tiny_server) -> None:
    status, error = fault(tiny_server, "/v1/completions", TEXT | {"prompt": [5] * 64})
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")


def test_an_unknown_model(tiny_server) -> None:
    for path, value in (("/v1/chat/completions", CHAT | {"model": "x"}), ("/v1/models/x", None)):
        status, error = fault(tiny_server, path, value)
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"nul",
        b"\xff",
        b'{"model": "tiny", "model": NaN}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"messages":' * 10_000,
        json.dumps(CHAT).encode()[:-1],
        json.dumps(CHAT).encode().replace(b"fox", b"\xc3"),
        json.dumps(CHAT).encode().replace(b": 4", b": Infinity"),
        json.dumps(CHAT).encode().replace(b": 4", b": 1e999"),
    ],
)
def test_malformed_json(tiny_server, body) -> None:
    status, error = fault(tiny_server, "/v1/chat/completions", body)
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_fault_14_extreme_but_legal_parameters(tiny_server) -> None:
    extremes = {
        "temperature": 1e-30,
        "top_p": 0,
        "top_k": 2**62,
        "min_p": 1,
        "presence_penalty": -2,
        "frequency_penalty": -2,
        "repetition_penalty": 1e30,
        "logit_bias": {str(i): -100 for i in range(320)},
        "max_tokens": 2**62,
        "min_tokens": 0,
        "seed": -(2**63),
        "ignore_eos": False,
        "no_repeat_ngram_size": 1,
    }
    status, _, body = tiny_server.request("/v1/chat/completions", CHAT | extremes)
    assert status in (200, 400), body
    assert tiny_server.request("/v1/chat/completions", CHAT)[0] == 200


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [
        ("/nothing", "GET", 404, "unknown_path"),
        ("/v1/chat/completions/", "POST", 404, "unknown_path"),
        ("/v1/chat/completions", "GET", 405, "method_not_allowed"),
        ("/v1/models", "POST", 405, "method_not_allowed"),
        ("/health", "DELETE", 405, "method_not_allowed"),
    ],
)
def test_routes(tiny_server, path, method, status, code) -> None:
    found, error = fault(tiny_server, path, {} if method == "POST" else None, method=method)
    assert (found, error["code"]) == (status, code)


def test_another_content_type(tiny_server) -> None:
    """A web page can send text without asking the server first, but not JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, error = fault(tiny_server, "/v1/completions", TEXT, headers={"content-type": kind})
        assert (status, error["code"]) == (415, "unsupported_media_type")


def test_a_body_that_is_too_long(tiny_server) -> None:
    """The client gets the reply although the server does not read the body."""
    for size in (4 << 20, 32 << 20):
        body = b" " * size + b"{}"
        assert fault(tiny_server, "/v1/completions", body)[1]["code"] == "body_too_large"
        assert tiny_server.request("/v1/completions", body)[:2][1]["connection"] == "close"


def test_connections_after_a_refusal(tiny_server) -> None:
    """A connection stays open only if the body has been read."""
    assert "connection" not in tiny_server.request("/v1/completions", {"x": 1})[1]
    assert tiny_server.request("/nothing", {"x": 1})[1]["connection"] == "close"
    assert "connection" not in tiny_server.request("/nothing")[1]


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "-1" + "0" * 400 + ".0"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_numbers_that_are_not_finite(tiny_server, path, number) -> None:
    function = '{"name":"look","parameters":{"type":"object","minimum":NUMBER}}'.replace("NUMBER", number)
    if path == "/v1/responses":
        body = '{"model":"tiny","input":"fox","tools":[{"type":"function",' + function[1:] + "]}"
    else:
        body = json.dumps(CHAT)[:-1] + ',"tools":[{"type":"function","function":' + function + "}]}"
    status, error = fault(tiny_server, path, body.encode())
    assert status == 400
    assert error["message"] == f"The body must be JSON with finite numbers only, found {number:.60}."


def test_large_integers_and_words_are_no_such_numbers() -> None:
    text = "NaN Infinity 1e999 " + "0" * 300
    given = parse(
        ChatRequest, json.dumps(CHAT | {"prediction": {"a": 10**5000 % 10**400, "b": text}}).encode()
    )
    assert given.prediction == {"a": 10**5000 % 10**400, "b": text}


def test_the_log_cuts_names_of_models(tiny_server) -> None:
    headers = {"x-request-id": "named"}
    tiny_server.request("/v1/completions", TEXT | {"model": "m" * 100_000}, headers=headers)
    (record,) = tiny_server.wait_for(lambda: tiny_server.records(request_id="named"))
    assert record["model"] == "m" * 200


def test_a_body_cut_short(tiny_server) -> None:
    """The server stays well, and logs a closed connection."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
        connection.sendall(head + b"x-request-id: short\r\ncontent-length: 100\r\n\r\n{")
    (record,) = tiny_server.wait_for(lambda: tiny_server.records(request_id="short"))
    assert record["status"] == 499
    assert tiny_server.request("/v1/completions", TEXT)[0] == 200


def test_fault_17_chunks_of_one_byte(tiny_server) -> None:
    body = json.dumps(TEXT).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
        connection.sendall(
            head + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200")


def test_fault_17_huge_headers(tiny_server) -> None:
    with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 100_000)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400")


def test_request_ids(tiny_server) -> None:
    assert tiny_server.request("/health", headers={"x-request-id": "mine-1"})[1]["x-request-id"] == "mine-1"
    found = tiny_server.request("/health", headers={"x-request-id": "a b\tc"})[1]["x-request-id"]
    assert found.startswith("req-")
