"""Messages in all forms that callers use: null keys, reasoning, content in parts."""

# ruff: noqa: E501 - templates are easier to read on one line

import itertools
from typing import Any

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.text.chat_template import ChatTemplate

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token=None, eos_token=None)


def by_transformers(source: str, messages: list[dict[str, Any]]) -> str:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=source)
    return str(theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


# Ways in which templates read a key: printing, `in`, `is defined`, JSON, `get`.
READS = [
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m }}{% endfor %}",
    "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.tool_calls is defined %}{{ m.tool_calls | length }}{% endif %}{{ m.content | trim }}{% endfor %}",
    "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "{% for m in messages %}{% if m.reasoning_content is defined %}{{ m.reasoning_content + m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m.get('name', 'nobody') }}{{ m['thinking'] }}{{ m.keys() | list }}{% endfor %}",
]
KEYS: dict[str, tuple[Any, ...]] = {
    "content": ("x", None),
    "tool_calls": (None, [CALL]),
    "name": (None, "n"),
    "reasoning": (None, "r"),
    "thinking": (None, "t"),
}


@pytest.mark.parametrize("read", range(len(READS)))
def test_null_keys_are_omitted_as_by_transformers(read: int) -> None:
    for values in itertools.product(*KEYS.values()):
        given = dict(zip(KEYS, values, strict=True))
        if given["content"] is None and given["tool_calls"] is None and given["reasoning"] is None:
            continue
        messages = [{"role": "user", "content": "w?"}, {"role": "assistant", **given, "refusal": None}]
        try:
            expected = by_transformers(READS[read], messages)
        except Exception:
            with pytest.raises(PrecastError):
                template(READS[read]).render(messages)
            continue
        assert template(READS[read]).render(messages) == expected


def test_null_in_a_nested_value_stays() -> None:
    messages = [{"role": "user", "content": "", "tool_calls": [{"id": None}]}]
    assert template("{{ messages[0].tool_calls[0] }}").render(messages) == "{'id': None}"


@pytest.mark.parametrize("extra", [{"tool_calls": [CALL]}, {"reasoning_content": "r"}, {"refusal": "no"}])
def test_content_may_be_missing_beside_another_key(extra: dict[str, Any]) -> None:
    for content in ({}, {"content": None}):
        messages = [{"role": "assistant", **content, **extra}]
        assert template("{{ messages[0].content is defined }}").render(messages) == "False"


@pytest.mark.parametrize("extra", [{}, {"tool_calls": None}, {"name": "n"}, {"refusal": None, "audio": None}])
def test_an_empty_message_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(PrecastError, match=r"found content of type NoneType\.$"):
        template("x").render([{"role": "assistant", "content": None, **extra}])


# --- content in parts ---------------------------------------------------------------------------------------------

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": " two "}]
# Templates that accept content only as text, in either form, or only in parts. All of them print the content.
TEXT_ONLY = [
    "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content | trim }}|{% endfor %}",
    "{% for message in messages %}{{ message['role'] ~ ': ' ~ message['content'] ~ '\n' }}{% endfor %}",
]
EITHER = [
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}+{% endif %}{% endfor %}{% endif %}{% endfor %}",
    "{% macro show(c) %}{% if c is not string %}{% for p in c %}{{ p['text'] }};{% endfor %}{% else %}{{ c }}{% endif %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}",
    "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
]
PARTS_ONLY = [
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}+{% endif %}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", TEXT_ONLY)
def test_parts_become_one_text_for_a_template_that_accepts_only_text(source: str) -> None:
    made = template(source)
    assert made.render([{"role": "user", "content": PARTS}]) == made.render(
        [{"role": "user", "content": "one\n two "}]
    )


@pytest.mark.parametrize("source", [*EITHER, *PARTS_ONLY])
def test_parts_reach_a_template_that_accepts_them(source: str) -> None:
    messages = [{"role": "user", "content": PARTS}]
    assert template(source).render(messages) == by_transformers(source, messages)


@pytest.mark.parametrize("source", PARTS_ONLY)
def test_text_becomes_a_part_for_a_template_that_accepts_only_parts(source: str) -> None:
    made = template(source)
    assert made.render([{"role": "user", "content": "one"}]) == made.render(
        [{"role": "user", "content": PARTS[:1]}]
    )
    mixed = [{"role": "user", "content": "one"}, {"role": "user", "content": PARTS}]
    assert "one" in made.render(mixed[:1])
    assert "two" in made.render(mixed)


@pytest.mark.parametrize("source", [*TEXT_ONLY, *EITHER])
def test_text_reaches_a_template_as_in_transformers(source: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]
    assert template(source).render(messages) == by_transformers(source, messages)


@pytest.mark.parametrize(
    ("part", "kind"),
    [({"type": "image_url", "image_url": {}}, "'image_url'"), ({"type": "text"}, "'text'"), (5, "'int'")],
)
def test_a_part_that_is_not_text_is_refused_by_a_template_that_accepts_only_text(
    part: Any, kind: str
) -> None:
    with pytest.raises(PrecastError) as caught:
        template(TEXT_ONLY[0]).render([{"role": "user", "content": [PARTS[0], part]}])
    assert str(caught.value) == (
        f"Chat: messages[0] has a part of type {kind}, but the model's chat template accepts only text; remove the"
        " part."
    )


def test_content_stays_unchanged_for_a_template_that_refuses_the_probe() -> None:
    source = "{% if messages | length < 2 %}{{ raise_exception('two!') }}{% endif %}{{ messages[1].content[0].text }}"
    assert (
        template(source).render([{"role": "system", "content": "s"}, {"role": "user", "content": PARTS}])
        == "one"
    )
