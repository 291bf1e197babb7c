"""Chat templates: prompts equal those of transformers, errors are one sentence, and limits hold."""

# ruff: noqa: E501 - templates are easier to read on one line

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.text import chat_meter
from precast.loaders.text.chat_template import ChatOptions, ChatTemplate, Limits

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  <b>Größe</b> & 'quotes' 日本 😀 \n"},
    {"role": "assistant", "content": "ok", "extra": {"a": [1, 2.5, None, True]}},
    {"role": "user", "content": [{"type": "text", "text": "part one"}, {"type": "text", "text": "two"}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <&>", "parameters": {"n": [1]}}}]

# Each template uses one feature of published templates.
TEMPLATES = {
    "chatml": """{%- for message in messages %}
        {{- '<|im_start|>' + message['role'] + '\\n' + (message.content | string) + '<|im_end|>' + '\\n' -}}
    {%- endfor %}
    {%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "blocks are trimmed": "{% for m in messages %}\n    {% if loop.first %}\n  first\n    {% endif %}\n{{ m.role }}\n{% endfor %}\n",
    "tokens": "{{ bos_token }}{{ messages | length }}{{ eos_token }}{{ pad_token }}",
    "json": "{{ tools | tojson }}{{ tools | tojson(indent=4) }}{{ messages | tojson(sort_keys=true) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }},{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro show(m, sep='|') %}{{ m.role ~ sep ~ loop }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "recursive macro": "{% macro down(n) %}{{ n }}{% if n > 0 %}{{ down(n - 1) }}{% endif %}{% endmacro %}{{ down(5) }}",
    "call block": "{% macro wrap() %}[{{ caller() }}]{% endmacro %}{% call wrap() %}x{{ messages[0].role }}{% endcall %}",
    "generation": "{% for m in messages %}{% generation %}{% set r = m.role %}{{ r }}\n{% endgeneration %}\n;{% endfor %}",
    "recursive loop": "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}.{% endfor %}",
    "loop filter and else": "{% for m in messages if m.role == 'x' %}no{% else %}none{% endfor %}",
    "slices": "{{ messages[1:][0].role }}{{ messages[::-1][0].role }}{{ messages[0].content[-3:] }}{{ 'abc'[1] }}",
    "documents": "{% for d in documents %}{{ loop.index }}. {{ d.title }}: {{ d['text'] }}\n{% endfor %}",
    "own variables": "{% if think is defined and think is false %}no {% endif %}{{ level | default('high') }}{{ tags | join(',') }}",
    "strings": "{{ messages[1].content.strip().replace('b', 'B').split(' ')[0] }}{{ 'a,b'.split(',') | join('-') }}"
    "{{ '%s: %5.2f %%' % ('x', 1.5) }}{{ '{}-{:>4}'.format('a', 7) }}{{ 'x' | indent(2, true) }}{{ 'ab' * 3 }}",
    "filters": "{{ messages | map(attribute='role') | unique | list }}{{ messages | selectattr('role', 'equalto', 'user')"
    " | list | length }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [3, 1] | sort | first }}{{ '<' | e }}{{ [1, 2] | sum }}"
    "{{ 2.567 | round(1) }}{{ nothing | default('d') }}{{ ' a ' | trim | upper }}{{ messages[2].extra.items() | list }}",
    "tests": "{{ messages[3].content is string }}{{ tools is defined }}{{ x is undefined }}{{ messages is sequence }}"
    "{{ 'a' in 'cat' }}{{ messages[2].extra is mapping }}{{ 3 is odd }}",
    "set block": "{% set text %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ text | length }}{{ text }}",
    "filter block": "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    "arithmetic": "{{ 7 // 2 }}{{ 2 ** 10 }}{{ -3 % 5 }}{{ 1 / 4 }}{{ 'a' ~ 1 ~ none ~ [1, 'x'] }}{{ range(3) | list }}",
    "joiner": "{% set sep = joiner(', ') %}{% for m in messages %}{{ sep() }}{{ m.role }}{% endfor %}",
    "printed containers": "{{ messages[2].extra }}{{ none }}{{ true }}{{ undefined_thing }}",
}


TEXT_ONLY = ("chatml",)  # this template would receive the parts of the last message as one text
DOCUMENTS = [{"title": "Größe", "text": "a < b"}, {"title": "two", "text": "\n"}]
VARIABLES = {"think": False, "tags": ["x", "y"]}


def render(source: str, *, limits: Limits | None = None, messages: list = CHAT, **options) -> str:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", limits=limits)
    return template.render(messages, ChatOptions(**options))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_equals_that_of_transformers(name: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = utils.render_jinja_template(
        [CHAT[:3] if name in TEXT_ONLY else CHAT],
        tools=TOOLS,
        documents=DOCUMENTS,
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
        **VARIABLES,
    )
    chat = CHAT[:3] if name in TEXT_ONLY else CHAT
    found = render(TEMPLATES[name], messages=chat, tools=TOOLS, documents=DOCUMENTS, variables=VARIABLES)
    assert found == expected[0]


@settings(deadline=None, max_examples=100)
@given(content=st.text(), indent=st.sampled_from([None, 2]))
def test_content_is_neither_escaped_nor_interpreted(content: str, indent: int | None) -> None:
    messages = [{"role": "user", "content": content}]
    assert render("{{ messages[0].content }}", messages=messages) == content
    text = render(f"{{{{ messages | tojson(indent={indent}) }}}}".replace("None", "none"), messages=messages)
    assert text == json.dumps(messages, ensure_ascii=False, indent=indent)


def test_absent_tokens_print_nothing() -> None:
    template = ChatTemplate("[{{ bos_token }}{{ eos_token }}]", bos_token=None, eos_token=None)
    assert template.render(CHAT) == "[]"


def test_a_template_reads_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}").isdigit()


def test_the_callers_messages_stay_unchanged() -> None:
    before = json.dumps(CHAT)
    with pytest.raises(PrecastError, match="failed at line 1"):
        render("{{ messages[0].update({'role': 'x'}) }}")
    with pytest.raises(PrecastError, match="failed at line 1"):
        render("{{ messages.append(1) }}")
    assert json.dumps(CHAT) == before


def test_threads_render_at_the_same_time() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(source, bos_token=None, eos_token=None, limits=Limits(steps=2000))
    chats = [[{"role": "user", "content": str(n)}] * 50 for n in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(template.render, chats)) == [str(n) * 50 for n in range(40)]


# Failures


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% for %}", "failed at line 2: .+"),
        ("{% if true %}", "failed at line 1: .+"),
        ("{{ 1 | wordwrap }}", r"failed at line 1: No filter named 'wordwrap'"),
        ("{{ messages[0].role | random }}", r"failed at line 1: No filter named 'random'"),
        ("\n{{ lipsum() }}", "failed at line 2: 'lipsum' is undefined"),
        ("\n\n{{ messages[0].x.y }}", "failed at line 3: 'dict object' has no attribute 'x'"),
        (
            "{{ ''.__class__.__mro__ }}",
            "failed at line 1: access to attribute '__class__' of 'str' object is unsafe",
        ),
        (
            "{{ ''['__class__'].x }}",
            "failed at line 1: access to attribute '__class__' of 'str' object is unsafe",
        ),
        (
            "{{ '{0.__class__.x}'.format('') }}",
            "failed at line 1: access to attribute '__class__' .* is unsafe",
        ),
        (
            "{{ ('{0.__class__.x}'|attr('format'))('') }}",
            "failed at line 1: access to attribute '__class__' .* is unsafe",
        ),
        ("{{ 1 / 0 }}", "failed at line 1: ZeroDivisionError: division by zero"),
        ("{{ messages + 1 }}", "failed at line 1: TypeError: .+"),
        ("{% include 'other' %}", "failed at line 1: another template cannot be included here"),
        ("\n{% extends 'other' %}", "failed at line 2: another template cannot be included here"),
        ("{% from 'x' import y %}", "failed at line 1: another template cannot be included here"),
        ("{{ messages.items }}{{ ''.upper }}", "failed at line 1: a value of type .* cannot become text"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed at line 1: it calls itself too deeply"),
        (
            "{{ raise_exception('roles must\n alternate.') }}",
            "refused these messages at line 1: roles must alternate",
        ),
        ("{% if 1 %}" * 2000 + "{% endif %}" * 2000, "failed.*: .+"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "failed.*: .+"),
        (
            "{% for a in 'a' %}" * 25 + "{% endfor %}" * 25,
            "failed.*: SyntaxError: too many statically nested blocks",
        ),
        (
            "{{ 'abc'.translate({97: 'x'}) }}",
            "failed at line 1: access to attribute 'translate' of 'str' object is unsafe",
        ),
        ("{% autoescape true %}{% endautoescape %}", "failed at line 1: autoescape is not available here"),
    ],
)
def test_a_failure_is_one_sentence(source: str, message: str) -> None:
    advice = "change the messages" if "refused" in message else "correct it, or use another template"
    place = r"( \(<template>, line \d+\))?"
    with pytest.raises(PrecastError, match=rf"^The chat template {message}{place}; {advice}\.$"):
        render(source)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list of at least one message, found an empty list"),
        ("hi", "expected a list of at least one message, found str"),
        (None, "expected a list of at least one message, found NoneType"),
        ({"role": "user"}, "expected a list of at least one message, found dict"),
        (["hi"], r"expected messages\[0\] to be a message .*, found str"),
        (
            [*CHAT, {"content": "x"}],
            r"expected messages\[4\] to be a message .*, found a role of type NoneType",
        ),
        ([{"role": "user"}], r"expected messages\[0\] to be a message .*, found content of type NoneType"),
        ([{"role": "user", "content": 3}], r"expected messages\[0\] .*, found content of type int"),
        (
            [{"role": "u", "content": [object()]}],
            r"expected messages\[0\] to be plain JSON, found a value of type object",
        ),
        (
            [{"role": "u", "content": "", "x": {1: 2}}],
            r".*, found a value of type dict with keys that are not strings",
        ),
    ],
)
def test_malformed_messages_are_one_sentence(messages: object, message: str) -> None:
    with pytest.raises(PrecastError, match=rf"^Chat: {message}\.$"):
        render("x", messages=messages)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tools": {"type": "function"}}, "expected tools to be a list of tools, found dict"),
        (
            {"tools": [{"name": "f"}, print]},
            r"expected tools\[1\] to be a tool .*, found a function; give its JSON schema",
        ),
        ({"documents": ["text"]}, r"expected documents\[0\] to be a JSON object, found str"),
        (
            {"documents": [{"text": object()}]},
            "expected documents to be plain JSON, found a value of type object",
        ),
        (
            {"variables": {"f": print}},
            "expected template variables to be plain JSON, found a value of type builtin_.*",
        ),
        (
            {"variables": {"messages": []}},
            "the template variable 'messages' is reserved; choose another name, or use the argument of that name",
        ),
    ],
)
def test_other_malformed_arguments_are_one_sentence(given: dict, message: str) -> None:
    with pytest.raises(PrecastError, match=rf"^Chat: {message}\.$"):
        render("x", **given)


def test_deep_messages_are_one_sentence() -> None:
    content: list = []
    for _ in range(100):
        content = [content]
    with pytest.raises(
        PrecastError,
        match=r"^Chat: expected messages\[0\] to be nested at most 64 levels deep, found more; flatten it\.$",
    ):
        render("x", messages=[{"role": "user", "content": content}])


# Limits. The templates above show that ordinary templates stay below the limits.

STOPPED = r"^The chat template was stopped, because {}; use another template\.$"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% endfor %}",
        "{% for a in 'x' * 300 %}{% for b in 'x' * 300 %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) if false %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) ~ f(n - 1) %}{% endif %}{% endmacro %}{{ f(30) }}",
        "{% for x in [range(300)] * 300 recursive %}{% if x is iterable %}{{ loop(x) }}{% endif %}{% endfor %}",
        "{% block a %}{{ self.b() }}{{ self.b() }}{% endblock %}{% block b %}{% for x in range(9999) %}{% endfor %}{% endblock %}",
    ],
)
def test_a_template_that_takes_too_many_steps_is_stopped(source: str) -> None:
    with pytest.raises(PrecastError, match=STOPPED.format("it took more than 20,000 steps")):
        render(source, limits=Limits(steps=20_000, seconds=60))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ['' ] * 12000 * 2 }}",
        "{% set a = [''] * 999 %}{% set b = [a] * 999 %}{{ b }}",
        "{% set a = [''] * 999 %}{% set b = [a] * 999 %}{{ b | tojson }}",
        "{% set a = [''] * 999 %}{% set b = [a] * 999 %}{% set c = b ~ '' %}",
        "{% set a = ['x' * 9999] * 999 %}{% set b = a | string %}",
        "{% set a = ['x' * 9999] * 999 %}{% set b = a | join %}",
        "{% set a = ['x' * 9999] * 999 %}{% set b = ''.join(a) %}",
        "{% set a = ['x' * 9999] * 999 %}{% set b = '%s' % (a,) %}",
        "{% set a = ['x' * 9999] * 999 %}{% set b = '{}'.format(a) %}",
        "{% set a = ['x' * 9999] * 999 %}{% set b = '%s' | format(a) %}",
        "{% set a = ['x' * 999] * 999 %}{% set b = a | tojson %}",
        "{{ 'x' * 10 ** 6 }}",
        "{{ 10 ** 6 * 'x' }}",
        "{{ 'x' * 99999 * 9 }}",
        "{{ '中' * 40000 }}",
        "{{ '😀' * 30000 }}",
        "{% set s = 'x' * 9999 %}" + "{% set s = s ~ s %}" * 40,
        "{% set s = 'x' * 9999 %}" + "{% set s = s + s %}" * 40,
        "{% set s = 'x' * 9999 %}" + "{% set t = s[1:] %}" * 40,
        "{% set s = 'x' * 9999 %}" + "{% set t = s.upper() %}" * 40,
        "{% set s = 'x' * 9999 %}" + "{% set t = s | upper %}" * 40,
        "{% set s = 'x' * 999 %}{{ s.replace('', s) }}",
        "{% set s = 'x' * 999 %}{{ s | replace('x', s) }}",
        "{% set s = 'x' * 999 %}{{ s.join(s) }}",
        "{% set s = 'x' * 999 %}{{ s | join(s) }}",
        "{% set s = ['x' * 999] * 9 %}{{ s | map('replace', 'x', 'x' * 999) | list }}",
        "{{ 'x'.center(10 ** 6) }}",
        "{{ '\\t'.expandtabs(tabsize=10 ** 6) }}",
        "{{ 'x' | indent(10 ** 6) }}",
        "{% for a in range(500) %}{% set b %}" + "x" * 999 + "{% endset %}{% endfor %}",
        "{{ ('ab' * 5000) | list }}",
        "{{ ('a,' * 1000).split(',') }}",
        "{{ ('a ' * 1000).split() }}",
        "{{ ('a\\n' * 1000).splitlines() }}",
    ],
)
def test_a_template_that_allocates_too_much_is_stopped(source: str) -> None:
    reason = "it allocated more than 100,000 bytes of text and lists"
    with pytest.raises(PrecastError, match=STOPPED.format(reason)):
        render(source, limits=Limits(allocated=100_000, seconds=60))


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(500) %}" + "x" * 99 + "{% endfor %}",
        "{% for a in range(999) %}{{ messages[0].content }}{% endfor %}",
    ],
)
def test_a_template_that_writes_too_much_is_stopped(source: str) -> None:
    with pytest.raises(PrecastError, match=STOPPED.format("the prompt grew beyond 5,000 characters")):
        render(source, limits=Limits(output=5_000, seconds=60))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 10 ** (10 ** 10) }}", "a number grew beyond 4096 bits"),
        (
            "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
            "a number grew.*",
        ),
        ("{{ '%999999999d' % 1 }}", "the width in the format '%9999' is too large"),
        ("{{ '%.999999999f' % 1 }}", "the width in the format '%.9999' is too large"),
        ("{{ '%*d' % (999999999, 1) }}", r"the width in the format '%\*' is too large"),
        ("{{ '%(a(b)c)99999d' % {'a(b)c': 1} }}", r"the width in the format .* is too large"),
        ("{{ '%(a)99999d' % {'a': 1} }}", r"the width in the format .* is too large"),
        ("{{ '{:999999999}'.format(1) }}", "the width in the format '{:9999' is too large"),
        ("{{ '{:{}}'.format(1, 999999999) }}", "the width in the format '{:{' is too large"),
        ("{{ '{a:99999}'.format_map({'a': 1}) }}", "the width in the format '{a:9999' is too large"),
        ("{{ '%99999d' | format(1) }}", "the width in the format '%9999' is too large"),
        ("{{ range(10 ** 9) }}", "OverflowError: Range too big.*"),
        ("{{ 1.5 | round(10 ** 9, 'ceil') }}", "cannot round to 1000000000 digits"),
        ("{{ [[1] * 9] * 9 | sum(start=[]) }}", "sum adds numbers only"),
        ("{{ [1] | tojson(indent=10 ** 9) }}", "cannot indent JSON by 1000000000"),
        ("{{ 1 .to_bytes(10 ** 9) }}", "access to attribute 'to_bytes' of 'int' object is unsafe"),
        ("{{ strftime_now('%Y' * 999) }}", "the format of strftime_now is too long"),
        (
            "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
            "a value of type TemplateNamespace cannot become text",
        ),
    ],
)
def test_an_operation_that_would_be_huge_is_refused(source: str, reason: str) -> None:
    with pytest.raises(
        PrecastError, match=rf"^The chat template failed at line 1: {reason}; correct it, .*\.$"
    ):
        render(source)


def test_a_template_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(PrecastError, match=STOPPED.format("it took more than 0 seconds of CPU time")):
        render("{% for m in messages %}{% endfor %}", limits=Limits(seconds=0))


@pytest.mark.parametrize(("waited", "is_stopped"), [(10.0, False), (100.0, True)])
def test_waiting_for_the_processor_counts_only_against_the_wall_clock(
    monkeypatch: pytest.MonkeyPatch, waited: float, is_stopped: bool
) -> None:
    """Advance the wall clock by `waited` seconds at each reading, while the thread's CPU time stands still."""
    readings = itertools.count(0.0, waited)
    clocks = SimpleNamespace(thread_time=lambda: 0.0, monotonic=lambda: next(readings))
    template = ChatTemplate("{{ messages[0].content }}", bos_token=None, eos_token=None)
    monkeypatch.setattr(chat_meter, "time", clocks)
    if not is_stopped:
        assert template.render(CHAT) == "Be brief."
        return
    with pytest.raises(PrecastError, match=STOPPED.format("it took longer than 60 seconds")):
        template.render(CHAT)


def test_a_template_that_is_too_long_is_refused() -> None:
    with pytest.raises(
        PrecastError, match=r"^Chat template: expected at most 10 characters, found 11; .*\.$"
    ):
        render("x" * 11, limits=Limits(source=10))


def test_a_long_conversation_stays_far_below_the_limits() -> None:
    messages = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "ok"}] * 1000
    tenth = Limits(steps=500_000, allocated=1 << 24, output=1 << 22)
    assert render(TEMPLATES["chatml"], messages=messages, limits=tenth).count("<|im_start|>") == 2001


def test_the_default_limits_stop_nested_loops() -> None:
    source = "{% for a in messages[0].content %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(PrecastError, match=STOPPED.format("it (took|allocated) .*")):
        render(source, messages=[{"role": "user", "content": "x" * 5000}])
