"""Requests of OpenAI's chat completions and completions, and precast's own sampling parameters beside them.

Parameters that cannot change an answer are accepted and ignored: `user`, `metadata`, `store`, `prediction`,
`service_tier`, `safety_identifier`, and those that name a cache. Other parameters that precast does not support are
errors.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ..schema import Items, Off, Schema

# Maximum number of stop strings. The time for a piece of text grows with their number.
MOST_STOPS = 16
MOST_ANSWERS = 128
MOST_LOGPROBS = 20
# The time for a token grows with both.
MOST_REPEATED = 64
MOST_WORDS = 256


class StreamOptions(Schema):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class Sampling(Schema):
    """The parameters that chat completions and completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Mapping[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | Items[str] | None = None
    # precast's own parameters
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=MOST_REPEATED)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: Items[int] | None = Field(None, max_length=MOST_STOPS)
    bad_words: Items[str] | None = Field(None, max_length=MOST_WORDS)
    ignore_eos: bool | None = None
    json_schema: Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Items[str] | None = None
    # parameters without an effect on the answer
    user: str | None = None
    metadata: Mapping[str, str] | None = None
    store: Off | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class TextPart(Schema):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Schema):
    """The function and the arguments of a tool call."""

    name: str
    arguments: str


class ToolCall(Schema):
    """A tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Schema):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[TextPart] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # keys of answers that clients send back
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Items[Any] | None = None


class Function(Schema):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool | None = None


class Tool(Schema):
    """A tool."""

    type: Literal["function"]
    function: Function


class FunctionName(Schema):
    """The name of a function."""

    name: str


class ToolName(Schema):
    """The tool that the model must call."""

    type: Literal["function"]
    function: FunctionName


class NamedSchema(Schema):
    """A JSON Schema with a name; answers always follow it, so `strict` has no effect."""

    name: str
    schema_: Mapping[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Schema):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class ChatRequest(Sampling):
    """A request of ``/v1/chat/completions``."""

    messages: Items[Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolName | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    modalities: Items[Literal["text"]] | None = None
    prediction: Mapping[str, Any] | None = None


class CompletionRequest(Sampling):
    """A request of ``/v1/completions``."""

    prompt: str | Items[int] | Items[str] | Items[Items[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = None
    suffix: None = None
