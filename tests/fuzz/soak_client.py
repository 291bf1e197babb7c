"""A client for soak.py that may be slow, leave early, or send half a request. It speaks HTTP over bare sockets."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from soak_requests import Case

# Longest time that any request may take: the server's deadline, and more.
LIMIT_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a request.

    Attributes:
        end: "answered", "left" (the client went away, as it meant to), or "lost" (the connection ended early).
        status: the status; 0 without one.
        headers: the headers, by lower-case name.
        body: the body.
    """

    end: str
    status: int = 0
    headers: Mapping[str, str]
    body: bytes = b""


LEFT, LOST = Outcome(end="left", headers={}), Outcome(end="lost", headers={})
Manner = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Case, Random], Awaitable[bytes | None]]


def head(case: Case) -> bytes:
    """Return the head of a request."""
    method = "GET" if case.body is None else "POST"
    lines = [f"{method} {case.path} HTTP/1.1", "host: localhost", "connection: close"]
    if case.body is not None:
        lines += ["content-type: application/json", f"content-length: {len(case.body)}"]
    return "\r\n".join([*lines, "", ""]).encode()


async def plain(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case, random: Random
) -> bytes | None:
    """Send a request and read the answer."""
    writer.write(head(case) + (case.body or b""))
    return await reader.read()


async def slow_sender(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case, random: Random
) -> bytes | None:
    """Send a request in pieces."""
    data = head(case) + (case.body or b"")
    step = max(1, len(data) // 5)
    for start in range(0, len(data), step):
        writer.write(data[start : start + step])
        await asyncio.sleep(random.uniform(0, 0.2))
    return await reader.read()


async def tiny_chunks(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case, random: Random
) -> bytes | None:
    """Send a body in chunks of 1 to 9 bytes, if it is short."""
    body = case.body or b""
    if not 0 < len(body) < 2000:
        return await plain(reader, writer, case, random)
    size = random.randint(1, 9)
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    start = head(case).replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
    writer.write(start + chunks + b"0\r\n\r\n")
    return await reader.read()


async def slow_reader(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case, random: Random
) -> bytes | None:
    """Read the first bytes of the answer slowly."""
    writer.write(head(case) + (case.body or b""))
    data = b""
    for _ in range(random.randint(1, 20)):
        piece = await reader.read(random.randint(1, 50))
        data += piece
        if not piece:
            return data
        await asyncio.sleep(0.1)
    return data + await reader.read()


async def leaver(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case, random: Random
) -> bytes | None:
    """Close the connection while the request waits, or is answered."""
    writer.write(head(case) + (case.body or b""))
    with suppress(TimeoutError):
        async with asyncio.timeout(random.choice((0, 0.01, 0.1, 0.5, 2))):
            while await reader.read(64):
                pass
    return None


async def cutter(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case, random: Random
) -> bytes | None:
    """Close the connection in the middle of the request."""
    data = head(case) + (case.body or b"")
    writer.write(data[: random.randrange(len(data))])
    await asyncio.sleep(random.uniform(0, 0.3))
    return None


MANNERS: Mapping[Manner, int] = {
    plain: 10,
    slow_sender: 2,
    tiny_chunks: 1,
    slow_reader: 2,
    leaver: 4,
    cutter: 1,
}


async def talk(port: int, case: Case, manner: Manner, random: Random) -> Outcome:
    """Send a request in a manner, and return its end."""
    writer = None
    try:
        async with asyncio.timeout(LIMIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
            data = await manner(reader, writer, case, random)
    except TimeoutError:
        return Outcome(end=f"no end within {LIMIT_S:.0f} s", headers={})
    except OSError:
        return LOST
    finally:
        if writer is not None:
            writer.transport.abort()
    return LEFT if data is None else parsed(data)


def parsed(data: bytes) -> Outcome:
    """Return the response in the bytes of a connection; it is lost if it is cut short."""
    start, found, rest = data.partition(b"\r\n\r\n")
    if not found:
        return LOST
    first, *lines = start.decode("latin-1").split("\r\n")
    pairs = (line.partition(": ") for line in lines)
    headers = {name.lower(): value for name, _, value in pairs}
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunked(rest)
    else:
        body = rest if len(rest) == int(headers.get("content-length", -1)) else None
    if body is None:
        return LOST
    return Outcome(end="answered", status=int(first.split()[1]), headers=headers, body=body)


def _unchunked(data: bytes) -> bytes | None:
    """Return a body that was sent in chunks; None if its end is missing."""
    pieces = []
    while True:
        size, found, data = data.partition(b"\r\n")
        if not found:
            return None
        if (length := int(size, 16)) == 0:
            return b"".join(pieces)
        pieces.append(data[:length])
        data = data[length + 2 :]
