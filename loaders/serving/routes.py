"""All routes of the server."""

import asyncio
from collections.abc import Mapping
from functools import cache, partial
from importlib import import_module

from . import page, status
from .answers import Services
from .openai import models
from .requests import Reply, Request, json_reply
from .route import ApiRoute, Deferred, Handler

_PAGE = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}


async def _openapi(services: Services, request: Request, body: bytes) -> Reply:
    """Describe the routes for programs."""
    return await asyncio.to_thread(_openapi_reply)  # the first time, this takes a tenth of a second


async def _docs(services: Services, request: Request, body: bytes) -> Reply:
    """Describe the routes for people."""
    return await asyncio.to_thread(_docs_reply)


@cache
def _openapi_reply() -> Reply:
    from .description import openapi

    return json_reply(openapi(ROUTES))


@cache
def _docs_reply() -> Reply:
    from .description import page as described

    text = described(ROUTES)
    return Reply(body=text.encode(), media_type="text/html; charset=utf-8", headers=_PAGE)


def _get(
    path: str,
    handler: Handler,
    summary: str,
    *,
    is_public: bool = False,
    reply: str | None = None,
    media_type: str = "application/json",
) -> ApiRoute:
    return ApiRoute(
        method="GET",
        path=path,
        handler=handler,
        summary=summary,
        is_public=is_public,
        reply=reply,
        media_type=media_type,
    )


def _post(
    path: str,
    module: str,
    function: str,
    schema: str,
    summary: str,
    *,
    reply: str,
    api: str = "openai",
    schemas: str | None = None,
) -> ApiRoute:
    return ApiRoute(
        method="POST",
        path=path,
        handler=Deferred(module=module, name=function),
        summary=summary,
        api=api,
        body=Deferred(module=schemas or module, name=schema),
        reply=reply,
    )


ROUTES = (
    _post(
        "/v1/chat/completions",
        "openai.chat",
        "chat",
        "ChatRequest",
        "Answer a chat.",
        reply="chat_reply",
        schemas="openai.schemas",  # the module of the handler imports them only when it needs them
    ),
    _post(
        "/v1/completions",
        "openai.completions",
        "completions",
        "CompletionRequest",
        "Continue prompts.",
        reply="completion_reply",
    ),
    _post(
        "/v1/responses",
        "openai.responses",
        "responses",
        "ResponseRequest",
        "Answer a chat, or continue an earlier one.",
        reply="response_reply",
    ),
    _get(
        "/v1/responses/{response_id}",
        Deferred(module="openai.responses", name="show_response"),
        "Show an earlier response.",
        reply="response_reply",
    ),
    ApiRoute(
        method="DELETE",
        path="/v1/responses/{response_id}",
        handler=Deferred(module="openai.responses", name="delete_response"),
        summary="Forget an earlier response.",
        reply="deletion_reply",
    ),
    _post(
        "/v1/messages",
        "anthropic.messages",
        "messages",
        "MessagesRequest",
        "Answer a chat.",
        api="anthropic",
        reply="message_reply",
    ),
    _post(
        "/v1/messages/count_tokens",
        "anthropic.messages",
        "count_tokens",
        "CountRequest",
        "Count the tokens of a chat.",
        api="anthropic",
        reply="count_reply",
    ),
    _get("/v1/models", models.list_models, "List the models.", reply="models_reply"),
    _get("/v1/models/{model}", models.show_model, "Show a model.", reply="model_reply"),
    _post(
        "/tokenize",
        "tokens",
        "tokenize",
        "TokenizeRequest",
        "Return the tokens of a text or of a chat.",
        reply="tokenize_reply",
    ),
    _post(
        "/detokenize",
        "tokens",
        "detokenize",
        "DetokenizeRequest",
        "Return the text of tokens.",
        reply="detokenize_reply",
    ),
    _get("/health", status.health, "Say that the server is running.", is_public=True, reply="status_reply"),
    _get("/ready", status.ready, "Say whether the server can answer.", is_public=True, reply="status_reply"),
    _get("/openapi.json", _openapi, "Describe the routes for programs.", is_public=True, reply="any_reply"),
    _get("/docs", _docs, "Describe the routes for people.", is_public=True, media_type="text/html"),
    _get(
        "/metrics",
        status.metrics,
        "Show the metrics in Prometheus' text format.",
        media_type="text/plain",
    ),
)

# The page is no part of the API.
PAGE_ROUTES = tuple(
    ApiRoute(
        method=method,
        path=path,
        handler=partial(page.show, name=name),
        summary="Show a file of the chat page.",
        is_public=True,
    )
    for path, name in page.FILES.items()
    for method in ("GET", "HEAD")
)


def by_path(routes: tuple[ApiRoute, ...] = ROUTES + PAGE_ROUTES) -> Mapping[str, Mapping[str, ApiRoute]]:
    """Return the routes of each path, by method."""
    found: dict[str, dict[str, ApiRoute]] = {}
    for route in routes:
        found.setdefault(route.path, {})[route.method] = route
    return found


def import_chat() -> None:
    """Import the modules of ``/v1/chat/completions``, the most frequent request."""
    for module in (
        ".openai.chat",
        "..generation.async_readers",
        "..generation.chats",
        "..text.chat_literal",
        "..text.chat_template",
    ):
        import_module(module, __package__)


def import_others() -> None:
    """Import the modules that other requests need, so that their first requests need not wait for it."""
    parts = (part for route in ROUTES for part in (route.handler, route.body))
    modules = dict.fromkeys(part.module for part in parts if isinstance(part, Deferred))
    for module in modules:
        import_module(f".{module}", __package__)
