"""HTTP/1.1 connections whose requests must arrive in time."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds allowed for the headers of a request to arrive.
HEADERS_S = 15.0
# Seconds for which the rest of a refused body is read and dropped. If the connection were closed with unread data,
# the system would reset it, and the client might never see the reply.
LINGER_S = 5.0
# The key in the state of ASGI's scope of a function that ends the connection at once.
ABORT = "precast.abort"


class Protocol(H11Protocol):
    """uvicorn's connection; it closes itself if headers take too long, and lingers if a body is unread."""

    _timer: asyncio.TimerHandle | None = None
    _lingering: asyncio.TimerHandle | None = None
    app_state: dict[str, Any]

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin a connection."""
        super().connection_made(_Transport(transport, self))
        self.app_state = {**self.app_state, ABORT: transport.abort}
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes of the client."""
        if self._lingering is not None:
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_headers()
        else:
            self._stop_timer()

    def connection_lost(self, error: Exception | None) -> None:
        """End a connection."""
        self._stop_timer()
        if self._lingering is not None:
            self._lingering.cancel()
        super().connection_lost(error)

    def linger(self, transport: asyncio.Transport) -> bool:
        """If the request's body is unread, end only the sending direction now, and return True."""
        if self._lingering is None:
            if self.conn.their_state is not h11.SEND_BODY or transport.is_closing():
                return False
            self._lingering = self.loop.call_later(LINGER_S, transport.abort)
            transport.write_eof()
            self.flow.resume_reading()
        return True

    @property
    def is_lingering(self) -> bool:
        """True if nothing more can be sent, and the rest of the request is dropped."""
        return self._lingering is not None

    def _expect_headers(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADERS_S, self._close_if_waiting)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_if_waiting(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class _Transport:
    """A connection's transport that lingers when uvicorn closes it before the request's body is read."""

    def __init__(self, transport: asyncio.Transport, protocol: Protocol) -> None:
        self._transport, self._protocol = transport, protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return True if nothing more can be sent."""
        return self._protocol.is_lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection once everything is sent."""
        if not self._protocol.linger(self._transport):
            self._transport.close()
