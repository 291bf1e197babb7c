"""The socket on which a server listens."""

import socket

from ..artifact.errors import PrecastError
from .settings import ServeSettings

# Maximum number of connections that wait until the server accepts them.
BACKLOG = 512


def listen(settings: ServeSettings) -> socket.socket:
    """Return a socket that listens on the server's address. The system keeps connections until the server accepts them.

    Raises:
        PrecastError: the address does not exist, or is in use.
    """
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            _plain(settings.host), settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PrecastError(
            f"{where}: expected an address of this machine ({error.strerror}); check --host."
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise PrecastError(
            f"{where}: cannot listen there ({error.strerror}); choose another --port."
        ) from None
    return listener


def _plain(host: str) -> str | bytes:
    """Return an ASCII host name as bytes, because Python imports a codec of 2 ms to encode text."""
    return host.encode() if host.isascii() else host
