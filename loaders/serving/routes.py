"""All routes of the server."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from ..artifact.frozen import Frozen
from . import page, status, tokens
from .answers import Services
from .openai import chat, completions, models
from .openai.schemas import ChatRequest, CompletionRequest
from .requests import EventReply, Reply, Request
from .schema import Schema

Handler = Callable[[Services, Request, bytes], Awaitable[Reply | EventReply]]


class ApiRoute(Frozen):
    """A route.

    Attributes:
        method: the HTTP method.
        path: the path, with variables in braces.
        handler: the function that answers.
        api: the API whose error format to use, "openai" or "anthropic".
        summary: one sentence for the documentation.
        schema: the schema of the body; None without a body.
        is_public: True if no key is needed.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    api: str = "openai"
    schema: type[Schema] | None = None
    is_public: bool = False


def _get(path: str, handler: Handler, summary: str, *, is_public: bool = False) -> ApiRoute:
    return ApiRoute(method="GET", path=path, handler=handler, summary=summary, is_public=is_public)


def _post(
    path: str, handler: Handler, schema: type[Schema], summary: str, *, api: str = "openai"
) -> ApiRoute:
    return ApiRoute(method="POST", path=path, handler=handler, summary=summary, api=api, schema=schema)


ROUTES = (
    _post("/v1/chat/completions", chat.chat, ChatRequest, "Answer a chat."),
    _post("/v1/completions", completions.completions, CompletionRequest, "Continue prompts."),
    _get("/v1/models", models.list_models, "List the models."),
    _get("/v1/models/{model}", models.show_model, "Show a model."),
    _post("/tokenize", tokens.tokenize, tokens.TokenizeRequest, "Return the tokens of a text or of a chat."),
    _post("/detokenize", tokens.detokenize, tokens.DetokenizeRequest, "Return the text of tokens."),
    _get("/health", status.health, "Say that the server is running.", is_public=True),
    _get("/ready", status.ready, "Say whether the server can answer.", is_public=True),
    _get("/metrics", status.metrics, "Show the metrics in Prometheus' text format."),
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
