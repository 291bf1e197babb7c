"""Requests that clients of docs/clients.md really sent: headers and bodies, recorded with the clients' defaults."""

import json
from pathlib import Path
from typing import Any

import pytest

RECORDED = json.loads((Path(__file__).parent / "clients.json").read_text())
ENDS = {"/v1/chat/completions": "data: [DONE]\n\n", "/v1/messages": 'data: {"type":"message_stop"}\n\n'}


def events_of(answer: Any) -> list[Any]:
    """Return a chat completion, or the events of one; a slow stream also contains comments."""
    if isinstance(answer, dict):
        return [answer]
    data = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


def calls_of(answer: Any) -> list[Any]:
    """Return the tool calls in a chat completion, or in the events of one."""
    choices = [choice for each in events_of(answer) for choice in each["choices"]]
    parts = [choice.get("delta") or choice.get("message") or {} for choice in choices]
    return [call for part in parts for call in part.get("tool_calls") or []]


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["client"])
def test_requests_of_clients(demo_server, recorded) -> None:
    body = {"model": "tools", **recorded["body"]}
    status, headers, answer = demo_server.request(recorded["path"], body, headers=recorded["headers"])
    assert status == 200, answer
    if body.get("stream"):
        assert headers["content-type"].startswith("text/event-stream")
        assert answer.endswith(ENDS[recorded["path"]])
    if body.get("tool_choice", "auto") == "auto":
        return
    (tool,) = body["tools"]
    (call,) = calls_of(answer)
    assert call["function"]["name"] == tool["function"]["name"]
    assert (
        json.loads(call["function"]["arguments"]).keys()
        == tool["function"]["parameters"]["properties"].keys()
    )


TOOL = {
    "type": "object",
    "properties": {"place": {"type": "string", "maxLength": 20}},
    "required": ["place"],
}
QUESTION = [{"role": "user", "content": "What is the weather in Paris, London and Rome?"}]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("is_parallel", "most"), [(True, 16), (False, 1)])
def test_parallel_calls_of_chat_completions(demo_server, is_parallel, most, is_stream) -> None:
    """Without parallel calls, the answer ends after its first call, and its cost counts only that call."""
    body = {
        "model": "tools",
        "messages": QUESTION,
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": TOOL}}],
        "tool_choice": "required",
        "parallel_tool_calls": is_parallel,
        "n": 2,
        "stream": is_stream,
        "stream_options": {"include_usage": True} if is_stream else None,
    }
    status, _, answer = demo_server.request("/v1/chat/completions", body)
    assert status == 200
    events = events_of(answer)
    reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert reasons == ["tool_calls", "tool_calls"]
    calls = calls_of(answer)
    assert (len(calls) > 2) == is_parallel
    assert len(calls) <= 2 * most
    assert (events[-1]["usage"]["completion_tokens"] > 100) == is_parallel


def test_parallel_calls_of_the_other_apis(demo_server) -> None:
    tool = {"type": "function", "name": "weather", "parameters": TOOL}
    given = {"model": "tools", "input": QUESTION, "tools": [tool], "tool_choice": "required"}
    answer = demo_server.request("/v1/responses", {**given, "parallel_tool_calls": False})[2]
    assert ([item["type"] for item in answer["output"]], answer["status"]) == (["function_call"], "completed")
    assert answer["parallel_tool_calls"] is False
    value = {
        "model": "tools",
        "max_tokens": 400,
        "messages": QUESTION,
        "tools": [{"name": "weather", "input_schema": TOOL}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    answer = demo_server.request("/v1/messages", value)[2]
    assert ([block["type"] for block in answer["content"]], answer["stop_reason"]) == (
        ["tool_use"],
        "tool_use",
    )
