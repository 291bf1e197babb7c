"""Answers as the commands print them: reasoning, tool calls and log-probabilities."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from precast.loaders.console import answer, terminal
from precast.loaders.console.run import AnswerOptions
from precast.loaders.generation.logprobs import TokenLogprob
from precast.loaders.text.answer_parser import ContentDelta, ReasoningDelta, ToolCallDelta
from precast.loaders.text.tool_calls import ToolCall

CALL = ToolCall("abc123def", "look\u202e", '{"at": "\x1b[2J é"}')
DELTAS = [
    ReasoningDelta("hm"),
    ReasoningDelta("\x1b[2J"),
    ContentDelta("I "),
    ContentDelta("look."),
    ToolCallDelta(0, CALL),
    ToolCallDelta(1, CALL),
    ContentDelta("Bye."),
]
LINE = '{"name": "look\\u202e", "arguments": {"at": "\\u001b[2J é"}}'


def stream_of(deltas: list[Any]) -> Any:
    """Return a stream that has said deltas."""

    class Said:
        is_split = True
        completion = SimpleNamespace(tool_calls=[d.call for d in deltas if isinstance(d, ToolCallDelta)])

        def events(self):
            return iter(deltas)

        def __iter__(self):
            return iter([d.text for d in deltas if isinstance(d, ContentDelta)])

    return Said()


@pytest.fixture
def colours(monkeypatch, request):
    monkeypatch.setattr(answer, "has_colours", lambda: request.param)


@pytest.mark.parametrize(
    ("colours", "thought"),
    [(True, "\x1b[2mhm\x1b[0m\x1b[2m\ufffd[2J\x1b[0m"), (False, "<think>\nhm\ufffd[2J\n</think>")],
    indirect=["colours"],
)
def test_a_terminal_shows_everything(colours, thought):
    shown = "".join(answer.write(stream_of(DELTAS), is_terminal=True))
    assert shown == f"{thought}\n\nI look.\n{LINE}\n{LINE}\nBye."


def test_a_pipe_gets_content_and_then_calls():
    assert "".join(answer.write(stream_of(DELTAS), is_terminal=False)) == f"I look.Bye.\n{LINE}\n{LINE}"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("TERM", "xterm", True), ("TERM", "dumb", False), ("NO_COLOR", "1", False)],
)
def test_colours(monkeypatch, name, value, expected):
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    assert terminal.has_colours() is expected


def test_details_of_a_json_line():
    impossible = TokenLogprob(3, "x", -float("inf"))
    completion = SimpleNamespace(
        reasoning="hm",
        tool_calls=(CALL,),
        logprobs=(TokenLogprob(7, "a", -0.12345678, (TokenLogprob(7, "a", -0.12345678), impossible)),),
        prompt_logprobs=(None, impossible),
    )
    found = answer.details(completion, AnswerOptions(logprobs=2, prompt_logprobs=0))
    first = {"token_id": 7, "text": "a", "logprob": -0.123457}
    last = {"token_id": 3, "text": "x", "logprob": -9999.0}
    assert found == {
        "reasoning": "hm",
        "tool_calls": [{"id": "abc123def", "name": CALL.name, "arguments": CALL.arguments}],
        "logprobs": [{**first, "top": [first, last]}],
        "prompt_logprobs": [None, {**last, "top": []}],
    }
    json.dumps(found, allow_nan=False)
    empty = SimpleNamespace(reasoning="", tool_calls=(), logprobs=(), prompt_logprobs=())
    assert answer.details(empty, AnswerOptions()) == {}
