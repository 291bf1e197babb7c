"""Translate requests of OpenAI's API to the model's terms."""

from collections.abc import Sequence
from typing import Any

from ..answers import Ask
from ..errors import ApiError
from .plain import ROLES
from .schemas import (
    MOST_STOPS,
    ChatRequest,
    CompletionRequest,
    Message,
    ResponseFormat,
    Sampling,
    Tool,
    ToolName,
)

# Parameters with the same name and meaning as in `SamplingParams`.
_SAME = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_tokens",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
    "json_schema",
    "regex",
    "grammar",
    "choice",
)


def chat_ask(request: ChatRequest) -> Ask:
    """Return the work that a chat completions request asks for.

    Raises:
        ApiError: parameters contradict each other, or are not supported together.
    """
    _check_chat(request)
    fields = sampling_fields(request)
    if (most := request.max_completion_tokens) is not None:
        fields["max_tokens"] = most
    if request.logprobs:
        fields["logprobs"] = request.top_logprobs or 0
    tools = None if request.tool_choice == "none" else request.tools
    return Ask(
        model=request.model,
        fields=fields | _constraint(request.response_format),
        count=request.n or 1,
        messages=[message_of(message) for message in request.messages],
        # Without tools, the template mentions none to the model, and the parser treats no text as a call.
        tools=[tool_of(tool) for tool in tools] if tools else None,
        tool_choice=_choice(request.tool_choice),
        strict=frozenset(tool.function.name for tool in tools or () if tool.function.strict),
        # OpenAI's API calls a tool that is named exactly once.
        is_single_call=request.parallel_tool_calls is False or isinstance(request.tool_choice, ToolName),
        template_variables=request.chat_template_kwargs,
    )


def completion_ask(request: CompletionRequest) -> Ask:
    """Return the work that a completions request asks for.

    Raises:
        ApiError: parameters contradict each other, or are not supported together.
    """
    _check_stream(request)
    count = request.n or 1
    if request.best_of is not None and request.best_of != count:
        raise ApiError(
            400, f"best_of: expected the same value as n ({count}), found {request.best_of}.", param="best_of"
        )
    fields = sampling_fields(request)
    if request.max_tokens == 0:
        if not request.echo or request.stream:
            text = "max_tokens: expected at least 1 without echo or with stream, found 0."
            raise ApiError(400, text, param="max_tokens")
        fields["max_tokens"] = 1  # the reply omits this token
    if request.echo:
        fields |= {"echo": True, "prompt_logprobs": request.logprobs}
    if request.logprobs is not None:
        fields["logprobs"] = request.logprobs
    prompts = _prompts(request.prompt)
    if not prompts:
        raise ApiError(400, "prompt: expected at least one prompt, found none.", param="prompt")
    return Ask(model=request.model, fields=fields, count=count, prompts=prompts)


def _prompts(prompt: Any) -> Sequence[Any]:
    is_single = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    return [prompt] if is_single else list(prompt)


def sampling_fields(request: Sampling) -> dict[str, Any]:
    """Return the sampling parameters that a request gives.

    Raises:
        ApiError: there are too many stop strings.
    """
    fields = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    if request.max_tokens:
        fields["max_tokens"] = request.max_tokens
    if request.seed is not None:
        fields["seed"] = request.seed % (1 << 64)
    if request.stop is not None:
        stops = [request.stop] if isinstance(request.stop, str) else request.stop
        if len(stops) > MOST_STOPS:
            raise ApiError(
                400, f"stop: expected at most {MOST_STOPS} strings, found {len(stops)}.", param="stop"
            )
        fields["stop"] = tuple(stops)
    return fields


def message_of(message: Message) -> dict[str, Any]:
    """Return a message in the form that `Model.chat` accepts.

    Raises:
        ApiError: the message lacks its content.
    """
    if message.content is None and message.role != "assistant":
        text = f"messages: expected content in a message of the role {message.role!r}, found none."
        raise ApiError(400, text, param="messages")
    if message.tool_calls and message.role != "assistant":
        raise ApiError(
            400, "messages: expected tool_calls only in messages of the role 'assistant'.", param="messages"
        )
    given = message.model_dump(exclude_none=True, exclude={"annotations"})
    if message.role == "assistant" and message.content is None:
        given["content"] = ""
    return given | {"role": ROLES.get(message.role, message.role)}


def _check_stream(request: Sampling) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400, "stream_options: expected stream to be true with stream_options.", param="stream_options"
        )


def _check_chat(request: ChatRequest) -> None:
    _check_stream(request)
    if request.max_tokens == 0:
        raise ApiError(400, "max_tokens: expected at least 1, found 0.", param="max_tokens")
    if None not in (request.max_tokens, request.max_completion_tokens):
        text = "max_tokens and max_completion_tokens cannot be combined; give one of them."
        raise ApiError(400, text, param="max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(
            400, "top_logprobs: expected logprobs to be true with top_logprobs.", param="top_logprobs"
        )
    uses_tools = bool(request.tools) and request.tool_choice != "none"
    is_plain = request.response_format is None or request.response_format.type == "text"
    if uses_tools and not is_plain:
        text = "response_format: cannot be combined with tools, because a call would not fit it; give one of them."
        raise ApiError(400, text, param="response_format")
    if request.tool_choice not in (None, "none", "auto") and not request.tools:
        raise ApiError(400, "tool_choice: expected tools with tool_choice, found none.", param="tool_choice")


def tool_of(tool: Tool) -> dict[str, Any]:
    """Return a tool in the form that `Model.chat` accepts."""
    return {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}


def _choice(choice: str | ToolName | None) -> str:
    """Convert a request's `tool_choice` to the argument of `Model.chat`.

    Raises:
        ApiError: the chosen tool is called "auto" or "required".
    """
    if not isinstance(choice, ToolName):
        return "auto" if choice in (None, "none") else str(choice)
    return reserved(choice.function.name)


def reserved(name: str) -> str:
    """Return the name of a chosen tool.

    Raises:
        ApiError: another choice has the same name.
    """
    if name in ("auto", "required"):
        raise ApiError(
            400, f"tool_choice: the tool name {name!r} is reserved; rename the tool.", param="tool_choice"
        )
    return name


def _constraint(form: ResponseFormat | None) -> dict[str, Any]:
    """Return the sampling parameter for a `response_format`.

    Raises:
        ApiError: the schema is missing, or the format does not accept one.
    """
    if (form is not None and form.type == "json_schema") != (
        form is not None and form.json_schema is not None
    ):
        text = (
            "response_format: json_schema must be given with the type 'json_schema', and with no other type."
        )
        raise ApiError(400, text, param="response_format.json_schema")
    if form is None or form.type == "text":
        return {}
    return {"json_schema": {"type": "object"} if form.json_schema is None else form.json_schema.schema_}
