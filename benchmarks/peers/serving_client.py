"""A client of OpenAI's chat API that records when each event of a streamed answer arrives.

The client shares the cores with the server. Therefore it only stores bytes and times while answers arrive, and parses
them afterwards. The usual load generators (guidellm, aiperf, and scripts with httpx) parse every event at once, and
would slow down the server that they measure.
"""

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

PATH = "/v1/chat/completions"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A streamed answer. All times are in seconds since the request was sent.

    Attributes:
        first_s: arrival of the first event with text.
        last_s: arrival of the last event with text.
        gaps_s: times between events with text.
        prompt_tokens: length of the prompt, as the server counts it.
        cached_tokens: tokens of the prompt that the server did not compute.
        tokens: length of the answer, as the server counts it.
        text: the answer.
    """

    first_s: float
    last_s: float
    gaps_s: Sequence[float]
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    text: str


class Refused(Exception):
    """The server does not answer, or not with status 200."""


class _Exchange(asyncio.Protocol):
    """One request and its response; the server closes the connection at the end."""

    def __init__(self, request: bytes) -> None:
        self.request, self.began, self.pieces = request, 0.0, []
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.began = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.done.set_result(None)


def encoded(body: Mapping) -> bytes:
    """Return a request."""
    text = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    return head.encode() + f"Content-Length: {len(text)}\r\n\r\n".encode() + text


def ask(port: int, requests: Sequence[Mapping]) -> tuple[float, list[Answered]]:
    """Send requests at the same time; return the seconds until the last answer ends, and the answers.

    Raises:
        Refused: the server refuses a request.
    """
    return asyncio.run(_ask(port, [encoded(request) for request in requests]))


async def _ask(port: int, requests: Sequence[bytes]) -> tuple[float, list[Answered]]:
    loop, began = asyncio.get_running_loop(), time.perf_counter()
    connecting = (loop.create_connection(lambda r=r: _Exchange(r), "127.0.0.1", port) for r in requests)
    exchanges = [protocol for _, protocol in await asyncio.gather(*connecting)]
    await asyncio.gather(*(exchange.done for exchange in exchanges))
    return time.perf_counter() - began, [_answer(exchange) for exchange in exchanges]


def _answer(exchange: _Exchange) -> Answered:
    raw = b"".join(data for _, data in exchange.pieces)
    head, _, _ = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise Refused(raw[:500].decode(errors="replace"))
    events = [(exchange.pieces[i][0] - exchange.began, value) for i, value in _events(exchange.pieces)]
    if failed := [value for _, value in events if "error" in value]:
        raise Refused(str(failed[0]))
    texts = [
        (when, text)
        for when, value in events
        if value["choices"] and (text := value["choices"][0]["delta"].get("content"))
    ]
    counts = next(value["usage"] for _, value in reversed(events) if value.get("usage"))
    times = [when for when, _ in texts]
    return Answered(
        first_s=times[0],
        last_s=times[-1],
        gaps_s=[after - before for before, after in pairwise(times)],
        prompt_tokens=counts["prompt_tokens"],
        cached_tokens=(counts.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        tokens=counts["completion_tokens"],
        text="".join(text for _, text in texts),
    )


def _events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[int, dict]]:
    """Yield the events of a response in chunked encoding: the index of the piece with its last byte, and its value."""
    raw, ends = b"".join(data for _, data in pieces), []
    for _, data in pieces:
        ends.append(len(data) + (ends[-1] if ends else 0))
    buffered = b""
    for end, chunk in _chunks(raw, raw.index(b"\r\n\r\n") + 4):
        *complete, buffered = (buffered + chunk).split(b"\n\n")
        for text in complete:
            if text.startswith(b"data: {"):
                yield bisect_left(ends, end), json.loads(text.removeprefix(b"data: "))


def _chunks(raw: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the chunks of a body, each with the position of its end."""
    while size := int(raw[start : (line := raw.index(b"\r\n", start))], 16):
        end = line + 2 + size
        yield end, raw[line + 2 : end]
        start = end + 2
