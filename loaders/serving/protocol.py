"""HTTP/1.1 connections whose requests must arrive in time."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds allowed for the headers of a request to arrive.
HEADERS_S = 15.0


class Protocol(H11Protocol):
    """uvicorn's connection; it closes itself if headers take too long, which uvicorn's own does not."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin a connection."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes of the client."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_headers()
        else:
            self._stop_timer()

    def connection_lost(self, error: Exception | None) -> None:
        """End a connection."""
        self._stop_timer()
        super().connection_lost(error)

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
