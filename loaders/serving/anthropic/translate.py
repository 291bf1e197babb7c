"""Translate requests of Anthropic's API to the model's terms."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..answers import Ask
from ..errors import ApiError
from ..openai.translate import reserved
from .schemas import (
    CountRequest,
    Message,
    MessagesRequest,
    Text,
    Thinking,
    Tool,
    ToolChoice,
    ToolResult,
    ToolUse,
)


def messages_ask(request: CountRequest) -> Ask:
    """Return the work that a request asks for.

    Raises:
        ApiError: parameters contradict each other, or a block is at the wrong place.
    """
    is_none = request.tool_choice is not None and request.tool_choice.type == "none"
    tools = None if is_none or not request.tools else [tool_of(tool) for tool in request.tools]
    thinking = request.thinking
    return Ask(
        model=request.model,
        fields=_fields(request, has_tools=tools is not None),
        messages=[*_system(request), *(m for each in request.messages for m in _messages(each))],
        tools=tools,
        tool_choice=_choice(request.tool_choice, has_tools=bool(request.tools)),
        is_single_call=bool(request.tool_choice and request.tool_choice.disable_parallel_tool_use),
        template_variables={"enable_thinking": False} if thinking and thinking.type == "disabled" else None,
    )


def _fields(request: CountRequest, *, has_tools: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if request.output_config is not None and (form := request.output_config.format) is not None:
        if has_tools:
            text = "output_config.format: cannot be combined with tools, because a call would not fit it."
            raise ApiError(400, text)
        fields["json_schema"] = form.schema_
    if not isinstance(request, MessagesRequest):
        return fields
    if request.messages[-1].role == "assistant":
        raise ApiError(400, "messages: expected the last message to have the role 'user', found 'assistant'.")
    given = {name: getattr(request, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    if request.stop_sequences:
        given["stop"] = tuple(request.stop_sequences)
    return fields | {name: value for name, value in given.items() if value is not None}


def _system(request: CountRequest) -> list[dict[str, Any]]:
    return [] if request.system is None else [{"role": "system", "content": _joined(request.system)}]


def _joined(content: str | Sequence[Text] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block.text for block in content)


def _messages(message: Message) -> Iterator[dict[str, Any]]:
    """Yield a message in the form of `Model.chat`: each result of a tool is a message of its own."""
    blocks = message.content
    if isinstance(blocks, str):
        yield {"role": message.role, "content": blocks}
        return
    is_user = message.role == "user"
    for block in blocks:
        if isinstance(block, ToolResult) != is_user and not isinstance(block, Text):
            raise ApiError(
                400, f"messages: expected no block {block.type!r} in a message of the role {message.role!r}."
            )
    results = [block for block in blocks if isinstance(block, ToolResult)]
    for result in results:
        text = ("Error: " if result.is_error else "") + _joined(result.content)
        yield {"role": "tool", "tool_call_id": result.tool_use_id, "content": text}
    texts = [block for block in blocks if isinstance(block, Text)]
    if texts or not results:
        found: dict[str, Any] = {"role": message.role, "content": _joined(texts)}
        if calls := [_call(block) for block in blocks if isinstance(block, ToolUse)]:
            found["tool_calls"] = calls
        if thoughts := [block.thinking for block in blocks if isinstance(block, Thinking)]:
            found["reasoning_content"] = "\n".join(thoughts)
        yield found


def _call(block: ToolUse) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def tool_of(tool: Tool) -> dict[str, Any]:
    """Return a tool in the form of `Model.chat`."""
    described = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.input_schema}}


def _choice(choice: ToolChoice | None, *, has_tools: bool) -> str:
    """Return the argument of `Model.chat` for a `tool_choice`.

    Raises:
        ApiError: there are no tools, or the tool's name is missing, not due, or reserved.
    """
    if choice is None:
        return "auto"
    if (choice.type == "tool") != (choice.name is not None):
        raise ApiError(400, "tool_choice.name: expected a name with the type 'tool', and only with it.")
    if choice.type in ("auto", "none"):
        return "auto"
    if not has_tools:
        raise ApiError(400, "tool_choice: expected tools with tool_choice, found none.")
    return "required" if choice.name is None else reserved(choice.name)
