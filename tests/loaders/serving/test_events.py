"""Server-sent events."""

import pytest

from precast.loaders.serving.requests import event, text_event


def value(text: str) -> dict[str, object]:
    return {"id": "x", "choices": [{"index": 0, "delta": {"content": text}, "logprobs": None}]}


@pytest.mark.parametrize(
    "text", ["a", "", ' "\\\n\r\t\0', "\u2028 é 漢 🙂", "\ud800", "\0text\0", "data: b\n\n"]
)
def test_text_events_are_encoded_like_all_events(text: str) -> None:
    assert text_event(value)(text) == event(value(text))
