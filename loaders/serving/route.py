"""The description of one route."""

from collections.abc import Awaitable, Callable

from ..artifact.frozen import Frozen
from .answers import Services
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
        reply: the name of the reply's schema in `REPLIES`; None for a text.
        media_type: the reply's type.
        is_public: True if no key is needed.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    api: str = "openai"
    schema: type[Schema] | None = None
    reply: str | None = None
    media_type: str = "application/json"
    is_public: bool = False
