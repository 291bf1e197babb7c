"""Tool calls and reasoning in answers: the parser recovers them from rendered templates, cut into any pieces."""

# ruff: noqa: E501 - templates are easier to read on one line

import itertools
import json
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.text import answer_parser, tool_calls
from precast.loaders.text.answer_formats import answer_format
from precast.loaders.text.answer_parser import AnswerParser, ContentDelta, ReasoningDelta, ToolCallDelta
from precast.loaders.text.chat_template import ChatOptions, ChatTemplate
from precast.loaders.text.tool_calls import ToolCall, tool_schemas, typed

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {}}},
    {"name": "get-time.v2", "parameters": {}},
]
SCHEMAS = tool_schemas(TOOLS)

# Templates that write an assistant's message as the published ones of their family do.
_HERMES = """{%- if m.content and m.tool_calls %}{{ m.content + '\\n' }}{% else %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{- '' if loop.first else '\\n' }}{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}{% endfor %}"""
TEMPLATES = {
    "hermes": _HERMES,
    "qwen3": "{%- if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    + _HERMES,
    "llama3-json": """{#- <|python_tag|> #}{{- m.content }}{%- for call in m.tool_calls or [] %}{{- '; ' if not loop.first }}{{- '{"name": "' + call.function.name + '", "parameters": ' }}{{- call.function.arguments | tojson }}{{- '}' }}{% endfor %}""",
    "llama3-tag": """{{- m.content }}{%- for call in m.tool_calls or [] %}{{- '<|python_tag|>' }}{{- {'type': 'function', 'name': call.function.name, 'parameters': call.function.arguments} | tojson }}{% endfor %}""",
    "mistral-v3": """{{- m.content }}{%- if m.tool_calls %}{{ '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}{%- set out = call.function | tojson %}{{- out[:-1] + ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last }}{%- endfor %}{{ ']' }}{% endif %}""",
    "mistral-v11": """{%- if m.reasoning_content %}{{ '[THINK]' + m.reasoning_content + '[/THINK]' }}{% endif %}{{- m.content }}{%- for call in m.tool_calls or [] %}{{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' + call.function.arguments | tojson }}{%- endfor %}""",
    "mistral-v13": """{{- m.content }}{%- for call in m.tool_calls or [] %}{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}{%- endfor %}""",
    "phi4": """{#- <|tool|> #}{{- m.content }}{%- for call in m.tool_calls or [] %}{{- '<|tool_call|>' + call.function | tojson + '<|/tool_call|>' }}{%- endfor %}""",
    "phi4-functools": """{#- functools[ #}{{- m.content }}{%- if m.tool_calls %}functools{{ m.tool_calls | map(attribute='function') | list | tojson }}{% endif %}""",
    "granite": """{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think><response>' + m.content + '</response>' }}{% else %}{{ m.content }}{% endif %}{%- if m.tool_calls %}{{ '<|tool_call|>' }}{{ m.tool_calls | map(attribute='function') | list | tojson }}{% endif %}""",
    "smollm3": "{#- python_tools <code> #}{%- if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif %}"
    + _HERMES,
}
# Families in which a call must be alone in the answer.
ALONE = {"llama3-json", "phi4-functools", "pythonic"}
REASONS = {"qwen3", "mistral-v11", "granite", "smollm3"}

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# Texts that look like the markup of the answer formats.
HOSTILE = st.sampled_from(
    ["</tool_call>", "<tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|/tool_call|>", "</think>", '"}}', "]", "\\", "{", "'", '"', "\n", "\\u0022", "; ", "<|python_tag|>", "<response>", "日本 😀"]
)  # fmt: skip
STRINGS = st.lists(st.one_of(TEXT, HOSTILE), max_size=3).map("".join)
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(STRINGS, inner, max_size=3)),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(STRINGS, VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(sorted(SCHEMAS)), ARGUMENTS), max_size=3)
PROSE = st.lists(
    st.sampled_from(
        ["Let me see.", " ", "\n", "日本 😀", "<", "a < b", "[1, 2]", "{}", "it's", "<tool", "func"]
    ),
    max_size=4,
).map("".join)


def parsed(parser: AnswerParser, pieces: list[str]) -> tuple[str, str, list[ToolCall]]:
    """Parse an answer in pieces; return its content, reasoning and calls."""
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    content = "".join(d.text for d in deltas if isinstance(d, ContentDelta))
    reasoning = "".join(d.text for d in deltas if isinstance(d, ReasoningDelta))
    calls = [d for d in deltas if isinstance(d, ToolCallDelta)]
    assert all(d.text for d in deltas if not isinstance(d, ToolCallDelta))
    assert [d.number for d in calls] == list(range(len(calls)))
    return content, reasoning, [d.call for d in calls]


def parse(
    text: str, form: str | None, template: str = "", tools: Any = SCHEMAS, tail: str = "", cuts: Any = ()
):
    ids = (f"call{n:05}" for n in itertools.count())
    parser = AnswerParser(answer_format(template, form), tools, prompt_tail=tail, new_id=lambda: next(ids))
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return parsed(parser, [text[a:b] for a, b in itertools.pairwise(places)])


def rendered(template: str, message: dict[str, Any]) -> str:
    body = "{% set m = messages[1] %}" + template
    chat = ChatTemplate(body, bos_token=None, eos_token=None)
    messages = [{"role": "user", "content": "?"}, message]
    return chat.render(messages, ChatOptions(add_generation_prompt=False))


@pytest.mark.parametrize("family", TEMPLATES)
@settings(deadline=None, max_examples=60)
@given(prose=PROSE, thought=PROSE, calls=CALLS, cuts=st.lists(st.integers(0, 10**6), max_size=12))
def test_a_rendered_message_is_parsed_back(family, prose, thought, calls, cuts):
    template = TEMPLATES[family]
    prose = "" if family in ALONE and calls else prose.strip()
    thought = thought.strip() if family in REASONS else ""
    message = {
        "role": "assistant",
        "content": prose,
        **({"reasoning_content": thought} if thought else {}),
        "tool_calls": [
            {"id": f"id0000{n:03}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments) in enumerate(calls)
        ],
    }
    content, reasoning, found = parse(rendered(template, message), None, template, cuts=cuts)
    assert content == prose
    assert reasoning == thought
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    has_ids = family in ("mistral-v3", "mistral-v11")
    assert [c.id for c in found] == [f"{'id0000' if has_ids else 'call00'}{n:03}" for n in range(len(calls))]


# Python's syntax


PYTHON_KEYS = st.sampled_from(["city", "days", "größe", "_x1"])
PYTHON_CALLS = st.lists(
    st.tuples(st.sampled_from(["weather", "now_2"]), st.dictionaries(PYTHON_KEYS, VALUES, max_size=3)),
    min_size=1,
    max_size=3,
)


def python_call(name: str, arguments: dict[str, Any], show: Any) -> str:
    return f"{name}({', '.join(f'{key}={show(value)}' for key, value in arguments.items())})"


@settings(deadline=None, max_examples=150)
@given(
    calls=PYTHON_CALLS,
    cuts=st.lists(st.integers(0, 10**6), max_size=12),
    show=st.sampled_from([repr, json.dumps]),
    family=st.sampled_from(["pythonic", "llama3"]),
)
def test_calls_in_python_are_parsed_back(calls, cuts, show, family):
    text = "[" + ", ".join(python_call(name, arguments, show) for name, arguments in calls) + "]"
    content, _, found = parse(text, family, tools={"weather": {}, "now_2": {}}, cuts=cuts)
    assert content == ""
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls


@settings(deadline=None, max_examples=100)
@given(
    calls=PYTHON_CALLS,
    cuts=st.lists(st.integers(0, 10**6), max_size=12),
    family=st.sampled_from(["smollm3", "gemma"]),
)
def test_calls_in_code_are_parsed_back(calls, cuts, family):
    lines = "\n".join(f"print({python_call(*call, repr)})" for call in calls)
    opening, closing = {"smollm3": ("<code>\n", "\n</code>"), "gemma": ("```tool_code\n", "\n```")}[family]
    assume(closing.strip() not in lines)
    content, _, found = parse(f"Let me see.\n{opening}{lines}{closing}\nDone.", family, cuts=cuts)
    assert content == "Let me see.Done."
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls


# Qwen3-Coder's XML

KINDS = {"city": "string", "days": "integer", "all": "boolean", "where": "object", "any": ["string", "null"]}
XML_TOOLS = {"weather": {"properties": {name: {"type": kind} for name, kind in KINDS.items()}}}
PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12)
XML_ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": st.one_of(PLAIN_TEXT, st.sampled_from(["12", "true", "\n\n", " {} ", "<b>"])),
        "days": st.integers(),
        "all": st.booleans(),
        "where": st.dictionaries(PLAIN_TEXT, st.one_of(st.none(), st.integers(), PLAIN_TEXT), max_size=2),
        "any": PLAIN_TEXT,
        "unknown": PLAIN_TEXT,
    },
)


@settings(deadline=None, max_examples=150)
@given(
    calls=st.lists(XML_ARGUMENTS, min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 10**6), max_size=12),
)
def test_calls_in_xml_are_parsed_back(calls, cuts):
    def shown(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)

    bodies = [
        "<function=weather>\n"
        + "".join(f"<parameter={key}>\n{shown(value)}\n</parameter>\n" for key, value in call.items())
        + "</function>"
        for call in calls
    ]
    text = "I look.\n" + "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)
    content, _, found = parse(text, "qwen3_coder", tools=XML_TOOLS, cuts=cuts)
    assert content == "I look."
    assert [(call.name, json.loads(call.arguments)) for call in found] == [
        ("weather", call) for call in calls
    ]


def test_types_of_texts():
    schema = XML_TOOLS["weather"]
    given = {"city": "1", "days": "1", "all": "False", "where": "{", "any": "1", "unknown": "1"}
    assert json.loads(typed(json.dumps(given), schema)) == {**given, "days": 1, "all": False}
    assert json.loads(typed('{"days": "1e999"}', schema)) == {"days": "1e999"}
    assert json.loads(typed('{"days": "1"}', {"properties": 5})) == {"days": "1"}


# Any text


FAMILIES = [
    "hermes",
    "qwen3_coder",
    "llama3",
    "mistral",
    "phi4",
    "granite",
    "smollm3",
    "gemma",
    "pythonic",
    "text",
]
FRAGMENTS = st.sampled_from(
    ["<function=weather>", "</function>", "<parameter=a>", "</parameter>", "<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>", "[THINK]", "<response>", "</response>", "<|python_tag|>", "functools", "```tool_code\n", "```", "<code>", "</code>", '{"name": "weather", "arguments": {}}', '{"name": "x", "parameters": {"a": [1]}}', "[weather(a=1)]", "weather(", "weather", "{", "}", "[", "]", "(", ")", '"', "'", "\\", ";", ",", ":", " ", "\n", "\n\n", "word", "=", "1"]
)  # fmt: skip
SOUP = st.lists(FRAGMENTS, max_size=14).map("".join)


@settings(deadline=None, max_examples=600)
@given(
    text=SOUP,
    family=st.sampled_from(FAMILIES),
    template=st.sampled_from(["", "<think>", "<think> <response>", "[THINK]"]),
    tail=st.sampled_from(["", "<think>\n", "<think>\n\n</think>\n\n"]),
    cuts=st.lists(st.integers(0, 10**6), max_size=20),
)
def test_the_pieces_make_no_difference(text, family, template, tail, cuts):
    whole = parse(text, family, template, tail=tail)
    assert parse(text, family, template, tail=tail, cuts=cuts) == whole
    assert parse(text, family, template, tail=tail, cuts=range(len(text))) == whole
    for call in whole[2]:
        assert isinstance(json.loads(call.arguments), dict)


@settings(deadline=None, max_examples=400)
@given(
    text=st.lists(st.one_of(FRAGMENTS, st.sampled_from(["\n\n\n", "\n\n \n\n"])), max_size=14).map("".join),
    family=st.sampled_from(FAMILIES),
    template=st.sampled_from(["", "<think>", "<think> <response>"]),
    tail=st.sampled_from(["", "<think>\n"]),
)
def test_the_pieces_make_no_difference_among_many_spaces(text, family, template, tail):
    with patch.object(answer_parser, "_MOST_SPACES", 2), patch.object(tool_calls, "_MOST_SPACES", 2):
        whole = parse(text, family, template, tail=tail)
        assert parse(text, family, template, tail=tail, cuts=range(len(text))) == whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("before", "tail"), [("", ""), ("a", ""), ("<think>", ""), ("", "<think>")])
def test_many_spaces_are_held_back_in_part(family, before, tail):
    """If all spaces were held back, each further space would cause a search of all of them."""
    parser = AnswerParser(answer_format("<think>", family), SCHEMAS, prompt_tail=tail)
    parser.push(before + "\n" * 5000)
    assert len(parser._text) + len(parser._space) <= 1024


@settings(deadline=None, max_examples=300)
@given(text=SOUP, family=st.sampled_from(FAMILIES), tools=st.sampled_from([{}, SCHEMAS]))
def test_text_without_calls_is_unchanged(text, family, tools):
    content, reasoning, calls = parse(text, family, tools=tools)
    assert reasoning == ""
    if not calls:
        assert content == text
    assert tools or not calls


@settings(deadline=None, max_examples=100)
@given(text=SOUP)
def test_text_is_left_alone_on_request(text):
    assert parse(text, "text", "<think> <tool_call>") == (text, "", [])


# Reasoning


@pytest.mark.parametrize(
    ("template", "tail", "text", "content", "reasoning"),
    [
        ("</think>", "assistant\n", "<think>\nhm\n\nso\n</think>\n\nYes.\n", "Yes.\n", "hm\n\nso"),
        ("</think>", "assistant\n", " \n<think>hm</think>Yes.", "Yes.", "hm"),
        ("</think>", "<think>\n", "hm\n</think>\n\nYes.", "Yes.", "hm"),
        ("</think>", "<think>\n", "hm\n", "", "hm"),
        ("</think>", "<think>\n", "hm</thin", "", "hm</thin"),
        ("</think>", "<think>\n\n</think>\n\n", "Yes.", "Yes.", ""),
        ("</think>", "", "<think>\n\n</think>\n\nYes.", "Yes.", ""),
        ("</think>", "", "Use the <think> tag</think>.", "Use the <think> tag</think>.", ""),
        ("</think>", "", "<thin", "<thin", ""),
        ("</think>", "", "\n", "\n", ""),
        ("", "", "<think>hm</think>Yes.", "<think>hm</think>Yes.", ""),
        ("<think> <response>", "", "<think>hm</think>\n<response>Yes.</response>", "Yes.", "hm"),
        ("<think> <response>", "", "<think>hm</think>Yes.</response>", "Yes.</response>", "hm"),
        ("<think> <response>", "", "<think>hm</think><resp", "<resp", "hm"),
        ("[THINK]", "", "[THINK]hm[/THINK]Yes.", "Yes.", "hm"),
        (
            "Here is my thought process: Here is my response:",
            "",
            "Here is my thought process:\n\nhm\n\nHere is my response:\n\nYes.",
            "Yes.",
            "hm",
        ),
    ],
)
def test_reasoning(template, tail, text, content, reasoning):
    for cuts in ((), range(len(text))):
        assert parse(text, None, template, tail=tail, cuts=cuts) == (content, reasoning, [])


def test_a_call_within_the_reasoning_is_no_call():
    call = '<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>'
    content, reasoning, calls = parse(f"<think>{call}</think>\n\n{call}", "hermes", "<think>")
    assert (content, reasoning) == ("", call)
    assert calls == [("call00000", "weather", '{"a": 1}')]


# Forms


@pytest.mark.parametrize(
    ("family", "text", "content", "calls"),
    [
        ("hermes", '<tool_call>{"name": "other"}</tool_call>', "", [("other", "{}")]),
        ("hermes", 'Hm.\n<tool_call>\n{"name": "weather", "arguments": "{\\"a\\": 1}"}', "Hm.", [("weather", '{"a": 1}')]),
        ("hermes", '<tool_call>[{"name": "a"}, {"name": "b"}]</tool_call>\n\nbye', "bye", [("a", "{}"), ("b", "{}")]),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"é": "x\ny"}}</tool_call>', "", [("a", '{"é": "x\\ny"}')]),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"a": "\\ud800"}}</tool_call>', "", [("a", '{"a": "\\ud800"}')]),
        ("llama3", '<|python_tag|>brave_search.call(query="a \\"b\\" c")', "", [("brave_search", '{"query": "a \\"b\\" c"}')]),
        ("llama3", '{"name": "weather", "parameters": {}}; {"name": "weather", "parameters": {"a": 1}}', "", [("weather", "{}"), ("weather", '{"a": 1}')]),
        ("llama3", '{"name": "weather", "parameters": {}}; no', "; no", [("weather", "{}")]),
        ("llama3", '{"type": "function", "function": "weather", "parameters": {"a": 1}}', "", [("weather", '{"a": 1}')]),
        ("llama3", '{"name": "other", "parameters": {}}', None, []),
        ("llama3", '{"answer": 42}', None, []),
        ("llama3", "[1, 2, 3]", None, []),
        ("llama3", "<|python_tag|>import os", None, []),
        ("pythonic", "[weather(a=-1.5, b=None, c=(1, [True]), d='x' \"y\")]", "", [("weather", '{"a": -1.5, "b": null, "c": [1, [true]], "d": "xy"}')]),
        ("pythonic", "[weather('Paris')]", None, []),
        ("pythonic", "[weather(a=b)]", None, []),
        ("pythonic", "[weather(a=1, a=2)]", None, []),
        ("pythonic", "[weather(a={1: 2})]", None, []),
        ("pythonic", "[weather(a=f'x')]", None, []),
        ("pythonic", "[other(a=1)]", None, []),
        ("mistral", '[TOOL_CALLS]weather{"a": 1}', "", [("weather", '{"a": 1}')]),
        ("mistral", "[TOOL_CALLS] are called so.", None, []),
        ("phi4", "functools is a module", None, []),
        ("granite", '<tool_call>[{"name": "a", "arguments": {}}]', "", [("a", "{}")]),
        ("qwen3_coder", "<tool_call><function=a></function></tool_call>", "", [("a", "{}")]),
        ("qwen3_coder", "<tool_call><function=a>hm</function></tool_call>", None, []),
        ("qwen3_coder", "<tool_call><func></tool_call>", None, []),
        ("qwen3_coder", "<tool_call>{}</tool_call>", None, []),
    ],
)  # fmt: skip
def test_forms_of_calls(family, text, content, calls):
    for cuts in ((), range(len(text))):
        found = parse(text, family, cuts=cuts)
        assert found[0] == (text if content is None else content)
        assert [(call.name, call.arguments) for call in found[2]] == calls


@pytest.mark.parametrize(
    "body",
    [
        "", "{", "}", '{"name"}', '{"name": "a"', '{"name": 1}', '{"name": ""}', '{"arguments": {}}', "[]", "[1]", "{}",
        '{"name": "a", "arguments": [1]}', '{"name": "a", "arguments": "x"}', '{"name": "a", "arguments": NaN}',
        '{"name": "a", "arguments": {"x": 1e999}}', '{"name": "a", "arguments": {"x": Infinity}}',
        '{"name": "\\ud800"}', '{"name": "%s"}' % ("a" * 300), '{"name": "a", "arguments": {"x": %s}}' % ("9" * 5000),
        '{"name": "a", "arguments": ' + '{"x":' * 70 + "}" * 71, "[" * 100_000, '{"a":' * 100_000,
        '"name"', "name(a=1)", '{"name": "a"]', "{'name': 'a'}",
    ],
)  # fmt: skip
def test_a_malformed_call_stays_content(body):
    text = f"Hm. <tool_call>{body}</tool_call> bye "
    assert parse(text, "hermes") == (text, "", [])
    assert parse(text, "hermes", cuts=range(0, len(text), 7)) == (text, "", [])


def test_a_call_after_a_malformed_one_counts():
    text = 'a <tool_call>{oops</tool_call> b <tool_call>{"name": "a"}</tool_call>'
    content, _, calls = parse(text, "hermes")
    assert content == "a <tool_call>{oops</tool_call> b"
    assert [call.name for call in calls] == ["a"]


@pytest.mark.parametrize(
    "unit", ["<tool_call>", "<tool_call>{", '<tool_call>["', "<tool_call>[[", "\n", "<tool_call"]
)
def test_hostile_text_takes_linear_time(unit):
    text = unit * (60_000 // len(unit))
    assert parse(text, "hermes", cuts=range(0, len(text), 5)) == (text, "", [])


def test_identifiers_are_nine_letters_and_digits():
    parser = AnswerParser(answer_format("", "hermes"), SCHEMAS)
    _, _, calls = parsed(parser, ['<tool_call>{"name": "a"}</tool_call>' * 50])
    assert len({call.id for call in calls}) == 50
    assert all(len(call.id) == 9 and call.id.isalnum() and call.id.isascii() for call in calls)


# The choice of a form


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '<tool_call><function=' }}", "qwen3_coder"),
        ("{{ '<tool_call><arg_key>' }}", "text"),
        ("{{ '<|tool_call|>' }}", "granite"),
        ("{{ '<|tool|>' }}", "phi4"),
        ("{{ '<|tool|><|tool_call|>' }}", "phi4"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<|start_header_id|>ipython<|end_header_id|>' }}", "llama3"),
        ("{{ '```tool_code' }}", "gemma"),
        ("{{ 'Write [func_name1(params_name1=params_value1)]' }}", "pythonic"),
        ("{% if python_tools %}<code>{% endif %}<tool_call>", "smollm3"),
        ("{{ message.content }}", "text"),
    ],
)
def test_the_template_tells_the_family(template, family):
    assert answer_format(template).name == family
    assert answer_format(template, "mistral").name == "mistral"


def test_an_unknown_family_is_refused():
    with pytest.raises(PrecastError) as raised:
        answer_format("", "gpt")
    assert str(raised.value) == (
        "answer_format: expected one of gemma, granite, hermes, llama3, mistral, phi4, pythonic, qwen3_coder, smollm3, text, found"
        " 'gpt'."
    )


def test_markers():
    assert answer_format("<think>", "hermes").markers() == {
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
    }
    assert answer_format("", "mistral").markers() == {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"}


def test_schemas_of_tools():
    assert SCHEMAS == {"weather": {}, "get-time.v2": {}}
    given = [{"name": "a", "parameters": None}, {"name": "b", "parameters": {"c": 2}}]
    assert tool_schemas(given) == {"a": {}, "b": {"c": 2}}
