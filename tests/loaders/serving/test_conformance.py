"""Answers of the demo model have the described form, and that of Open Responses and of Anthropic."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from precast.loaders.serving.description import openapi
from precast.loaders.serving.routes import ROUTES

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
FUNCTION = {"name": "weather", "description": "Return the weather at a place.", "parameters": PLACE}
QUESTION = "What is the weather in Lisbon?"
CHAT = [{"role": "user", "content": QUESTION}]
ITEM = {"type": "message", "role": "user", "content": QUESTION}
# The keys of a response that the Open Responses specification of April 2026 requires.
REQUIRED = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "instructions"),
    *("previous_response_id", "output", "error", "tools", "tool_choice", "truncation", "text", "reasoning"),
    *("parallel_tool_calls", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs", "temperature"),
    *("usage", "max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata"),
    *("safety_identifier", "prompt_cache_key"),
}


def check(path: str, method: str, body: Any) -> None:
    """Compare a reply with the server's description."""
    described = openapi(ROUTES)
    schema = described["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
    Draft202012Validator({**schema, "components": described["components"]}).validate(body)


def events(text: str) -> list[dict[str, Any]]:
    """Return the data of the events of a stream."""
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {"messages": CHAT, "tools": [{"type": "function", "function": FUNCTION}]}),
        ("/v1/completions", {"prompt": ["Lisbon is", "Rome is"], "echo": True, "logprobs": 1}),
        ("/v1/responses", {"input": QUESTION, "metadata": {"a": "b"}}),
        ("/v1/responses", {"input": [ITEM], "tools": [{"type": "function", **FUNCTION}]}),
        (
            "/v1/responses",
            {"input": QUESTION, "text": {"format": {"type": "json_schema", "name": "a", "schema": PLACE}}},
        ),
        ("/v1/messages", {"messages": CHAT, "stop_sequences": ["e"]}),
        ("/v1/messages/count_tokens", {"messages": CHAT}),
        ("/tokenize", {"messages": CHAT, "return_token_strs": True}),
        ("/detokenize", {"tokens": [1, 2, 3]}),
    ],
)
def test_replies_fit_the_description(demo_server, path, body) -> None:
    limit = {"/v1/responses": {"max_output_tokens": 12}, "/v1/messages/count_tokens": {}}
    limits = limit.get(path, {} if path.endswith("tokenize") else {"max_tokens": 12})
    status, _, reply = demo_server.request(path, {"model": "tools", **limits, **body})
    assert status == 200, reply
    check(path, "post", reply)


def test_lists_and_states_fit_the_description(demo_server) -> None:
    for path, given in (("/v1/models/{model}", "/v1/models/demo"), ("/v1/models",) * 2, ("/ready",) * 2):
        check(path, "get", demo_server.request(given)[2])


@pytest.mark.parametrize(
    ("path", "tool", "choice"),
    [
        ("/v1/chat/completions", {"type": "function", "function": FUNCTION}, "required"),
        ("/v1/responses", {"type": "function", **FUNCTION}, "required"),
        ("/v1/messages", {"name": "weather", "input_schema": PLACE}, {"type": "any"}),
    ],
)
def test_a_tool_with_an_open_schema_is_called(demo_server, path, tool, choice) -> None:
    """The model would invent further arguments without end, if it were free to."""
    is_response = path == "/v1/responses"
    limits = {"input": CHAT, "max_output_tokens": 60} if is_response else {"messages": CHAT, "max_tokens": 60}
    body = {"model": "tools", "tools": [tool], "tool_choice": choice, **limits}
    status, _, reply = demo_server.request(path, body)
    assert status == 200, reply
    check(path, "post", reply)
    if path == "/v1/messages":
        arguments = reply["content"][0]["input"]
    elif is_response:
        arguments = json.loads(reply["output"][0]["arguments"])
    else:
        arguments = json.loads(reply["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    assert list(arguments) == ["place"]


@pytest.mark.parametrize(
    "given",
    [
        [ITEM],
        [{"type": "message", "role": "system", "content": "Answer like a pirate."}, ITEM],
        [ITEM, {"type": "message", "role": "assistant", "content": "Sunny."}, ITEM],
        [{**ITEM, "role": "assistant", "phase": "commentary"}, ITEM],
    ],
)
def test_open_responses_cases(demo_server, given) -> None:
    body = {"model": "demo", "input": given, "max_output_tokens": 12}
    whole = demo_server.request("/v1/responses", body)[2]
    stream = events(demo_server.request("/v1/responses", body | {"stream": True})[2])
    last = stream[-1]["response"]
    for response in (whole, last):
        assert response.keys() >= REQUIRED
        check("/v1/responses", "post", response)
        assert response["output"][0]["content"][0]["text"]
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert stream[-1]["type"] == f"response.{whole['status']}"
    assert stream[0]["response"].keys() >= REQUIRED


def test_sampling_parameters_in_a_response(demo_server) -> None:
    body = {"model": "demo", "input": QUESTION, "max_output_tokens": 1}
    plain = demo_server.request("/v1/responses", body)[2]
    chosen = demo_server.request("/v1/responses", body | {"temperature": 0.25, "top_p": 0.5})[2]
    assert (chosen["temperature"], chosen["top_p"]) == (0.25, 0.5)
    assert (plain["presence_penalty"], plain["frequency_penalty"]) == (0.0, 0.0)
    assert isinstance(plain["temperature"], float)


@pytest.mark.parametrize("number", [0, 1, 0.0])
def test_a_number_is_no_boolean(tiny_server, number) -> None:
    body = {"model": "tiny", "input": "fox", "background": number}
    status, _, reply = tiny_server.request("/v1/responses", body)
    assert (status, reply["error"]["param"]) == (400, "background")
    assert reply["error"]["message"] == f"background: expected a boolean, found {number}."
