"""Chat templates with the features of each family's published templates: prompts equal those of transformers."""

# ruff: noqa: E501 - templates are easier to read on one line

import json
import re
from datetime import datetime
from typing import Any

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.text.answer_formats import answer_format
from precast.loaders.text.chat_template import ChatOptions, ChatTemplate
from precast.loaders.text.reasoning_grammar import reasoning_grammar

SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": "How warm is it in 日本? <b>&'\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n20 °C"}
REASONED = {"role": "assistant", "content": "20 °C", "reasoning_content": "\nhm\n"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "weather", "arguments": {"place": "日本", "days": 1}},
        }
    ],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": '{"t": 20}'}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two "}]}
JOINED = {"role": "user", "content": "one\n two "}
# Families whose templates cannot handle content in parts: they print its repr, omit it, or fail. precast passes text.
TEXT_ONLY = ("gemma", "llama3", "qwen3", "mistral", "phi3", "granite")
CHATS = {
    "short": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, USER, REASONED, USER],
    "tools": [SYSTEM, USER, CALL, RESULT, ANSWER, USER, CALL, RESULT, RESULT],
    "parts": [PARTS],
    "wrong order": [ANSWER, USER],
    "two of a role": [SYSTEM, USER, USER],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'How warm it is, in °C & "words".',
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "é <place>"}},
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}},
]
DOCUMENTS = [{"title": "Climate", "text": "Mild."}, {"title": "é", "text": "a < b"}]

TEMPLATES = {
    # No system role; roles alternate; an assistant is called "model".
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('There is no system role here') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('User and assistant take turns') }}{% endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start>' + role + '\\n' + message['content'] | trim + '<end>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start>model\\n' }}{% endif %}""",
    # The first user message includes the system message; content may come in parts.
    "gemma3": """{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {%- set before = (messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text']) + '\\n\\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set before, rest = '', messages -%}
{%- endif -%}
{%- for message in rest -%}
    {{- '<start>' ~ message['role'] ~ '\\n' ~ (before if loop.first) -}}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}{%- endfor -%}
    {%- else -%}{{ raise_exception('Unknown content') }}{%- endif -%}
    {{ '<end>\\n' }}
{%- endfor -%}""",
    # Tools as indented JSON, a date, and arguments that are objects.
    "llama3": """{{- bos_token }}
{%- if not tools_in_user_message is defined %}{% set tools_in_user_message = true %}{% endif %}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|h|>system<|/h|>\\n\\n' }}{% if tools is not none %}{{ 'Environment: ipython\\n' }}{% endif %}
{{- 'Today: ' + date_string + '\\n' }}
{%- if builtin_tools is defined %}{{ 'Tools: ' + builtin_tools | reject('equalto', 'python') | join(', ') + '\\n' }}{% endif %}
{{- system + '<|eot|>' }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length == 0 %}{{ raise_exception('No first message') }}{% endif %}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|h|>' + message['role'] + '<|/h|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{ raise_exception('One call at a time') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}' }}
    {%- elif message.role == 'tool' or message.role == 'ipython' %}
        {%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\\n\\n' }}{% endif %}""",
    # Searches backwards for the last question with a namespace, removes reasoning, and groups tool results.
    "qwen3": """{%- if tools %}{{ '<im>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '</im>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<im>system\\n' + messages[0].content + '</im>\\n' }}{% endif %}
{%- set ns = namespace(looking=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == 'user' and message.content is string and not (message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.looking = false %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}{{ '<im>' + message.role + '\\n' + content + '</im>\\n' }}
    {%- elif message.role == 'assistant' %}{% set thought = '' %}
        {%- if message.reasoning_content is string %}{% set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thought)) %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{ '\\n' }}{% endif %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '{"name": "' }}{{ tool_call.name }}{{ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{ tool_call.arguments }}{% else %}{{ tool_call.arguments | tojson }}{% endif %}{{ '}' }}
        {%- endfor %}{{ '</im>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}{{ '<im>user' }}{% endif %}
        {{- '\\n<r>\\n' + content + '\\n</r>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{ '</im>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<im>assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}""",
    # Applies filters to the whole conversation, checks the turns, and writes the tools before the last question.
    "mistral": """{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(index=0) %}
{%- for message in rest | rejectattr('role', 'equalto', 'tool') | selectattr('tool_calls', 'undefined') %}
    {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}{{ raise_exception("After the optional system message, roles must alternate") }}{% endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and (message == users[-1]) %}{{ '[T]' }}
            {%- for tool in tools %}{% set tool = tool.function %}{{ '{"function": {' }}
                {%- for key, val in tool.items() if key != 'return' %}{% if val is string %}{{ '"' + key + '": "' + val + '"' }}{% else %}{{ '"' + key + '": ' + val | tojson }}{% endif %}{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}
                {{- '}}' }}{% if not loop.last %}{{ ', ' }}{% else %}{{ ']' }}{% endif %}
            {%- endfor %}{{ '[/T]' }}
        {%- endif %}
        {%- if loop.last and system is defined %}{{ '[I] ' + system + '\\n\\n' + message['content'] + '[/I]' }}{% else %}{{ '[I] ' ~ message['content'] ~ '[/I]' }}{% endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {%- for call in message.tool_calls %}{% set out = call.function | tojson %}{{ out[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}{{ raise_exception('Ids have nine characters') }}{% endif %}{{ ', "id": "' + call.id + '"}' }}
        {%- endfor %}{{ eos_token }}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}
    {%- elif message['role'] in ['tool', 'tool_results'] %}
        {%- if message.content is defined and message.content.content is defined %}{% set content = message.content.content %}{% else %}{% set content = message.content %}{% endif %}
        {{- '[R]{"content": ' + content | string + '}[/R]' }}
    {%- else %}{{ raise_exception('Only user, assistant and tool roles are known, not ' + message['role'] + '!') }}
    {%- endif %}
{%- endfor %}""",
    # A short template without a beginning-of-sequence token.
    "phi3": """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' ~ message['content'] ~ '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' ~ message['content'] ~ '<|end|>\\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    # Documents, and the tag that marks the text for training.
    "granite": """{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}
{%- else %}{% set system = 'Today is ' + strftime_now('%B %d, %Y') + '.' %}{% if tools and documents %}{% set system = system + ' Tools and texts.' %}{% endif %}{% endif %}
{{- '<r>system</r>' + system + '<e>\\n' }}
{%- if tools %}{{ '<r>tools</r>' + tools | map(attribute='function') | list | tojson(indent=2, sort_keys=true) }}{% endif %}
{%- if documents %}{{ '<r>documents</r>' }}
    {%- for document in documents %}{{ 'Document ' + loop.index0 | string + ' of ' ~ loop.length ~ '\\n' + document['title'] | default('untitled', true) + '\\n' + document['text'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{{ '<r>assistant</r>' }}{% generation %}{{ message.content | default('', true) }}{{ '<e>' }}{% endgeneration %}
    {%- else %}{{ '<r>' + message['role'] + '</r>' ~ message['content'] + '' if message.content is string else '?' }}{% endif %}
    {%- if loop.last and add_generation_prompt %}{{ '<r>assistant' }}{% if controls %}{{ ' ' + controls | tojson }}{% endif %}{{ '</r>' }}{% endif %}
{%- endfor %}""",
    # Macros over schemas, and loops with break and continue.
    "smollm3": """{%- macro signature(f) %}{{ f.name }}({% for name, spec in (f.parameters.properties or {}) | dictsort %}{{ name }}: {{ spec.type | default('any') }}{% if not loop.last %}, {% endif %}{% endfor %}){% endmacro %}
{%- set ns = namespace(system='', mode='/think') %}
{%- for message in messages %}{% if message.role != 'system' %}{% continue %}{% endif %}{% set ns.system = message.content | trim %}{% break %}{% endfor %}
{%- if '/no_think' in ns.system %}{% set ns.mode = '/no_think' %}{% endif %}
{{- '<im>system\\n' ~ ns.system.replace('/no_think', '').rstrip() ~ '\\nMode: ' ~ ns.mode }}
{%- for tool in tools or xml_tools or [] %}{{ '\\n' ~ signature(tool.function) }}{% endfor %}{{ '</im>\\n' }}
{%- for message in messages if message.role in ('user', 'assistant') %}
    {%- set content = message.content if message.content is string else message.content | map(attribute='text') | join('') if message.content else '' %}
    {%- generation %}{{ '<im>' ~ loop.index ~ message.role ~ '\\n' ~ content ~ '</im>\\n' }}{%- endgeneration %}
{%- else %}{{ 'nothing' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<im>assistant\\n' ~ ('<think>\\n\\n</think>\\n' if ns.mode == '/no_think' else '') }}{% endif %}""",
}

GIVEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "generation": {"add_generation_prompt": True},
    "tools": {"tools": TOOLS, "add_generation_prompt": True},
    "documents": {"documents": DOCUMENTS, "tools": TOOLS, "add_generation_prompt": True},
}
VARIABLES = {
    "enable_thinking": False,
    "date_string": "1 Jan 2026",
    "tools_in_user_message": False,
    "builtin_tools": ["search", "python"],
    "controls": {"length": "short"},
}


def theirs(template: str, messages: list[dict], **given: Any) -> str | None:
    """Return the prompt of transformers, or None if the template fails."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    # apply_chat_template omits keys with null values.
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        rendered, _ = utils.render_jinja_template(
            [chat], chat_template=template, bos_token="<s>", eos_token="</s>", **given
        )
    except Exception:
        return None
    return rendered[0]


def ours(template: str, messages: list[dict], **given: Any) -> str:
    options = ChatOptions(**{"add_generation_prompt": False, **given})
    return ChatTemplate(template, bos_token="<s>", eos_token="</s>").render(messages, options)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_a_prompt_equals_that_of_transformers_or_both_fail(family: str, chat: str, given: str) -> None:
    by_text = chat == "parts" and family in TEXT_ONLY
    expected = theirs(TEMPLATES[family], [JOINED] if by_text else CHATS[chat], **GIVEN[given])
    if expected is not None:
        assert ours(TEMPLATES[family], CHATS[chat], **GIVEN[given]) == expected
        return
    with pytest.raises(
        PrecastError, match=r"^The chat template (failed|refused these messages) at line \d+: "
    ):
        ours(TEMPLATES[family], CHATS[chat], **GIVEN[given])


@pytest.mark.parametrize("family", TEMPLATES)
def test_variables_reach_a_template(family: str) -> None:
    expected = theirs(TEMPLATES[family], CHATS["short"], tools=TOOLS, add_generation_prompt=True, **VARIABLES)
    found = ours(
        TEMPLATES[family], CHATS["short"], tools=TOOLS, add_generation_prompt=True, variables=VARIABLES
    )
    assert found == expected


def test_prompts_contain_the_inputs() -> None:
    """Check that the comparison is not empty: prompts contain the message, tools, documents and the date."""
    prompts = {family: ours(template, CHATS["short"]) for family, template in TEMPLATES.items()}
    assert all("日本? <b>&'" in prompt for prompt in prompts.values())
    for family in ("llama3", "qwen3", "mistral", "granite", "smollm3"):
        assert "weather" in ours(TEMPLATES[family], CHATS["short"], tools=TOOLS)
    assert "a < b" in ours(TEMPLATES["granite"], CHATS["short"], documents=DOCUMENTS)
    assert str(datetime.now().year) in prompts["llama3"]
    assert '"place": "日本"' in ours(TEMPLATES["llama3"], CHATS["tools"], tools=TOOLS)


@pytest.mark.parametrize(
    ("family", "chat", "said"),
    [
        ("gemma", "system", "at line 1: There is no system role here"),
        ("gemma", "wrong order", "at line 3: User and assistant take turns"),
        ("mistral", "two of a role", "at line 6: After the optional system message, roles must alternate"),
    ],
)
def test_the_message_of_a_refusal_reaches_the_user(family: str, chat: str, said: str) -> None:
    sentence = rf"^The chat template refused these messages {re.escape(said)}; change the messages\.$"
    with pytest.raises(PrecastError, match=sentence):
        ours(TEMPLATES[family], CHATS[chat])


# --- reasoning before a constrained answer ------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [3, 4]}},
    "required": ["a"],
    "additionalProperties": False,
}
MARKS = ("<think>", "</think>")
THOUGHT = "<think>\nhm {é\n</think>\n\n"
MENTION = {"role": "system", "content": "Begin with <think>reasoning</think>."}
NO_THINK = {"role": "system", "content": "Be brief. /no_think"}
GENERIC = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"


@pytest.mark.parametrize("constraint", [{"json_schema": SCHEMA}, {"regex": r'\{"a": [34]\}'}])
@pytest.mark.parametrize(
    ("template", "marks", "system", "before", "after"),
    [
        (TEMPLATES["qwen3"], MARKS, SYSTEM, THOUGHT, ""),
        (TEMPLATES["qwen3"], (), MENTION, THOUGHT, ""),
        (TEMPLATES["smollm3"], MARKS, SYSTEM, THOUGHT, ""),
        (TEMPLATES["smollm3"], MARKS, SYSTEM, "<think>hm {é</think>", ""),
        (GENERIC + "<think>\n", MARKS, SYSTEM, THOUGHT.removeprefix("<think>\n"), ""),
        (GENERIC + "<think>\n", (), SYSTEM, THOUGHT.removeprefix("<think>\n"), ""),
        (GENERIC + "[THINK]{# [/THINK] #}", (), SYSTEM, "hm {é[/THINK]", ""),
        (GENERIC + "{# <response> #}", MARKS, SYSTEM, "<think>hm {é</think><response>", "</response>"),
        (
            GENERIC + "{# Here is my thought process: #}",
            (),
            {"role": "system", "content": "Write 'Here is my thought process:' first."},
            "Here is my thought process:hm {é\nHere is my response:\n",
            "",
        ),
    ],
)
def test_a_model_that_reasons_does_so_before_the_constraint_applies(
    scripted_model: Any,
    template: str,
    marks: tuple[str, ...],
    system: dict[str, str],
    before: str,
    after: str,
    constraint: dict[str, Any],
) -> None:
    pytest.importorskip("llguidance")
    model = scripted_model(f'{before}{{"a": 3}}{after}', template, marks=marks)
    found = model.chat([system, USER], SamplingParams(**constraint))
    assert (found.text, found.reasoning.strip(), found.finish_reason) == ('{"a": 3}', "hm {é", "stop")


@pytest.mark.parametrize(
    ("template", "marks", "system", "given"),
    [
        (TEMPLATES["qwen3"], (), SYSTEM, {}),  # a model without the marker, and no request to reason
        (TEMPLATES["qwen3"], MARKS, SYSTEM, {"answer_format": "text"}),
        (TEMPLATES["smollm3"], MARKS, NO_THINK, {}),
        (TEMPLATES["granite"], MARKS, SYSTEM, {}),  # the template does not support reasoning
        (GENERIC + "<think>\n\n</think>\n\n", MARKS, SYSTEM, {}),
    ],
)
def test_without_reasoning_the_constraint_applies_from_the_first_token(
    scripted_model: Any,
    template: str,
    marks: tuple[str, ...],
    system: dict[str, str],
    given: dict[str, Any],
) -> None:
    pytest.importorskip("llguidance")
    model = scripted_model(THOUGHT + '{"a": 3}', template, marks=marks)
    found = model.chat([system, USER], SamplingParams(json_schema=SCHEMA), **given)
    assert (json.loads(found.text)["a"] in (3, 4), found.reasoning) == (True, "")


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_a_variable_of_the_template_turns_reasoning_off(scripted_model: Any, enable_thinking: bool) -> None:
    tokenizer = scripted_model("", TEMPLATES["qwen3"], marks=MARKS).tokenizer
    options = ChatOptions(variables={"enable_thinking": enable_thinking})
    prompt = tokenizer.render_chat([USER], options)
    (syntax,) = answer_format(TEMPLATES["qwen3"]).reasoning
    assert bool(reasoning_grammar(syntax, prompt, tokenizer, is_open=False)) == enable_thinking
