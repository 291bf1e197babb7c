"""Anthropic's messages through its client, with the demo model."""

from typing import Any

import pytest

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS: Any = [
    {
        "name": "weather",
        "description": "Return the weather at a place.",
        "input_schema": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 20}},
            "required": ["place"],
            "additionalProperties": False,
        },
    }
]
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "fox"}]}


@pytest.fixture(scope="module")
def anthropic(demo_server) -> Any:
    from anthropic import Anthropic

    with Anthropic(base_url=demo_server.url, api_key="none", max_retries=0) as client:
        yield client


def ask(anthropic: Any, **options: Any) -> Any:
    given = {"model": "demo", "max_tokens": 24, "messages": QUESTION, **options}
    return anthropic.messages.create(**given)


def test_an_answer(anthropic) -> None:
    answer = ask(anthropic, system="Be brief.")
    (block,) = answer.content
    assert block.type == "text"
    assert block.text
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "demo")
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert 0 < answer.usage.output_tokens <= 24
    again = ask(
        anthropic, system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    )
    assert again.content[0].text == block.text
    assert again.usage.cache_read_input_tokens > 0
    total = answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == total


def test_the_apis_agree(anthropic, openai) -> None:
    other = openai.chat.completions.create(model="demo", messages=QUESTION, max_tokens=24)
    assert ask(anthropic).content[0].text == other.choices[0].message.content


def test_a_stream_has_the_same_text(anthropic) -> None:
    whole = ask(anthropic)
    with anthropic.messages.stream(model="demo", max_tokens=24, messages=QUESTION) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in ask(anthropic, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_stop_sequences(anthropic) -> None:
    answer = ask(anthropic, stop_sequences=["xyz", "Paris"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "Paris")
    assert "Paris" not in answer.content[0].text
    with anthropic.messages.stream(
        model="demo", max_tokens=24, messages=QUESTION, stop_sequences=["Paris"]
    ) as stream:
        assert stream.get_final_message().stop_sequence == "Paris"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tools_and_their_results(anthropic, choice) -> None:
    options = {"model": "tools", "tools": TOOLS, "tool_choice": choice, "max_tokens": 200}
    answer = ask(anthropic, **options)
    assert answer.stop_reason == "tool_use"
    (call, *_) = answer.content
    assert (call.type, call.name, list(call.input)) == ("tool_use", "weather", ["place"])
    with anthropic.messages.stream(messages=QUESTION, **options) as stream:
        streamed = stream.get_final_message()
    assert [b.input for b in streamed.content] == [b.input for b in answer.content]
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": "sunny"}],
        "is_error": False,
    }
    messages = [
        *QUESTION,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    last = ask(anthropic, model="tools", tools=TOOLS, tool_choice={"type": "none"}, messages=messages)
    assert last.content[0].type == "text"


def test_tokens_are_counted(anthropic) -> None:
    count = anthropic.messages.count_tokens(model="demo", messages=QUESTION, system="Be brief.").input_tokens
    usage = ask(anthropic, system="Be brief.").usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens
    more = anthropic.messages.count_tokens(model="tools", messages=QUESTION, tools=TOOLS).input_tokens
    assert more > count


def test_models(anthropic) -> None:
    assert [model.id for model in anthropic.models.list()] == ["demo", "tools"]
    assert anthropic.models.retrieve("tools").display_name == "tools"


def test_the_clients_errors(anthropic) -> None:
    from anthropic import BadRequestError, NotFoundError

    with pytest.raises(NotFoundError, match="does not exist"):
        ask(anthropic, model="x")
    with pytest.raises(NotFoundError, match="does not exist"):
        anthropic.models.retrieve("x")
    with pytest.raises(BadRequestError, match=r"Unknown or unsupported parameter: 'container'\."):
        ask(anthropic, container="x")


@pytest.mark.parametrize(
    ("change", "status", "kind", "text"),
    [
        ({"foo": 1}, 400, "invalid_request_error", "Unknown or unsupported parameter: 'foo'."),
        ({"max_tokens": 0}, 400, "invalid_request_error", None),
        ({"max_tokens": None}, 400, "invalid_request_error", None),
        ({"temperature": 1.5}, 400, "invalid_request_error", None),
        ({"messages": []}, 400, "invalid_request_error", None),
        ({"messages": [{"role": "system", "content": "a"}]}, 400, "invalid_request_error", None),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            400,
            "invalid_request_error",
            "messages: expected the last message to have the role 'user', found 'assistant'.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            None,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]},
            400,
            "invalid_request_error",
            "messages: expected no block 'thinking' in a message of the role 'user'.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": 3}]}]},
            400,
            "invalid_request_error",
            "messages[0].content[0].tool_use_id: expected a valid string, found 3.",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, 400, "invalid_request_error", None),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", None),
        ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, 400, "invalid_request_error", None),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", None),
        ({"model": "x"}, 404, "not_found_error", "The model 'x' does not exist."),
    ],
)
def test_errors(tiny_server, change, status, kind, text) -> None:
    found, _, value = tiny_server.request("/v1/messages", BODY | change)
    assert (found, value["type"], value["error"]["type"]) == (status, "error", kind)
    assert list(value["error"]) == ["type", "message"]
    if text is not None:
        assert value["error"]["message"] == text
    if change.keys() <= {"foo", "messages", "tools", "model"} and "assistant" not in str(change):
        count = {name: each for name, each in (BODY | change).items() if name != "max_tokens"}
        assert tiny_server.request("/v1/messages/count_tokens", count)[::2] == (status, value)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/batches"])
def test_errors_of_routes(tiny_server, path) -> None:
    status, _, value = tiny_server.request(path)
    assert status in (404, 405)
    assert value["type"] == "error"


def test_a_schema(anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = ask(anthropic, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert answer.content[0].text.replace(" ", "").replace("\n", "") in ('{"a":1}', '{"a":2}')
