"""``/tokenize`` and ``/detokenize``, as in vLLM."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, JsonValue

from ..artifact.errors import PrecastError
from .answers import Services
from .errors import ApiError
from .openai.schemas import Message, Tool
from .openai.translate import message_of, tool_of
from .requests import Reply, Request, json_reply
from .schema import Items, Schema, parse

if TYPE_CHECKING:
    from ..generation.model import Model

_ONE_INPUT: list[JsonValue] = [
    {"required": [name], "properties": {name: {"type": kind}}}
    for name, kind in (("prompt", "string"), ("messages", "array"))
]


class TokenizeRequest(Schema):
    """A request of ``/tokenize``: a text, or a chat."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_INPUT})

    model: str
    prompt: str | None = None
    messages: Items[Message] | None = None
    tools: Items[Tool] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Schema):
    """A request of ``/detokenize``."""

    model: str
    tokens: Items[int] = Field(max_length=1 << 20)


async def tokenize(services: Services, request: Request, body: bytes) -> Reply:
    """Return the tokens of a text or of a chat's prompt."""
    given = await services.prepare(request, partial(parse, TokenizeRequest, body))
    if (given.prompt is None) == (given.messages is None):
        raise ApiError(400, "Expected either prompt or messages.", param="prompt")
    async with services.lease(request, given.model) as model:
        work = partial(_tokenised, model, given, is_literal=services.settings.literal)
        return await services.prepare(request, work)


def _tokenised(model: "Model", given: TokenizeRequest, *, is_literal: bool) -> Reply:
    tokens = _tokens(model, given, is_literal=is_literal)
    found = {"tokens": tokens, "count": len(tokens), "max_model_len": model.engine.context}
    if given.return_token_strs:
        found["token_strs"] = [model.tokenizer.token(token) for token in tokens]
    return json_reply(found)


def _tokens(model: "Model", given: TokenizeRequest, *, is_literal: bool) -> list[int]:
    try:
        if given.messages is None:
            text = given.prompt or ""
            return model.tokenizer.encode(text, add_special_tokens=given.add_special_tokens)
        return model.chat_prompt(
            [message_of(message) for message in given.messages],
            tools=[tool_of(tool) for tool in given.tools] if given.tools else None,
            literal=is_literal,
            template_variables=given.chat_template_kwargs,
        )
    except PrecastError as error:
        raise ApiError(400, str(error)) from None


async def detokenize(services: Services, request: Request, body: bytes) -> Reply:
    """Return the text of tokens."""
    given = await services.prepare(request, partial(parse, DetokenizeRequest, body))
    async with services.lease(request, given.model) as model:
        return await services.prepare(request, partial(_detokenised, model, given))


def _detokenised(model: "Model", given: DetokenizeRequest) -> Reply:
    try:
        return json_reply({"prompt": model.tokenizer.decode(given.tokens, skip_special_tokens=False)})
    except PrecastError:
        raise ApiError(400, "tokens: expected token ids from 0 to 2^32 - 1.", param="tokens") from None
