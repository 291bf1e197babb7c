"""Requests of OpenAI's responses.

Parameters that cannot change an answer are accepted and ignored. Other parameters that precast does not support are
errors.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..schema import Items, Off, Schema

Status = Literal["in_progress", "completed", "incomplete"]


class Part(Schema):
    """A text in a message. Clients send the other keys of answers back."""

    type: Literal["input_text", "output_text", "reasoning_text", "text"]
    text: str
    annotations: Items[Any] | None = None
    logprobs: Items[Any] | None = None


class MessageItem(Schema):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[Part]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Schema):
    """A tool call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    namespace: None = None
    caller: None = None
    async_: None = Field(None, alias="async")


class ResultItem(Schema):
    """The result of a tool call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Items[Part]
    id: str | None = None
    status: Status | None = None


class ReasoningItem(Schema):
    """The reasoning of an earlier answer."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Items[Any] = Field(default_factory=list, max_length=0)
    content: Items[Part] | None = None
    encrypted_content: None = None
    status: Status | None = None


def _kind(value: Any) -> str:
    """Return the type of an item, which messages may omit."""
    found = value.get("type", "message") if isinstance(value, Mapping) else getattr(value, "type", "message")
    return str(found)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Schema):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Schema):
    """The function that the model must call."""

    type: Literal["function"]
    name: str


class TextFormat(Schema):
    """The form of the answer; answers always follow a schema, so `strict` has no effect."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Mapping[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Schema):
    """The form of the answer."""

    format: TextFormat | None = None


class ResponseStreamOptions(Schema):
    """Options of a streamed answer."""

    include_obfuscation: Off | None = None


class ResponseRequest(Schema):
    """A request of ``/v1/responses``."""

    model: str
    input: str | Items[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    text: TextConfig | None = None
    tools: Items[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Off | None = None
    include: Items[Any] | None = Field(None, max_length=0)
    reasoning: None = None
    # parameters without an effect on the answer
    metadata: Mapping[str, str] | None = None
    user: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
