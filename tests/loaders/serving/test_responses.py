"""OpenAI's responses through its client, with the demo model."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace as Namespace
from typing import Any, cast

import pytest

from precast.loaders.serving.errors import ApiError
from precast.loaders.serving.openai import responses
from precast.loaders.serving.openai.response_schemas import ResponseRequest
from precast.loaders.serving.openai.response_store import ResponseStore
from precast.loaders.serving.openai.response_translate import new_messages
from precast.loaders.serving.requests import EventReply

QUESTION = "What is the capital of France?"
TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "description": "Return the weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 20}},
            "required": ["place"],
            "additionalProperties": False,
        },
        "strict": True,
    }
]
BODY: dict[str, Any] = {"model": "tiny", "input": "fox", "max_output_tokens": 4}


def ask(openai: Any, **options: Any) -> Any:
    return openai.responses.create(**{"model": "demo", "input": QUESTION, "max_output_tokens": 24, **options})


def test_an_answer(openai) -> None:
    answer = ask(openai)
    chat: Any = [{"role": "user", "content": QUESTION}]
    other = openai.chat.completions.create(model="demo", messages=chat, max_tokens=24)
    assert answer.output_text == other.choices[0].message.content
    assert answer.status == {"stop": "completed", "length": "incomplete"}[other.choices[0].finish_reason]
    assert answer.usage.total_tokens == other.usage.total_tokens
    assert [item.type for item in answer.output] == ["message"]
    assert answer.error is None


def test_an_incomplete_answer(openai) -> None:
    answer = ask(openai, max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"


def test_a_stream_has_the_same_text(openai) -> None:
    whole = ask(openai)
    with openai.responses.stream(model="demo", input=QUESTION, max_output_tokens=24) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_conversation_is_continued(openai) -> None:
    first = ask(openai, instructions="Be brief.")
    second = ask(openai, input="And of Italy?", previous_response_id=first.id)
    messages: Any = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert second.output_text == ask(openai, input=messages).output_text
    third = list(ask(openai, input="And of Spain?", previous_response_id=second.id, stream=True))[-1].response
    assert (
        ask(openai, input="Thanks!", previous_response_id=third.id).usage.input_tokens
        > third.usage.input_tokens
    )


def test_a_response_is_shown_and_deleted(openai) -> None:
    from openai import NotFoundError

    answer = ask(openai)
    streamed = list(ask(openai, stream=True))[-1].response
    for response in (answer, streamed):
        assert openai.responses.retrieve(response.id) == response
        openai.responses.delete(response.id)
        for call in (openai.responses.retrieve, openai.responses.delete):
            with pytest.raises(
                NotFoundError, match="not found; it was not stored, or was deleted or forgotten"
            ):
                call(response.id)
        with pytest.raises(NotFoundError, match="not found; send the whole conversation"):
            ask(openai, previous_response_id=response.id)


def test_a_streamed_response_is_stored_before_its_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a client that continues the response at once might get status 404."""
    store = ResponseStore()
    answers = Namespace(model=None, completion=lambda: Namespace(message=dict))

    async def prepare(_: Any, work: Callable[[], Any]) -> Any:
        return work()

    @asynccontextmanager
    async def answering(*_: Any) -> AsyncIterator[Any]:
        yield answers

    async def events(_: Any, head: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"type": "response.completed", "response": head}

    monkeypatch.setattr(responses, "answering", answering)
    monkeypatch.setattr(responses, "_events", events)
    monkeypatch.setattr(responses, "_sampling", lambda *_: {})

    async def main() -> bytes:
        services: Any = Namespace(prepare=prepare, responses=store)
        body = json.dumps(BODY | {"stream": True}).encode()
        reply = await responses.responses(services, cast("Any", None), body)
        assert isinstance(reply, EventReply)
        async with reply.closing:
            return await anext(reply.events)

    sent = asyncio.run(main())
    response = json.loads(sent.partition(b"data: ")[2])["response"]
    assert json.loads(store.body(response["id"])) == response


def test_a_response_that_is_not_stored(openai) -> None:
    from openai import NotFoundError

    answer = ask(openai, store=False)
    with pytest.raises(NotFoundError, match="not found; send the whole conversation as input"):
        ask(openai, previous_response_id=answer.id)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_tools_and_their_results(openai, choice) -> None:
    options = {"model": "tools", "tools": TOOLS, "tool_choice": choice, "max_output_tokens": 200}
    answer = ask(openai, **options)
    call = answer.output[0]
    assert (call.type, call.name, list(json.loads(call.arguments))) == ("function_call", "weather", ["place"])
    events = list(ask(openai, **options, stream=True))
    streamed = events[-1].response
    assert [c.arguments for c in streamed.output] == [c.arguments for c in answer.output]
    done = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert [e.arguments for e in done] == [c.arguments for c in answer.output]
    results = [
        {"type": "function_call_output", "call_id": c.call_id, "output": "sunny"} for c in answer.output
    ]
    last = ask(openai, model="tools", input=results, previous_response_id=answer.id)
    whole = [
        {"role": "user", "content": QUESTION},
        *(c.model_dump(by_alias=True) for c in answer.output),
        *results,
    ]
    assert last.output_text == ask(openai, model="tools", input=whole).output_text


def test_a_schema(openai) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = ask(
        openai, text={"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    )
    assert json.loads(answer.output_text)["a"] in (1, 2)
    assert answer.text.format.type == "json_schema"


def test_items_of_an_answer_become_one_message() -> None:
    items = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "d"},
        {"type": "function_call_output", "call_id": "2", "output": "e"},
        {"role": "developer", "content": "h"},
    ]
    given = ResponseRequest.model_validate_json(json.dumps({"model": "m", "input": items}))
    calls = [
        {"id": str(i), "type": "function", "function": {"name": n, "arguments": "{}"}}
        for i, n in ((1, "f"), (2, "g"))
    ]
    assert new_messages(given.input) == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "d"},
        {"role": "tool", "tool_call_id": "2", "content": "e"},
        {"role": "system", "content": "h"},
    ]


def test_the_store_is_bounded() -> None:
    store = ResponseStore(most_responses=2, most_characters=100)
    for name in "abc":
        store.add(name, [{"role": "user", "content": name}], b"")
    with pytest.raises(ApiError):
        store.messages("a")
    assert store.messages("b")[0]["content"] == "b"
    store.add("d", [{"role": "user", "content": "x" * 20}], b"x" * 40)
    with pytest.raises(ApiError):
        store.messages("c")
    store.add("e", [{"role": "user", "content": "x"}], b"x" * 200)
    for name in "bde":
        with pytest.raises(ApiError):
            store.messages(name)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"input": 3}, "input"),
        ({"input": []}, None),
        ({"input": [{"type": "item_reference", "id": "x"}]}, None),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "a", "arguments": 3}]},
            "input[0].arguments",
        ),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, None),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_errors(tiny_server, change, param) -> None:
    status, _, body = tiny_server.request("/v1/responses", BODY | change)
    assert status == 400, body
    assert list(body["error"]) == ["message", "type", "param", "code"]
    if param is not None:
        assert body["error"]["param"] == param
