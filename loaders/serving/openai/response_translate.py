"""Translate requests of OpenAI's responses to the model's terms."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..answers import Ask
from ..errors import ApiError
from .plain import ROLES
from .response_schemas import (
    CallItem,
    ChosenFunction,
    FunctionTool,
    Item,
    MessageItem,
    Part,
    ReasoningItem,
    ResponseRequest,
    TextConfig,
)
from .translate import reserved


def response_ask(request: ResponseRequest, before: Sequence[Mapping[str, Any]]) -> Ask:
    """Return the work that a request asks for.

    Args:
        request: the request.
        before: the messages of the previous response.

    Raises:
        ApiError: parameters contradict each other, or are not supported together.
    """
    tools = request.tools if request.tools and request.tool_choice != "none" else None
    if request.tool_choice not in (None, "none", "auto") and not request.tools:
        raise ApiError(400, "tool_choice: expected tools with tool_choice, found none.", param="tool_choice")
    constraint = _constraint(request.text)
    if tools and constraint:
        text = (
            "text.format: cannot be combined with tools, because a call would not fit it; give one of them."
        )
        raise ApiError(400, text, param="text.format")
    names = {"max_output_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p"}
    given = {own: value for name, own in names.items() if (value := getattr(request, name)) is not None}
    opening = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
    return Ask(
        model=request.model,
        fields=given | constraint,
        messages=[*opening, *before, *new_messages(request.input)],
        tools=[_tool(tool) for tool in tools] if tools else None,
        tool_choice=_choice(request.tool_choice),
        strict=frozenset(tool.name for tool in tools or () if tool.strict),
        is_single_call=request.parallel_tool_calls is False
        or isinstance(request.tool_choice, ChosenFunction),
    )


def new_messages(given: str | Iterable[Item]) -> list[dict[str, Any]]:
    """Return the input of a request as messages in the form of `Model.chat`.

    An answer is several items: its reasoning, its text and its calls. They become one message.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    answer: dict[str, Any] | None = None  # the answer to which the next item may belong
    for item in given:
        if isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": ROLES.get(item.role, item.role), "content": _joined(item.content)})
            answer = None
        elif isinstance(item, MessageItem | CallItem | ReasoningItem):
            if answer is None or (isinstance(item, MessageItem) and answer["content"]):
                answer = {"role": "assistant", "content": ""}
                messages.append(answer)
            _extend(answer, item)
        else:
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
            answer = None
    return messages


def _extend(answer: dict[str, Any], item: MessageItem | CallItem | ReasoningItem) -> None:
    if isinstance(item, MessageItem):
        answer["content"] = _joined(item.content)
    elif isinstance(item, ReasoningItem):
        if item.content:
            answer["reasoning_content"] = _joined(item.content)
    else:
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        answer.setdefault("tool_calls", []).append(call)


def _joined(content: str | Sequence[Part]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"strict", "type"})}


def _choice(choice: str | ChosenFunction | None) -> str:
    if isinstance(choice, ChosenFunction):
        return reserved(choice.name)
    return "auto" if choice in (None, "none") else str(choice)


def _constraint(text: TextConfig | None) -> dict[str, Any]:
    form = None if text is None else text.format
    if (form is not None and form.type == "json_schema") != (form is not None and form.schema_ is not None):
        message = "text.format: expected schema with the type 'json_schema', and only with it."
        raise ApiError(400, message, param="text.format.schema")
    if form is None or form.type == "text":
        return {}
    return {"json_schema": {"type": "object"} if form.schema_ is None else form.schema_}
