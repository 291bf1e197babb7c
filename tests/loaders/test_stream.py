"""Streams: freeing memory, reporting results, and use from threads and event loops."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.generation.stream import Completion, Stream
from precast.loaders.load import load

PROMPT = [7, 200, 31]
FREE = SamplingParams(ignore_eos=True)


@pytest.fixture(scope="module")
def tiny_model(tiny_artifact: Path) -> Model:
    """Return a model that keeps no memory for later prompts, so that only streams hold KV caches."""
    return load(tiny_artifact, prefix_memory=0)


def watched_caches(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which a weak reference to every new cache is added."""
    made: list[Any] = []
    new_cache = model.engine.new_cache

    def watched() -> Any:
        cache = new_cache()
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(model.engine, "new_cache", watched)
    return made


@pytest.fixture
def caches(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return weak references to all new caches, which reference counting alone must free."""
    made = watched_caches(tiny_model, monkeypatch)
    gc.disable()
    yield made
    gc.enable()


@pytest.fixture(scope="module")
def free(tiny_model: Model) -> Completion:
    return tiny_model.generate(PROMPT, FREE)


def living(caches: list[Any]) -> int:
    return sum(cache() is not None for cache in caches)


def begun(model: Model) -> Stream:
    stream = model.stream(PROMPT, FREE)
    next(stream)
    return stream


def test_a_dropped_stream_frees_its_cache_at_once(tiny_model: Model, caches: list[Any]) -> None:
    stream = begun(tiny_model)
    assert living(caches) == 1
    del stream
    assert living(caches) == 0


def test_a_stream_alive_at_the_end_of_the_process_is_silent(tiny_artifact: Path) -> None:
    script = (
        "import sys; from precast.loaders.load import load;"
        "stream = load(sys.argv[1]).stream([7, 200, 31]); next(stream)"
    )
    line = [sys.executable, "-c", script, str(tiny_artifact)]
    done = subprocess.run(line, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_leaving_the_loop_frees_the_cache(tiny_model: Model, caches: list[Any]) -> None:
    for _ in tiny_model.stream(PROMPT, FREE):
        assert living(caches) == 1
        break
    assert (len(caches), living(caches)) == (1, 0)


def test_a_finished_stream_holds_no_cache(tiny_model: Model, caches: list[Any]) -> None:
    stream = tiny_model.stream(PROMPT, FREE)
    stream.finish()
    assert (len(caches), living(caches)) == (1, 0)


def test_a_model_that_may_keep_prefixes_keeps_one_cache(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_artifact)
    made = watched_caches(model, monkeypatch)
    for _ in range(3):
        stream = begun(model)
        del stream
    assert (len(made), living(made)) == (1, 1)
    monkeypatch.undo()
    del model
    gc.collect()
    assert living(made) == 0


def closed_by_name(stream: Stream) -> None:
    stream.close()
    stream.close()


def closed_by_block(stream: Stream) -> None:
    with stream as same:
        assert same is stream


def closed_by_error(stream: Stream) -> None:
    with pytest.raises(KeyError), stream:
        raise KeyError("of the reader")


def closed_by_async_block(stream: Stream) -> None:
    async def use() -> None:
        async with stream as same:
            assert same is stream

    asyncio.run(use())


@pytest.mark.parametrize("close", [closed_by_name, closed_by_block, closed_by_error, closed_by_async_block])
def test_a_closed_stream_frees_its_cache_and_keeps_its_result(
    tiny_model: Model, caches: list[Any], free: Completion, close: Callable[[Stream], None]
) -> None:
    stream = tiny_model.stream(PROMPT, FREE)
    given = next(stream) + next(stream)
    close(stream)
    assert living(caches) == 0
    assert list(stream) == []
    found = stream.completion
    assert (found.text, found.finish_reason) == (given, "unfinished")
    assert free.text.startswith(given)
    assert found.token_ids == free.token_ids[: len(found.token_ids)]
    assert found.prompt_token_ids == tuple(PROMPT)


def test_reading_the_completion_generates_nothing(
    tiny_model: Model, caches: list[Any], free: Completion
) -> None:
    stream = tiny_model.stream(PROMPT, FREE)
    found = stream.completion
    assert (found.text, found.token_ids, found.finish_reason) == ("", (), "unfinished")
    assert found.timing.prefill_s == found.timing.decode_s == 0
    assert caches == []
    next(stream)
    assert stream.completion.finish_reason == "unfinished"
    assert len(stream.completion.token_ids) < 5
    # The stream also stays open.
    assert stream.finish().token_ids == free.token_ids
    assert stream.completion.finish_reason == "length"


def test_finish_generates_the_rest(tiny_model: Model, free: Completion) -> None:
    stream = begun(tiny_model)
    found = stream.finish()
    assert (found.text, found.token_ids, found.finish_reason) == (free.text, free.token_ids, "length")
    assert stream.finish() == found


# --- threads ------------------------------------------------------------------------------------------------


def test_threads_share_a_model(tiny_model: Model) -> None:
    prompts = [[n, 200, 31] for n in range(8)]
    alone = [tiny_model.generate(ids, FREE).token_ids for ids in prompts]
    found: dict[int, Any] = {}

    def work(n: int) -> None:
        found[n] = tiny_model.generate(prompts[n], FREE).token_ids

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(8)] == alone


def test_threads_share_a_stream(tiny_model: Model, free: Completion) -> None:
    stream = tiny_model.stream(PROMPT, FREE)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.extend(stream)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(tiny_model.stream(PROMPT, FREE))
    assert stream.completion.token_ids == free.token_ids


def test_another_thread_closes_a_stream(tiny_model: Model, caches: list[Any], free: Completion) -> None:
    """`close` waits for the current step; then the reader reaches the end."""
    stream = tiny_model.stream(PROMPT, FREE)
    decode, inside, goes_on = tiny_model.engine.decode, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        inside.set()
        assert goes_on.wait(60)
        return decode(*arguments)

    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model.engine, "decode", slow)
        reader = threading.Thread(target=lambda: found.extend(stream))
        reader.start()
        assert inside.wait(60)
        closer = threading.Thread(target=stream.close)
        closer.start()
        while not stream._sequence.closing:
            pass
        goes_on.set()
        closer.join(60)
        reader.join(60)
    assert living(caches) == 0
    assert len(stream.completion.token_ids) == 2 < len(free.token_ids)
    assert "".join(found) == stream.completion.text


# --- event loops --------------------------------------------------------------------------------------------


async def collected(stream: Stream) -> list[str]:
    return [piece async for piece in stream]


def test_concurrent_async_streams(tiny_model: Model, caches: list[Any]) -> None:
    prompts = [[n, 200, 31] for n in range(6)]
    expected = [list(tiny_model.stream(ids, FREE)) for ids in prompts]

    async def use() -> list[list[str]]:
        return await asyncio.gather(*(collected(tiny_model.stream(ids, FREE)) for ids in prompts))

    assert asyncio.run(use()) == expected
    assert living(caches) == 0


def test_the_event_loop_is_not_blocked_by_a_step(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read, came = tiny_model.engine.prefill_chunk, threading.Event()

    def until_the_loop_ran(*arguments: Any, **named: Any) -> Any:
        assert came.wait(60), "the event loop was blocked"
        return read(*arguments, **named)

    monkeypatch.setattr(tiny_model.engine, "prefill_chunk", until_the_loop_ran)

    async def use() -> list[str]:
        asyncio.get_running_loop().call_later(0.05, came.set)
        return await collected(tiny_model.stream(PROMPT, FREE))

    assert asyncio.run(use()) == list(tiny_model.stream(PROMPT, FREE))


def test_a_cancelled_task_ends_the_generation(
    tiny_model: Model, caches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generation must end even if no further piece arrives to unblock the reader's thread."""
    monkeypatch.setattr(type(tiny_model.tokenizer.stream()), "push", lambda self, token: "")
    decode, inside, goes_on = tiny_model.engine.decode, threading.Event(), threading.Event()

    steps: list[int] = []

    def slow(*arguments: Any) -> Any:
        steps.append(1)
        inside.set()
        assert goes_on.wait(60)
        return decode(*arguments)

    monkeypatch.setattr(tiny_model.engine, "decode", slow)

    async def use() -> None:
        task = asyncio.create_task(collected(tiny_model.stream(PROMPT, FREE)))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        goes_on.set()

    asyncio.run(use())  # asyncio.run waits for its worker threads
    assert (len(steps), len(caches), living(caches)) == (1, 1, 0)


def test_a_task_cancelled_before_the_first_step_computes_nothing(
    tiny_model: Model, caches: list[Any]
) -> None:
    stream = tiny_model.stream(PROMPT, FREE)

    async def use() -> list[str]:
        release = threading.Event()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        busy = asyncio.create_task(asyncio.to_thread(release.wait, 60))
        waiting = asyncio.create_task(collected(stream))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        release.set()
        await busy
        return await collected(stream)

    assert asyncio.run(use()) == []
    assert (len(caches), stream.completion.finish_reason) == (0, "unfinished")
