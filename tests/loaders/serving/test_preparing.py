"""The preparation of requests: bounded, within the deadline, and once for all answers to a prompt."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

import precast
from precast.loaders.serving.answers import Ask, Services, _streams
from precast.loaders.serving.errors import ApiError
from precast.loaders.serving.preparing import Preparing
from precast.loaders.serving.requests import Request
from precast.loaders.serving.settings import ServeSettings


def services(preparing: Preparing) -> Services:
    nothing = cast("Any", None)
    return Services(
        settings=ServeSettings(),
        pool=nothing,
        preparing=preparing,
        metrics=nothing,
        responses=nothing,
        arriving=nothing,
        address="",
    )


def request(seconds: float) -> Request:
    return Request(id="", headers={}, path_params={}, deadline=time.monotonic() + seconds, facts={})


def test_calls_that_wait_are_bounded() -> None:
    release = threading.Event()

    async def main() -> None:
        preparing = Preparing(most=3)
        parts = services(preparing)
        calls = [asyncio.create_task(parts.prepare(request(60), lambda: release.wait(60))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="Too many requests are waiting") as caught:
            await parts.prepare(request(60), time.time)
        assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})
        release.set()
        assert await asyncio.gather(*calls) == [True] * 3
        for _ in range(5):
            await parts.prepare(request(60), time.time)
        preparing.close()

    asyncio.run(main())


def own_memory() -> int:
    """Return the resident memory without mapped files, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def test_memory_of_long_texts_is_given_back(tiny_model) -> None:
    """glibc would keep a few hundred megabytes."""
    text = "the cat " * 100_000

    async def main() -> None:
        preparing = Preparing(most=4)
        before = own_memory()
        for _ in range(4):
            await asyncio.gather(
                *(preparing.run(lambda: len(tiny_model.tokenizer.encode(text))) for _ in range(2))
            )
        kept = own_memory() - before
        assert kept > 50_000_000
        preparing.tidy()
        while own_memory() - before > kept / 3:
            await asyncio.sleep(0.05)
        preparing.close()
        preparing.tidy()

    asyncio.run(asyncio.wait_for(main(), 200))


def test_a_deadline_during_preparation() -> None:
    release = threading.Event()

    async def main() -> None:
        preparing = Preparing(most=3)
        try:
            with pytest.raises(ApiError) as caught:
                await services(preparing).prepare(request(0.1), lambda: release.wait(60))
            assert caught.value.code == "request_timeout"
        finally:
            release.set()
            preparing.close()

    asyncio.run(main())


def test_answers_to_one_chat_share_its_prompt(tiny_artifact, monkeypatch) -> None:
    model = precast.load(tiny_artifact)
    prompts: list[Any] = []
    chat_prompt = model.chat_prompt

    def counted(messages: Any, **options: Any) -> list[int]:
        prompts.append(messages)
        return chat_prompt(messages, **options)

    monkeypatch.setattr(model, "chat_prompt", counted)
    messages = [{"role": "user", "content": "the cat"}]
    streams = _streams(
        model, Ask(model="", fields={}, count=3, messages=messages), ServeSettings(), request(60)
    )
    assert len(streams) == 3
    assert prompts == [messages]
    assert len(model.chat_answers(messages, 3, precast.SamplingParams(max_tokens=1))) == 3
    assert prompts == [messages] * 2


def test_answers_to_one_prompt_share_its_preparation(tiny_artifact, monkeypatch) -> None:
    """The time limit counts from the end of the preparation."""
    left = iter([9.0, 5.0, 4.0, 3.0])
    clock = type("Clock", (), {"seconds_left": property(lambda _: next(left))})()
    model = precast.load(tiny_artifact)
    texts: list[str] = []
    encode = model.tokenizer.encode

    def counted(text: str, **options: Any) -> list[int]:
        texts.append(text)
        return encode(text, **options)

    monkeypatch.setattr(model.tokenizer, "encode", counted)
    ask = Ask(model="", fields={"bad_words": ("fox",)}, count=3, prompts=["the cat"])
    streams = _streams(model, ask, ServeSettings(), clock)
    assert [stream._sequence.timeout_s for stream in streams] == [5.0, 4.0, 3.0]
    assert sorted(texts) == [" fox", "fox", "the cat"]
