"""The check of plain chats without pydantic accepts nothing else than the complete check, and gives the same result."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.serving.errors import ApiError
from precast.loaders.serving.openai.chat import _checked
from precast.loaders.serving.openai.plain import ChatAsk, plain_chat

CHAT: Any = {"model": "demo", "messages": [{"role": "user", "content": "Hi."}]}
_NUMBERS = (
    *(-1, -0.1, 0, 0.0, 0.5, 1, 1.0, 1.1, 2, 2.0, 2.1, 3, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30),
    *(1e300, float("nan"), float("inf")),
)
_VALUES = st.one_of(
    st.sampled_from(_NUMBERS),
    st.none(),
    st.booleans(),
    st.sampled_from(["", "a", "system"]),
    st.sampled_from([[], {}, {"include_usage": True}, {"include_usage": 1}, {"include_usage": None}]),
)
_NAMES = st.sampled_from(
    [
        *("temperature", "top_p", "min_p", "top_k", "seed", "max_tokens", "stream", "stream_options"),
        *("ignore_eos", "model", "n", "unknown"),
    ]
)
_TEXTS = st.sampled_from(["", "a", "\0", "é\n", "\ud800"])
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "other", 1, []]),
            "content": st.one_of(_TEXTS, st.none(), st.just([{"type": "text", "text": "a"}])),
            "name": _TEXTS,
        },
    ),
    max_size=3,
)


def shown(found: ChatAsk) -> str:
    """Return a text that differs for 1, 1.0 and True."""
    parts = [vars(found.ask), found.is_streamed, found.has_usage]
    return json.dumps(parts, sort_keys=True, default=sorted)  # the names of strict tools are a set


def same(body: bytes) -> bool:
    """Return True if the check of plain chats leaves the body to the complete check, or gives the same result."""
    if (found := plain_chat(body)) is None:
        return True
    with suppress(ApiError):
        return shown(found) == shown(_checked(body))
    return False


@settings(deadline=None)  # the first check builds pydantic's validators
@given(st.dictionaries(_NAMES, _VALUES, max_size=4), st.booleans(), _MESSAGES)
def test_both_checks_agree(options, has_chat, messages) -> None:
    body = {**CHAT, **options, **({} if has_chat else {"messages": messages})}
    assert same(json.dumps(body).encode())
    assert same(json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass"))


@settings(deadline=None)  # the first check builds pydantic's validators
@given(st.lists(st.tuples(_NAMES, _VALUES), max_size=4))
def test_both_checks_agree_if_keys_occur_again(options) -> None:
    parts = [json.dumps({name: value})[1:-1] for name, value in (*CHAT.items(), *options)]
    assert same(f"{{{', '.join(parts)}}}".encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "seed", "messages", "stream"])
def test_a_number_that_is_not_finite_is_refused_even_if_its_key_occurs_again(number, name) -> None:
    value = json.dumps({"stream": True, **CHAT}.get(name, 1))
    rest = ", ".join(json.dumps({k: v})[1:-1] for k, v in CHAT.items() if k != name)
    body = f'{{{rest}, "{name}": {number}, "{name}": {value}}}'.encode()
    assert plain_chat(body) is None
    with pytest.raises(ApiError):
        _checked(body)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "seed": 7,
            "max_tokens": 9,
        },
        {"temperature": 2, "top_p": 1, "min_p": 0.5, "top_k": 0, "ignore_eos": False, "stream": None},
        {"messages": [{"role": "developer", "content": "é\n"}, {"role": "assistant", "content": ""}]},
    ],
)
def test_plain_chats_need_no_complete_check(options) -> None:
    body = json.dumps({**CHAT, **options}, ensure_ascii=False).encode()
    found = plain_chat(body)
    assert found is not None
    assert shown(found) == shown(_checked(body))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 60_000,
        json.dumps(CHAT).encode("utf-16"),
        json.dumps({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
        json.dumps(CHAT).encode() + b" " * (1 << 16),
        json.dumps({**CHAT, "tools": []}).encode(),
        json.dumps({**CHAT, "stream_options": {"include_usage": True}}).encode(),
        json.dumps({**CHAT, "seed": -1}).encode(),
    ],
)
def test_everything_else_needs_the_complete_check(body) -> None:
    assert plain_chat(body) is None
