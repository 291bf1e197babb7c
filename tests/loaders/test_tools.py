"""Malformed tools cause the same error in a chat, a batch, a prefix, and on the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from precast.loaders import batch
from precast.loaders.add_prefix import PrefixSource, prefix_tokens
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.console.answer import read_tools
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.text.chat_template import ChatOptions
from precast.loaders.text.tools import checked_tools

GOOD: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
FORM = (
    '{"type": "function", "function": {"name": string, "description": string, "parameters":'
    " JSON Schema of an object}}"
)
MESSAGES = [{"role": "user", "content": "the cat"}]


def named(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"items": value}
    return value


# The malformed tool, which follows a valid one, and the end of the error message.
MALFORMED: list[tuple[Any, str]] = [
    (3, "found int"),
    (None, "found NoneType"),
    ("look", "found str"),
    ([GOOD], "found list"),
    ({}, "found no name"),
    ({"function": 3}, "found a function of type int"),
    ({"function": None}, "found a function of type NoneType"),
    ({"type": "function", "function": "look"}, "found a function of type str"),
    ({"type": "function", "function": [GOOD["function"]]}, "found a function of type list"),
    ({"type": "function", "function": {}}, "found no name"),
    ({"type": "function"}, "found no name"),
    ({"type": "web_search", "name": "f"}, "found the type 'web_search'"),
    ({"type": 3, "function": {"name": "f"}}, "found the type 3"),
    ({"parameters": {}}, "found no name"),
    (named(name=3), "found a name of type int"),
    (named(name=None), "found a name of type NoneType"),
    (named(name=""), "found a name of 0 characters; give it 1 to 256"),
    (named(name=" \n"), "found a name of 0 characters; give it 1 to 256"),
    (named(name="f" * 1257), "found a name of 1,257 characters; give it 1 to 256"),
    (named(name="look"), "found the name 'look' for a second time"),
    ({"name": "look"}, "found the name 'look' for a second time"),
    (named(description=3), "found a description of type int"),
    (named(description=["a"]), "found a description of type list"),
    (named(parameters=3), "found parameters of type int"),
    (named(parameters="{}"), "found parameters of type str"),
    (named(parameters=[]), "found parameters of type list"),
    (named(parameters=True), "found parameters of type bool"),
    (named(parameters={"type": "string"}), "found parameters for values of type 'string'"),
    (
        named(parameters={"type": ["object", "null"]}),
        "found parameters for values of type ['object', 'null']",
    ),
    (named(parameters={"properties": []}), "found properties of type list"),
    (named(parameters={"properties": None}), "found properties of type NoneType"),
]
ERRORS = [(tool, f"expected tools[1] to be a tool {FORM}, {found}.") for tool, found in MALFORMED]
ERRORS.append(
    (
        named(parameters=deep(70)),
        "expected tools[1] to be nested at most 64 levels deep, found more; flatten it.",
    )
)
NO_JSON = (
    "expected tools to be JSON, found a number that is not finite or has too many digits, or a string with a lone"
    " surrogate."
)
# Tools that no JSON file can hold, or that a strict parser of JSON refuses.
OBJECTS: list[tuple[Any, str]] = [
    (print, f"expected tools[1] to be a tool {FORM}, found a function; give its JSON schema."),
    (named(parameters={"a": {1, 2}}), "expected tools[1] to be plain JSON, found a value of type set."),
    (named(x={3: 4}), "expected tools[1] to be plain JSON, found a value of type dict with keys that are not strings."),
    (named(parameters={"maximum": float("nan")}), NO_JSON),
    (named(parameters={"maximum": float("inf")}), NO_JSON),
    (named(parameters={"maximum": 10**5000}), NO_JSON),
    (named(description="\ud800"), NO_JSON),
]  # fmt: skip
NO_LISTS = [3, "look", GOOD, {"tools": [GOOD]}, b"[]", True]


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(PrecastError) as raised:
        work()
    return str(raised.value)


@pytest.mark.parametrize(("tool", "text"), ERRORS + OBJECTS)
def test_a_malformed_tool_is_refused_at_every_entry(scripted_model: Any, tool: Any, text: str) -> None:
    model = scripted_model("hello", "{% for m in messages %}{{ m['content'] }}{% endfor %}{# <tool_call> #}")
    tools = [GOOD, tool]
    entries: list[Callable[[], object]] = [
        lambda: checked_tools(tools),
        lambda: model.chat(MESSAGES, tools=tools),
        lambda: model.chat(MESSAGES, tools=tools, tool_choice="required"),
        lambda: model.chat(MESSAGES, tools=tools, tool_choice="look", answer_format="mistral"),
        lambda: model.chat(MESSAGES, tools=tools, literal=True),
        lambda: model.stream_chat(MESSAGES, tools=tools),
        lambda: model.chat_each([MESSAGES], tools=tools),  # before the first conversation
        lambda: model.chat_answers(MESSAGES, 2, tools=tools),
        lambda: model.chat_prompt(MESSAGES, tools=tools),
        lambda: model.tokenizer.render_chat(MESSAGES, ChatOptions(tools=tools)),
        lambda: prefix_tokens(model, PrefixSource(system="a", tools=tools)),
    ]
    for entry in entries:
        assert refusal(entry) == f"Chat: {text}"
    assert model.scheduler.stats().steps == 0


@pytest.mark.parametrize("tools", NO_LISTS)
def test_other_values_than_lists_are_refused(scripted_model: Any, tools: Any) -> None:
    model = scripted_model("hello", "x")
    text = f"Chat: expected tools to be a list of tools, found {type(tools).__name__}."
    assert refusal(lambda: model.chat(MESSAGES, tools=tools)) == text
    assert refusal(lambda: model.chat_each([MESSAGES], tools=tools)) == text
    assert refusal(lambda: model.chat_prompt(MESSAGES, tools=tools)) == text


def test_a_line_of_a_batch_has_the_same_error(slots_model: Any, tmp_path: Path) -> None:
    lines = [{"messages": MESSAGES, "tools": [GOOD, tool]} for tool, _ in ERRORS]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    batch.run(slots_model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", SamplingParams(max_tokens=1))
    found = [
        json.loads(line)["error"]["message"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ]
    assert found == [f"Chat: {text}" for _, text in ERRORS]


@pytest.mark.parametrize(("tool", "text"), ERRORS)
def test_a_file_of_tools_has_the_same_error(tmp_path: Path, tool: Any, text: str) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([GOOD, tool]))
    assert refusal(lambda: read_tools(path)) == f"--tools {path}: {text}"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{}", "expected tools to be a list of tools, found dict."),
        (
            b"[",
            "expected JSON, found something else (Expecting value: line 1 column 2 (char 1)); write a JSON array",
        ),
        (
            b"\xff",
            "expected JSON, found something else ('utf-8' codec can't decode byte 0xff in position 0: invalid",
        ),
        (b"[" * 100_000, "the JSON is nested too deeply; write a JSON array of tools."),
        (b'[{"name": "f", "name": "g"}]', "expected JSON, found something else ("),
        (b'[{"name": "f", "x": NaN}]', "expected JSON, found something else ("),
    ],
)
@pytest.mark.parametrize("command", [["run", "--chat", "-p", "a"], ["add-prefix"]])
def test_the_command_line_names_the_file(
    cli: Callable[..., Any],
    tiny_artifact: Path,
    tmp_path: Path,
    command: list[str],
    content: bytes,
    text: str,
) -> None:
    (tmp_path / "tools.json").write_bytes(content)
    (tmp_path / "system.txt").write_text("a")
    name, *options = command
    if name == "add-prefix":
        options = ["name", "--system", str(tmp_path / "system.txt")]
    result = cli(name, tiny_artifact, *options, "--tools", tmp_path / "tools.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error: --tools {tmp_path}/tools.json: {text}" in result.stderr


def test_good_tools_stay_as_they_are() -> None:
    tools = [
        GOOD,
        {"name": "bare"},
        {"type": "function", "name": "flat", "parameters": None, "strict": True},
        named(description=None, parameters={}, **{"return": {"type": "number"}}),
        named(name="say-hi.2", parameters={"$defs": {}, "anyOf": [{"type": "object"}]}),
    ]
    assert checked_tools(tuple(tools)) == tools
    assert checked_tools([]) == []
