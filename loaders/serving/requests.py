"""Requests, replies, and the transport between them: bodies in pieces, events, and clients that disconnect."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, MutableMapping
from contextlib import AsyncExitStack, suppress
from typing import Any

from ..artifact.frozen import Frozen
from .errors import ApiError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Seconds allowed for a request's body to arrive.
_BODY_S = 30.0
# Seconds of silence after which a comment tells the client and its proxies that the stream is alive.
_PING_S = 15.0
_PING = b": ping\n\n"
# Seconds after a request's deadline at which a client that does not read is disconnected.
_GRACE_S = 10.0
_JSON = "application/json"
# Made once, because `json.dumps` makes an encoder for each call with these options.
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
# A text that the fields of no event contain.
_PLACE = "\0text\0"


class Request(Frozen):
    """A request.

    Attributes:
        id: identifier for logs and the header ``x-request-id``.
        headers: the headers, by lower-case name.
        path_params: values of the path's variables.
        deadline: time of `time.monotonic` at which the answer must be complete.
        facts: facts for the log, which handlers add.
    """

    id: str
    headers: Mapping[str, str]
    path_params: dict[str, str]
    deadline: float
    facts: dict[str, Any]

    @property
    def seconds_left(self) -> float:
        """The time left until the deadline, in seconds.

        Raises:
            ApiError: the deadline has passed.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise timed_out()
        return left


def timed_out() -> ApiError:
    """Return the error for a request that has passed its deadline."""
    return ApiError(
        504, "The answer took longer than the server allows; ask for fewer tokens.", code="request_timeout"
    )


class Reply(Frozen):
    """A complete response.

    Attributes:
        body: the body.
        status: the HTTP status.
        media_type: the body's type.
        headers: further headers.
    """

    body: bytes
    status: int = 200
    media_type: str = _JSON
    headers: Mapping[str, str] | None = None

    async def send(self, send: Send) -> None:
        """Send the response."""
        given = {"content-length": str(len(self.body)), **(self.headers or {})}
        await send(_start(self.status, self.media_type, given))
        await send({"type": "http.response.body", "body": self.body})


class EventReply(Frozen):
    """A response of server-sent events.

    Attributes:
        events: the events, encoded.
        closing: resources to release after the last event, or when the client disconnects.
    """

    events: AsyncIterator[bytes]
    closing: AsyncExitStack

    async def send(self, send: Send) -> None:
        """Send each event as it arrives."""
        async with self.closing:
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            await send(_start(200, "text/event-stream; charset=utf-8", headers))
            pinging = asyncio.create_task(_ping(send))
            try:
                async for event in self.events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            finally:
                pinging.cancel()
        await send({"type": "http.response.body", "body": b""})


async def _ping(send: Send) -> None:
    with suppress(Disconnected):  # the next event raises it too
        while True:
            await asyncio.sleep(_PING_S)
            await send({"type": "http.response.body", "body": _PING, "more_body": True})


def _start(status: int, media_type: str, headers: Mapping[str, str]) -> Message:
    pairs = [("content-type", media_type), *headers.items()]
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
    return {"type": "http.response.start", "status": status, "headers": encoded}


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """Return a value as a response of JSON."""
    return Reply(body=json_bytes(value), status=status, headers=headers)


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON in UTF-8; a lone surrogate becomes a JSON escape."""
    return _ENCODE(value).encode(errors="backslashreplace")


def event(value: Any, name: str | None = None) -> bytes:
    """Return a value as a server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json_bytes(value) + b"\n\n"


def text_event(value: Callable[[str], Any]) -> Callable[[str], bytes]:
    """Return a function from a text to a server-sent event that contains the text.

    The function encodes only the text, which is faster than `event` by a factor of 20.

    Args:
        value: a function from the text to the event's value, which contains the text once.
    """
    before, _, after = event(value(_PLACE)).partition(json_bytes(_PLACE))
    return lambda text: before + json_bytes(text) + after


class Arriving:
    """The memory of bodies that have not arrived completely.

    Args:
        most: maximum number of bytes of all these bodies together.
    """

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0

    def take(self, size: int) -> None:
        """Count further bytes.

        Raises:
            ApiError: the bodies are too long together.
        """
        if self._taken + size > self._most:
            raise ApiError(
                429, "Too many long requests are arriving; try again later.", code="queue_full", retry_after=1
            )
        self._taken += size

    def release(self, size: int) -> None:
        """Count bytes no longer."""
        self._taken -= size


async def read_body(headers: Mapping[str, str], receive: Receive, most: int, arriving: Arriving) -> bytes:
    """Return the body of a request.

    Args:
        headers: the request's headers.
        receive: ASGI's function that returns the client's next message.
        most: maximum number of bytes.
        arriving: the memory for this and the other bodies that arrive.

    Raises:
        ApiError: the body is too long, arrives too slowly, is not declared as JSON, or is cut short; or too many long
            bodies are arriving.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        raise ApiError(415, f"The header content-type must be {_JSON}.", code="unsupported_media_type")
    declared = headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise _too_long(most)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                piece = message.get("body", b"")
                if len(body) + len(piece) > most:
                    raise _too_long(most)
                arriving.take(len(piece))
                body += piece
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"The body took longer than {_BODY_S:.0f} s to arrive.") from None
    finally:
        arriving.release(len(body))


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"The body must have at most {most:,} bytes.", code="body_too_large")


class Disconnected(Exception):
    """The client has closed the connection, or has not read its answer in time."""


class Transport:
    """The connection between a request and its client: one channel in each direction.

    Args:
        receive: ASGI's function that returns the client's next message.
        send: ASGI's function that sends a message.
        deadline: time of `time.monotonic` at which the answer must be complete.

    Attributes:
        is_started: True once the response has begun.
    """

    def __init__(self, receive: Receive, send: Send, deadline: float) -> None:
        self._receive, self._send, self._deadline = receive, send, deadline
        self.is_started = self._is_complete = False

    async def send(self, message: Message) -> None:
        """Send a message."""
        self.is_started = True
        # After the last message, ASGI reports a disconnect even if the client is there.
        self._is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def until_disconnect(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work of a request, and cancel it if the client disconnects, or does not read its answer.

        Raises:
            Disconnected: the client has disconnected, or the work has not ended some time after the deadline.
        """
        working, watching = asyncio.create_task(work), asyncio.create_task(self._watch())
        # One timer for all messages, because a timer for each would cost as much time as a message.
        left = max(self._deadline + _GRACE_S - time.monotonic(), 0.0)
        try:
            await asyncio.wait((working, watching), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            # The last message may wait for a client that does not read, so only a disconnect is expected after it.
            has_reported_end = watching.done() and self._is_complete
            if not (working.done() or has_reported_end):
                raise Disconnected
            await working
        finally:
            watching.cancel()
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
