"""The description of one route."""

from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..artifact.frozen import Frozen
from .answers import Services
from .requests import EventReply, Reply, Request

if TYPE_CHECKING:
    from .schema import Schema

Handler = Callable[[Services, Request, bytes], Awaitable[Reply | EventReply]]


class Deferred(Frozen):
    """A function or a class in a module of this package. The first use imports the module.

    Attributes:
        module: the module's name, relative to this package.
        name: the function's or the class's name.
    """

    module: str
    name: str

    def get(self) -> Any:
        """Return the function or the class."""
        return getattr(import_module(f".{self.module}", __package__), self.name)

    async def __call__(self, services: Services, request: Request, body: bytes) -> Reply | EventReply:
        """Answer a request, if this is the name of a handler."""
        reply: Reply | EventReply = await self.get()(services, request, body)
        return reply


class ApiRoute(Frozen):
    """A route.

    Attributes:
        method: the HTTP method.
        path: the path, with variables in braces.
        handler: the function that answers.
        api: the API whose error format to use, "openai" or "anthropic".
        summary: one sentence for the documentation.
        body: the schema of the body; None without a body.
        reply: the name of the reply's schema in `REPLIES`; None for a text.
        media_type: the reply's type.
        is_public: True if no key is needed.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    api: str = "openai"
    body: Deferred | None = None
    reply: str | None = None
    media_type: str = "application/json"
    is_public: bool = False

    @property
    def schema(self) -> "type[Schema] | None":
        """The schema of the body; None without a body."""
        if self.body is None:
            return None
        found: type[Schema] = self.body.get()
        return found
