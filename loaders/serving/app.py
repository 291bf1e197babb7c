"""The ASGI application: request ids, access, errors, logs and traces around every route."""

import asyncio
import re
import secrets
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..artifact.frozen import Frozen
from .access import check_host, check_key
from .answers import Services
from .errors import ApiError, anthropic_error, openai_error
from .logs import Log
from .preparing import LARGE
from .protocol import ABORT
from .requests import (
    Disconnected,
    Receive,
    Request,
    Scope,
    Send,
    Transport,
    json_reply,
    read_body,
)
from .route import ApiRoute
from .routes import by_path
from .tracing import Tracing

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
# The key of the request in ASGI's scope.
_KEY = "precast.request"
# nginx's status for a client that has closed the connection; only the log shows it.
_CLOSED = 499


def make_app(services: Services, log: Log) -> Any:
    """Return the ASGI application of a server."""
    paths = by_path()
    endpoints = {
        path: Endpoint(services=services, log=log, methods=methods) for path, methods in paths.items()
    }
    public = frozenset(path for path, methods in paths.items() if all(r.is_public for r in methods.values()))
    app: Any = Guarded(app=Paths(endpoints), services=services, public=public)
    if origins := services.settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("DELETE", "GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    return Observed(app, services, log)


class Paths:
    """The ASGI application that passes each request to the endpoint of its path.

    Args:
        endpoints: the endpoint of each path. A variable in braces stands for one part of a path.
    """

    def __init__(self, endpoints: Mapping[str, "Endpoint"]) -> None:
        self._endpoints = endpoints
        patterns = {path: re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path)) for path in endpoints}
        self._patterns = [
            (re.compile(pattern), endpoints[path]) for path, pattern in patterns.items() if "{" in path
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        path = scope["path"]
        if (endpoint := self._endpoints.get(path)) is not None and "{" not in path:
            await endpoint({**scope, "path_params": {}}, receive, send)
            return
        for pattern, endpoint in self._patterns:
            if (match := pattern.fullmatch(path)) is not None:
                await endpoint({**scope, "path_params": match.groupdict()}, receive, send)
                return
        await _unknown_path(scope, receive, send)


class Endpoint(Frozen):
    """The ASGI application that answers the requests for one path.

    Attributes:
        services: the parts of the server.
        log: receives internal errors.
        methods: the path's routes, by method.
    """

    services: Services
    log: Log
    methods: Mapping[str, ApiRoute]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request: Request = scope[_KEY]
        transport = Transport(receive, send, request.deadline)
        method = "GET" if scope["method"] == "HEAD" else scope["method"]  # uvicorn omits the body
        route = self.methods.get(method)
        if route is None:
            allowed = ", ".join(sorted(self.methods))
            text = f"The method {scope['method']} is not allowed here; use {allowed}."
            api = next(iter(self.methods.values())).api
            await _refuse(ApiError(405, text, code="method_not_allowed"), api, send, {"allow": allowed})
            return
        body = b""
        try:
            if route.body is not None:
                most, arriving = self.services.settings.max_body, self.services.arriving
                body = await read_body(request.headers, receive, most, arriving)
            request.path_params.update(scope["path_params"])
            await transport.until_disconnect(self._answer(route, request, body, transport))
        except ApiError as error:
            await _refuse(error, _api(route, request), send)
        except asyncio.CancelledError:  # the time for draining is over
            if transport.is_started:
                await _abort(scope)
            else:
                await _refuse(_stopping(), _api(route, request), send)
        except Disconnected:
            request.facts["status"] = _CLOSED
            await _abort(scope)
        finally:
            if len(body) >= LARGE:
                self.services.preparing.tidy()

    async def _answer(self, route: ApiRoute, request: Request, body: bytes, transport: Transport) -> None:
        try:
            reply = await route.handler(self.services, request, body)
            await reply.send(transport.send)
        except ApiError as error:
            await _refuse(error, _api(route, request), transport.send)
        except Disconnected:
            raise
        except Exception as error:
            # The client learns nothing about the inside of the server.
            trace = "".join(traceback.format_exception(error))
            self.log.record(event="error", request_id=request.id, error=repr(error), traceback=trace)
            if transport.is_started:
                raise
            failure = ApiError(500, "The server failed; its log gives the reason.", code="internal_error")
            await _refuse(failure, _api(route, request), transport.send)


def _stopping() -> ApiError:
    return ApiError(503, "The server is stopping; try again later.", code="server_stopping", retry_after=1)


async def _abort(scope: Scope) -> None:
    """End the connection at once. A plain close would wait until the client has read the rest."""
    if (abort := scope.get("state", {}).get(ABORT)) is not None:
        abort()
        # Until the protocol knows, or it would log an incomplete response. The end of the event loop may cancel this.
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)


def _api(route: ApiRoute, request: Request) -> str:
    """Return the API whose error format to use; on a route that both APIs share, the request's headers decide."""
    return "anthropic" if "anthropic-version" in request.headers else route.api


async def _refuse(error: ApiError, api: str, send: Send, headers: Mapping[str, str] | None = None) -> None:
    value = anthropic_error(error) if api == "anthropic" else openai_error(error)
    await json_reply(value, error.status, {**error.headers, **(headers or {})}).send(send)


async def _unknown_path(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(404, f"The path {scope['path']!r:.200} does not exist.", code="unknown_path")
    await _refuse(error, _api_of_path(scope["path"]), send)


def _api_of_path(path: str) -> str:
    return "anthropic" if path.startswith("/v1/messages") else "openai"


class Guarded(Frozen):
    """A wrapper of an application that passes on only the requests that are allowed.

    Attributes:
        app: the application.
        services: the parts of the server.
        public: the paths that need no key.
    """

    app: Any
    services: Services
    public: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request: Request = scope[_KEY]
        settings = self.services.settings
        try:
            if scope["path"] not in self.public:
                if not settings.api_keys:
                    check_host(request.headers, self.services.address, settings.host)
                check_key(request.headers, settings.api_keys)
        except ApiError as error:
            api = "anthropic" if "anthropic-version" in request.headers else _api_of_path(scope["path"])
            await _refuse(error, api, send)
            return
        await self.app(scope, receive, send)


class Observed:
    """A wrapper of an application that gives each request an identifier and a line in the log."""

    def __init__(self, app: Any, services: Services, log: Log) -> None:
        self._app, self._services, self._log = app, services, log
        self._tracing = Tracing()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        began, status = time.monotonic(), 0
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        has_unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        request = Request(
            id=given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}",
            headers=headers,
            path_params={},
            deadline=began + self._services.settings.request_timeout,
            facts={},
        )

        async def reading() -> Any:
            nonlocal has_unread
            message = await receive()
            has_unread = has_unread and message.get("more_body", False)
            return message

        async def identified(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request.id.encode())]
                if has_unread:  # or the client could go on sending a refused body
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            with self._tracing.span(scope["method"], scope["path"], headers, request.facts):
                await self._app({**scope, _KEY: request}, reading, identified)
        finally:
            self._log.record(
                event="request",
                request_id=request.id,
                method=scope["method"],
                path=scope["path"],
                status=request.facts.pop("status", status),
                duration_ms=round((time.monotonic() - began) * 1e3, 1),
                **request.facts,
            )
