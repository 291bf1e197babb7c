"""The requests of soak.py: good ones with known answers, bad ones with known refusals, and long ones."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Json = Mapping[str, Any]
QUESTIONS = ("What is the capital of France?", "the cat", "Name three colours.", "Is 7 prime? 🦊 é")
TOOL = {
    "name": "look",
    "description": "Look something up.",
    "parameters": {
        "type": "object",
        "properties": {"what": {"type": "string", "maxLength": 8}},
        "required": ["what"],
        "additionalProperties": False,
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
CHAT, TEXT, MESSAGES, RESPONSES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
# A server that is full refuses any request; a deadline may end any answer.
REFUSALS = frozenset({429, 504})


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request.

    Attributes:
        name: the kind of request.
        path: the path.
        body: the body; None for GET.
        statuses: the statuses that are right.
        is_repeatable: True if every answer must be the same.
    """

    name: str
    path: str
    body: bytes | None = None
    statuses: frozenset[int] = frozenset({200})
    is_repeatable: bool = False

    @property
    def is_anthropic(self) -> bool:
        """True if errors have the form of Anthropic's API."""
        return self.path.startswith(MESSAGES)

    @property
    def is_stream(self) -> bool:
        """True if the answer streams."""
        return b'"stream": true' in (self.body or b"")

    @property
    def key(self) -> tuple[str, bytes | None]:
        """The question, which a stream and a whole answer share."""
        value = None if self.body is None else json.loads(self.body)
        return self.path, json.dumps({**value, "stream": False}).encode() if value else None


def _case(name: str, path: str, value: Json, **fields: Any) -> Case:
    return Case(name=name, path=path, body=json.dumps(value).encode(), **fields)


def good(model: str, question: str) -> Iterator[Case]:
    """Yield requests whose answers are always the same."""
    chat = [{"role": "user", "content": question}]
    asks: Sequence[tuple[str, str, Json]] = (
        ("chat", CHAT, {"messages": chat, "max_tokens": 12}),
        ("chat, n", CHAT, {"messages": chat, "max_tokens": 6, "n": 3, "temperature": 1, "seed": 5}),
        ("chat, logprobs", CHAT, {"messages": chat, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}),
        (
            "chat, tools",
            CHAT,
            {
                "messages": chat,
                "max_tokens": 30,
                "tools": [{"type": "function", "function": TOOL}],
                "tool_choice": "required",
            },
        ),
        (
            "chat, schema",
            CHAT,
            {
                "messages": chat,
                "max_tokens": 30,
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
            },
        ),
        ("completion", TEXT, {"prompt": question, "max_tokens": 10}),
        ("completions", TEXT, {"prompt": [question, "a b c"], "max_tokens": 5, "n": 2}),
        ("completion, echo", TEXT, {"prompt": question, "max_tokens": 1, "echo": True, "logprobs": 1}),
        ("completion, regex", TEXT, {"prompt": question, "max_tokens": 12, "regex": "[a-c]{3,9}"}),
        (
            "completion, penalties",
            TEXT,
            {"prompt": question, "max_tokens": 9, "frequency_penalty": 1, "bad_words": ["the"]},
        ),
        ("message", MESSAGES, {"messages": chat, "max_tokens": 11}),
        (
            "message, tools",
            MESSAGES,
            {
                "messages": chat,
                "max_tokens": 30,
                "tools": [{"name": "look", "input_schema": TOOL["parameters"]}],
                "tool_choice": {"type": "any"},
            },
        ),
        ("response", RESPONSES, {"input": question, "max_output_tokens": 13}),
    )
    for name, path, value in asks:
        case = _case(name, path, {"model": model, **value}, is_repeatable=True)
        yield case
        yield replace(
            case, name=f"{name}, stream", body=json.dumps({"model": model, **value, "stream": True}).encode()
        )
    yield _case("count", f"{MESSAGES}/count_tokens", {"model": model, "messages": chat}, is_repeatable=True)
    yield _case("tokens", "/tokenize", {"model": model, "prompt": question * 9}, is_repeatable=True)
    yield _case("detokenize", "/detokenize", {"model": model, "tokens": [65, 66, 67, 9]}, is_repeatable=True)


def pages(model: str) -> Iterator[Case]:
    """Yield requests without a body."""
    paths = ("/v1/models", f"/v1/models/{model}", "/metrics", "/docs", "/openapi.json", "/", "/ready")
    for path in paths:
        yield Case(name=f"GET {path.replace(model, 'MODEL')}", path=path)


def long(model: str, tokens: int) -> Iterator[Case]:
    """Yield requests whose answers take long; a deadline may end them."""
    ask: dict[str, Any] = {"model": model, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True}
    for name, more in (("", {}), (", stream", {"stream": True}), (", n", {"stream": True, "n": 4})):
        statuses = frozenset({200, 504})
        yield _case(f"long{name}", TEXT, {**ask, **more}, statuses=statuses)


def bad(model: str) -> Iterator[Case]:
    """Yield requests that must be refused, or at least must not harm the server."""
    ask = {"model": model, "prompt": "the cat", "max_tokens": 4}
    chat = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "array", "items": deep, "anyOf": [{}, {"type": "array"}]}
    refused: Sequence[tuple[str, str, Json]] = (
        ("n of a billion", CHAT, {**chat, "n": 10**9}),
        ("a negative number", TEXT, {**ask, "max_tokens": -1}),
        ("a bias for no token", TEXT, {**ask, "logit_bias": {"99999999": 1}}),
        ("a parameter of another type", CHAT, {**chat, "temperature": "hot"}),
        ("an unknown parameter", MESSAGES, {**chat, "foo": 1}),
        ("a regex of nested groups", TEXT, {**ask, "regex": "(" * 60_000 + ")" * 60_000}),
        ("a regex with a lookahead", TEXT, {**ask, "regex": "(?=a)b"}),
        ("a schema nobody knows", CHAT, {**chat, "json_schema": {"type": "king"}}),
        ("a long prompt", TEXT, {**ask, "prompt": "the cat " * 100_000}),
        ("long token ids", TEXT, {**ask, "prompt": [5] * 200_000}),
        ("a tool without a name", CHAT, {**chat, "tools": [{"type": "function", "function": {}}]}),
        ("a response nobody gave", RESPONSES, {"model": model, "input": "a", "previous_response_id": "x"}),
        ("an unknown model", CHAT, {**chat, "model": "nobody"}),
    )
    for name, path, value in refused:
        yield _case(name, path, value, statuses=frozenset({400, 404}))
    hard: Sequence[tuple[str, Json]] = (
        ("a costly regex", {**ask, "regex": "(a|b)*" * 400}),
        ("a deep schema", {**ask, "json_schema": deep}),
        ("penalties of all kinds", {**ask, "repetition_penalty": 1e30, "presence_penalty": -2, "top_p": 0}),
        ("a bias for every token", {**ask, "logit_bias": {str(i): -100 for i in range(320)}}),
        ("a lone surrogate", {**ask, "prompt": "\ud800 \udfff"}),
    )
    for name, value in hard:
        yield _case(name, TEXT, value, statuses=frozenset({200, 400}))
    for number, data in enumerate((b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b"\x00")):
        yield Case(name=f"malformed JSON {number}", path=CHAT, body=data, statuses=frozenset({400}))
    yield Case(name="an unknown path", path="/v1/nothing", statuses=frozenset({404}))
    yield Case(name="an unknown method", path=CHAT, statuses=frozenset({405}))
    yield Case(name="a body too long", path=TEXT, body=b" " * (5 << 20), statuses=frozenset({413}))


# --- answers ------------------------------------------------------------------------------------------------

_VOLATILE = frozenset(
    {"id", "created", "created_at", "completed_at", "timings", "usage", "system_fingerprint", "item_id"}
    | {"call_id", "tool_call_id", "obfuscation"}
)


def events(body: bytes) -> list[Any]:
    """Return the values of server-sent events, without the last marker."""
    lines = (line[6:] for line in body.split(b"\n") if line.startswith(b"data: "))
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def answer(case: Case, body: bytes, *, is_stream: bool) -> Any:
    """Return the part of an answer that must be the same each time, for streams and whole answers alike."""
    if not is_stream:
        return _whole(case, json.loads(body))
    parts = events(body)
    if case.path in (CHAT, TEXT):
        return _joined(parts)
    if case.path == MESSAGES:
        return _joined_blocks(parts)
    return _whole(case, parts[-1]["response"])


def _whole(case: Case, value: Any) -> Any:
    if case.path == CHAT:
        return {
            c["index"]: (c["message"].get("content") or "", _calls(c["message"].get("tool_calls")))
            for c in value["choices"]
        }
    if case.path == TEXT:
        return {c["index"]: (c["text"], "") for c in value["choices"]}
    if case.path == MESSAGES:
        return [
            (block["type"], block.get("text") or json.dumps(block.get("input"))) for block in value["content"]
        ]
    return _stable(value.get("output", value))


def _calls(calls: Sequence[Json] | None) -> str:
    return "".join(call["function"]["arguments"] for call in calls or ())


def _joined(parts: Sequence[Any]) -> Any:
    found: dict[int, tuple[str, str]] = {}
    for choice in (choice for part in parts for choice in part["choices"]):
        text, calls = found.get(choice["index"], ("", ""))
        delta = choice.get("delta", {})
        text += choice.get("text") or delta.get("content") or ""
        found[choice["index"]] = (text, calls + _calls(delta.get("tool_calls")))
    return found


def _joined_blocks(parts: Sequence[Any]) -> Any:
    blocks: dict[int, tuple[str, str]] = {}
    for part in parts:
        if part["type"] == "content_block_start":
            blocks[part["index"]] = (part["content_block"]["type"], "")
        elif part["type"] == "content_block_delta":
            kind, text = blocks[part["index"]]
            delta = part["delta"]
            blocks[part["index"]] = (kind, text + (delta.get("text") or delta.get("partial_json") or ""))
    return [
        (kind, json.dumps(json.loads(text)) if kind == "tool_use" else text) for kind, text in blocks.values()
    ]


def _stable(value: Any) -> Any:
    """Return a value without its parts that differ each time."""
    if isinstance(value, dict):
        return {key: _stable(part) for key, part in value.items() if key not in _VOLATILE}
    return [_stable(part) for part in value] if isinstance(value, list) else value


# --- faults -------------------------------------------------------------------------------------------------


def fault(case: Case, status: int, headers: Mapping[str, str], body: bytes, known: Any) -> str | None:
    """Return the fault of a complete answer; None if it is right.

    Args:
        case: the request.
        status: the status.
        headers: the headers, by lower-case name.
        body: the body.
        known: the answer of an idle server; None if it is not known.
    """
    if status not in case.statuses | REFUSALS:
        return f"status {status}"
    if "x-request-id" not in headers:
        return "no x-request-id"
    if status != 200:
        return _error_fault(case, json.loads(body))
    if not headers["content-type"].startswith("text/event-stream"):
        is_same = known is None or answer(case, body, is_stream=False) == known
        return None if is_same else f"answered {answer(case, body, is_stream=False)}, idle: {known}"
    return _stream_fault(case, body, known)


def _error_fault(case: Case, value: Any) -> str | None:
    is_right = (
        value.get("type") == "error" and list(value["error"]) == ["type", "message"]
        if case.is_anthropic
        else list(value) == ["error"] and list(value["error"]) == ["message", "type", "param", "code"]
    )
    return (
        None if is_right and value["error"]["message"].endswith(".") else f"an error of another form: {value}"
    )


def _stream_fault(case: Case, body: bytes, known: Any) -> str | None:
    parts = events(body)
    last = parts[-1]
    if "error" in last or last.get("type") == "response.failed":
        is_deadline = b"longer than the server allows" in body.rpartition(b"data: {")[2]
        return None if is_deadline else f"a stream ended with {last}"
    ends = {MESSAGES: b"message_stop", RESPONSES: b"response."}
    if ends.get(case.path, b"data: [DONE]") not in body[-40:] and case.path != RESPONSES:
        return f"a stream ended with {body[-200:]!r}"
    if known is None or answer(case, body, is_stream=True) == known:
        return None
    return f"streamed {answer(case, body, is_stream=True)}, idle: {known}"
