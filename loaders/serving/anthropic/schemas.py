"""Requests of Anthropic's messages.

Parameters that cannot change an answer are accepted and ignored: `metadata`, `service_tier` and `cache_control`. Other
parameters that precast does not support are errors.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ..openai.schemas import MOST_STOPS
from ..schema import Items, Schema


class CacheControl(Schema):
    """A hint about caching, which precast does not need."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Schema):
    """The base of all blocks of content."""

    cache_control: CacheControl | None = None


class Text(Block):
    """A text."""

    type: Literal["text"]
    text: str
    citations: None = None


class ToolUse(Block):
    """A tool call of an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Mapping[str, Any]
    caller: Mapping[str, Any] | None = None


class ToolResult(Block):
    """The result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Items[Text] | None = None
    is_error: bool | None = None


class Thinking(Schema):
    """The reasoning of an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


Content = Annotated[Text | ToolUse | ToolResult | Thinking, Field(discriminator="type")]


class Message(Schema):
    """A message of a chat."""

    role: Literal["user", "assistant"]
    content: str | Items[Content]


class Tool(Schema):
    """A tool that the model may call."""

    name: str
    description: str | None = None
    input_schema: Mapping[str, Any]
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Schema):
    """The choice of a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Schema):
    """The wish for reasoning: "disabled" turns it off where the chat template can, and "adaptive" leaves it on."""

    type: Literal["disabled", "adaptive"]


class Format(Schema):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: Mapping[str, Any] = Field(alias="schema")


class OutputConfig(Schema):
    """The form of the answer."""

    format: Format | None = None


class Metadata(Schema):
    """Facts about the request, which precast ignores."""

    user_id: str | None = None


class CountRequest(Schema):
    """A request of ``/v1/messages/count_tokens``."""

    model: str
    messages: Items[Message] = Field(min_length=1)
    system: str | Items[Text] | None = None
    tools: Items[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest):
    """A request of ``/v1/messages``."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    stop_sequences: Items[str] | None = Field(None, max_length=MOST_STOPS)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
