"""Requests of `precast batch` with messages: tools, the choice of a tool, and variables of the template."""

import json
from pathlib import Path
from typing import Any

import pytest

from precast.loaders import batch
from precast.loaders.generation.sampling_params import SamplingParams

CALL = '<tool_call>\n{"name": "look", "arguments": {"n": 7}}\n</tool_call>'
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ mood }}"
    "{% if tools %} with {{ tools | length }} tools{% endif %}{# <tool_call> #}"
)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "walk", "parameters": SCHEMA}},
]


@pytest.fixture
def answered(scripted_model: Any, tmp_path: Path) -> Any:
    """Return a function that answers one chat of a batch; the model says a call of the tool "look"."""

    def run(**fields: Any) -> dict[str, Any]:
        model = scripted_model(CALL, TEMPLATE)
        model.manifest.files, model.manifest.prefixes = {}, ()
        line = {"messages": [{"role": "user", "content": "the cat"}], **fields}
        (tmp_path / "in.jsonl").write_text(json.dumps(line))
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        batch.run(
            model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", SamplingParams(max_tokens=99, echo=True)
        )
        found: dict[str, Any] = json.loads((tmp_path / "out.jsonl").read_text())
        return found

    return run


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("choice", [None, "auto", "required", named("look")])
def test_the_model_may_call_or_must_call(answered: Any, choice: Any) -> None:
    if choice not in (None, "auto"):
        pytest.importorskip("llguidance")
    found = answered(tools=TOOLS, tool_choice=choice)
    assert found["text"] == "the cat with 2 tools"
    assert [call["function"]["name"] for call in found["tool_calls"]] == ["look"]


def test_a_named_tool_excludes_the_others(answered: Any) -> None:
    pytest.importorskip("llguidance")
    found = answered(tools=TOOLS, tool_choice=named("walk"))
    assert "error" not in found
    assert not any(call["function"]["name"] == "look" for call in found.get("tool_calls", ()))


def test_without_a_choice_of_tools_nothing_is_a_call(answered: Any) -> None:
    found = answered(tools=TOOLS, tool_choice="none")
    assert (found["text"], "tool_calls" in found) == (f"the cat{CALL}", False)


def test_variables_reach_the_template(answered: Any) -> None:
    assert answered(chat_template_kwargs={"mood": " is calm"})["text"] == f"the cat is calm{CALL}"


@pytest.mark.parametrize(
    "choice", ["look", 1, {"type": "function"}, {"type": "function", "name": "look"}, named("auto")]
)
def test_other_choices_are_refused(answered: Any, choice: Any) -> None:
    assert answered(tools=TOOLS, tool_choice=choice)["error"] == {
        "code": "invalid_request",
        "message": (
            'request: tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name":'
            f" NAME}}}}, found {choice!r:.80}."
        ),
    }


def test_a_choice_needs_a_tool_of_that_name(answered: Any) -> None:
    assert answered(tools=TOOLS, tool_choice=named("fly"))["error"]["message"] == (
        "tool_choice: expected 'required', 'auto' or the name of a tool, found 'fly'."
    )
    assert answered(tool_choice="required")["error"]["message"].startswith("tool_choice: expected tools, and")
