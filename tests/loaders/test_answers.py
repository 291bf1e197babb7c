"""Answers to chats: reasoning and tool calls in streams and completions, from an engine with scripted tokens."""

import asyncio
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.text.answer_parser import ContentDelta, ReasoningDelta, ToolCallDelta
from precast.loaders.text.chat_messages import plain_messages
from precast.loaders.text.chat_template import ChatOptions, ChatTemplate

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = PLAIN + "{# <tool_call> <think> #}"
MESSAGES = [{"role": "user", "content": "the cat"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "é 😀"}}\n</tool_call>'
ANSWER = f"<think>\nhm, é\n</think>\n\nI look.\n{CALL}"


@pytest.fixture(scope="module")
def saying(scripted_model):
    """Return a function that makes a model with a chat template, whose answer is a given text."""

    def make(text: str, template: str = THINKING) -> Any:
        return scripted_model(text, template, special=("[TOOL_CALLS]", "[ARGS]", "<|other|>"))

    return make


def calls_of(completion: Any) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in completion.tool_calls]


def test_a_completion_has_content_reasoning_and_tool_calls(saying):
    model = saying(ANSWER)
    found = model.chat(MESSAGES, tools=TOOLS)
    assert (found.text, found.reasoning, found.finish_reason) == ("I look.", "hm, é", "tool_calls")
    assert calls_of(found) == [("look", '{"at": "é 😀"}')]
    assert model.tokenizer.decode(found.token_ids) == ANSWER


def test_a_stream_yields_content_and_its_events_everything(saying):
    model = saying(ANSWER)
    assert "".join(model.stream_chat(MESSAGES, tools=TOOLS)) == "I look."
    stream = model.stream_chat(MESSAGES, tools=TOOLS)
    events = list(stream.events())
    assert "".join(e.text for e in events if isinstance(e, ContentDelta)) == "I look."
    assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)) == "hm, é"
    assert [(e.number, e.call) for e in events if isinstance(e, ToolCallDelta)] == [
        (0, stream.completion.tool_calls[0])
    ]
    kinds = [type(e) for e in events]
    assert kinds == sorted(kinds, key=[ReasoningDelta, ContentDelta, ToolCallDelta].index)
    assert len(events) > 10


def test_an_event_loop_gets_the_same(saying):
    model = saying(ANSWER)

    async def collect() -> tuple[list[Any], str]:
        stream = model.stream_chat(MESSAGES, tools=TOOLS)
        events = [event async for event in stream.aevents()]
        content = "".join([piece async for piece in model.stream_chat(MESSAGES, tools=TOOLS)])
        assert stream.completion.finish_reason == "tool_calls"
        return events, content

    events, content = asyncio.run(collect())
    expected = list(model.stream_chat(MESSAGES, tools=TOOLS).events())
    assert [type(e) for e in events] == [type(e) for e in expected]
    assert events[:-1] == expected[:-1]
    assert content == "I look."


@settings(deadline=None, max_examples=30)
@given(reads=st.integers(0, 12))
def test_a_completion_holds_what_was_read(saying, reads):
    stream = saying(ANSWER).stream_chat(MESSAGES, tools=TOOLS)
    events = stream.events()
    seen = list(itertools.islice(events, reads))
    found = stream.completion
    assert found.text == "".join(e.text for e in seen if isinstance(e, ContentDelta))
    assert found.reasoning == "".join(e.text for e in seen if isinstance(e, ReasoningDelta))
    if not any(isinstance(e, ToolCallDelta) for e in seen):
        assert found.finish_reason == "unfinished"
    rest = stream.finish()
    assert (rest.text, rest.reasoning, len(rest.tool_calls)) == ("I look.", "hm, é", 1)
    assert (rest.finish_reason, list(stream.events())) == ("tool_calls", [])


def test_without_tools_nothing_is_a_call(saying):
    found = saying(ANSWER).chat(MESSAGES)
    assert (found.text, found.reasoning) == (f"I look.\n{CALL}", "hm, é")
    assert (found.tool_calls, found.finish_reason) == ((), "stop")


@pytest.mark.parametrize("template", [PLAIN, THINKING])
def test_the_text_format_leaves_everything_in_the_text(saying, template):
    answer_format = None if template == PLAIN else "text"
    found = saying(ANSWER, template).chat(MESSAGES, tools=TOOLS, answer_format=answer_format)
    assert (found.text, found.reasoning, found.tool_calls, found.finish_reason) == (ANSWER, "", (), "stop")


def test_prompts_without_a_template_are_not_parsed(saying):
    model = saying(ANSWER)
    assert model.generate("the cat").text == ANSWER
    assert [event.text for event in model.stream("the cat").events()] == list(model.stream("the cat"))


def test_a_format_by_name(saying):
    found = saying(CALL, PLAIN).chat(MESSAGES, tools=TOOLS, answer_format="hermes")
    assert (found.text, calls_of(found)) == ("", [("look", '{"at": "é 😀"}')])
    with pytest.raises(
        PrecastError, match=r"^answer_format: expected one of gemma, .*, text, found 'gpt'\.$"
    ):
        saying(CALL, PLAIN).chat(MESSAGES, tools=TOOLS, answer_format="gpt")


def test_the_prompt_may_open_the_reasoning(saying):
    template = PLAIN + "{% if add_generation_prompt %}<think>\n{% endif %}"
    found = saying("hm\n</think>\n\nYes.", template).chat(MESSAGES)
    assert (found.text, found.reasoning) == ("Yes.", "hm")
    closed = PLAIN + "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
    found = saying("Yes.", closed).chat(MESSAGES)
    assert (found.text, found.reasoning) == ("Yes.", "")


def test_markers_that_are_special_tokens_are_seen(saying):
    """Other special tokens stay out of the text, as do markers without tools."""
    answer = 'I<|other|> look.[TOOL_CALLS]look[ARGS]{"at": 1}[TOOL_CALLS]look[ARGS]{}'
    template = PLAIN + "{# [TOOL_CALLS] #}"
    found = saying(answer, template).chat(MESSAGES, tools=TOOLS)
    assert (found.text, calls_of(found)) == ("I look.", [("look", '{"at": 1}'), ("look", "{}")])
    assert saying(answer, template).chat(MESSAGES).text == 'I look.look{"at": 1}look{}'


def test_an_answer_that_is_cut_off_keeps_its_reason(saying):
    model = saying(ANSWER)
    tokens = len(model.tokenizer.encode(ANSWER))
    found = model.chat(MESSAGES, SamplingParams(max_tokens=tokens), tools=TOOLS)
    assert (found.finish_reason, len(found.tool_calls)) == ("length", 1)
    found = model.chat(MESSAGES, SamplingParams(max_tokens=tokens - 20), tools=TOOLS)
    assert (found.finish_reason, found.tool_calls) == ("length", ())
    assert found.text.startswith('I look.\n<tool_call>\n{"name"')
    found = model.chat(MESSAGES, SamplingParams(max_tokens=10), tools=TOOLS)
    assert (found.finish_reason, found.text) == ("length", "")
    assert found.reasoning


def test_an_echo_is_no_part_of_the_answer(saying):
    model = saying(ANSWER)
    found = model.chat(MESSAGES, SamplingParams(echo=True), tools=TOOLS)
    prompt = model.tokenizer.decode(found.prompt_token_ids)
    assert (found.text, found.reasoning, len(found.tool_calls)) == (f"{prompt}I look.", "hm, é", 1)


def test_a_closed_stream_yields_nothing(saying):
    stream = saying(ANSWER).stream_chat(MESSAGES, tools=TOOLS)
    next(stream)
    stream.close()
    assert list(stream) == list(stream.events()) == []
    assert stream.completion.finish_reason == "unfinished"


def test_several_answers_to_a_chat(saying):
    model = saying(ANSWER)
    found = model.chat_answers(MESSAGES, 3, SamplingParams(seed=1), tools=TOOLS)
    assert [(f.text, f.reasoning, len(f.tool_calls)) for f in found] == [("I look.", "hm, é", 1)] * 3
    assert len({call.id for f in found for call in f.tool_calls}) == 3
    assert model.scheduler.stats().running == 0
    assert [f.text for f in model.generate_answers("the cat", 5)] == [ANSWER] * 5


def test_conversations_together(saying):
    model = saying(ANSWER)
    chats = [MESSAGES, [], MESSAGES, [{"role": "user", "content": "the dog"}]]
    results = sorted(model.chat_each(chats, tools=TOOLS))
    assert [index for index, _ in results] == [0, 1, 2, 3]
    assert str(results[1][1]) == "Chat: expected a list of at least one message, found an empty list."
    for index in (0, 2, 3):
        found = results[index][1]
        assert (found.text, found.reasoning, found.finish_reason) == ("I look.", "hm, é", "tool_calls")
        assert calls_of(found) == [("look", '{"at": "é 😀"}')]


@pytest.mark.parametrize("count", [0, -1, 1.5, None])
def test_the_number_of_answers_is_checked(saying, count):
    with pytest.raises(PrecastError) as raised:
        saying(ANSWER).generate_answers("the cat", count)
    assert str(raised.value) == f"count: expected a number of at least 1, found {count}."


def test_a_failure_of_one_answer_ends_the_others(saying):
    model = saying(ANSWER)
    model.engine.vocab = 3
    with pytest.raises(PrecastError, match=r"^prompt: expected token ids from 0 to "):
        model.generate_answers("the cat", 2)
    model.engine.vocab = 400

    def fail(step: Any) -> np.ndarray:
        raise PrecastError("the device is gone")

    model.engine.logits = fail
    with pytest.raises(PrecastError, match=r"^the device is gone$"):
        model.generate_answers("the cat", 2, SamplingParams(repetition_penalty=1.1))
    assert model.scheduler.stats().running == 0


def test_an_answer_is_a_message_of_the_conversation(saying):
    """The answer's tool calls reach the template with arguments as objects; text that is not an object stays text."""
    found = saying(ANSWER).chat(MESSAGES, tools=TOOLS)
    message = found.message()
    (call,) = found.tool_calls
    assert message == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "hm, é",
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": "look", "arguments": call.arguments}}
        ],
    }
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% endfor %}"
    )
    tokenizer = saying("", template).tokenizer
    assert tokenizer.render_chat([*MESSAGES, message]) == '{"at": "é 😀"}'
    for text in ("[1]", "{", '"x"', "[" * 100_000):
        message["tool_calls"][0]["function"]["arguments"] = text
        assert tokenizer.render_chat([*MESSAGES, message]) == json.dumps(text)
    for calls in ([1], [{"function": 1}], [{}]):
        assert plain_messages([{**message, "tool_calls": calls}])[0]["tool_calls"] == calls
    assert saying("Yes.").chat(MESSAGES).message() == {"role": "assistant", "content": "Yes."}


def test_tools_reach_a_template_that_looks_for_xml_tools():
    template = ChatTemplate(
        "{% for tool in xml_tools or [] %}{{ tool.name }}{% endfor %}{{ python_tools }}",
        bos_token=None,
        eos_token=None,
    )
    tools = [{"name": "look"}]
    assert template.render(MESSAGES, ChatOptions(tools=tools)) == "look"
    for name in ("xml_tools", "python_tools"):
        given = ChatOptions(tools=tools, variables={name: []})
        assert template.render(MESSAGES, given) == ("[]" if name == "python_tools" else "")
    assert template.render(MESSAGES, ChatOptions()) == ""
