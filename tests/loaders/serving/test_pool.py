"""Many models: loaded at the first request, unloaded when they are idle or memory is short, pulled from a store."""

import asyncio
import contextlib
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.serving.errors import ApiError
from precast.loaders.serving.loading import Loaded, early_load, measure
from precast.loaders.serving.pool import Pool, _free
from precast.loaders.serving.settings import ServeSettings
from precast.loaders.serving.sources import named_sources
from precast.loaders.text.tokenizer import Tokenizer

LOG: list[str] = []


@pytest.fixture
def folders(tmp_path: Path, tiny_artifact: Path) -> Mapping[str, Path]:
    """Return three models by name."""
    LOG.clear()
    return {name: Path(shutil.copytree(tiny_artifact, tmp_path / "models" / name)) for name in "abc"}


def run(sources: Mapping[str, Path | str], work: Callable[[Pool], Awaitable[Any]], **settings: Any) -> Any:
    async def main() -> Any:
        pool = Pool(sources, ServeSettings(**settings), LOG.append)
        unloading = asyncio.create_task(pool.unload_idle())
        try:
            return await work(pool)
        finally:
            unloading.cancel()

    return asyncio.run(main())


def loaded(pool: Pool) -> str:
    return "".join(name for name, entry in pool.entries.items() if entry.model is not None)


async def use(pool: Pool, names: str) -> None:
    for name in names:
        async with pool.lease(name, 1) as model:
            assert model.engine.context == 64


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def size_of(root: Path) -> int:
    """Return the memory that a model is estimated to need."""
    return measure(root, ServeSettings(), LOG.append)[1]


def test_a_model_is_loaded_once_for_many_requests(folders) -> None:
    async def work(pool: Pool) -> str:
        assert loaded(pool) == ""
        await asyncio.gather(*(use(pool, "b") for _ in range(5)))
        assert pool.entries["b"].in_flight == 0
        return loaded(pool)

    assert run(folders, work) == "b"
    assert len([line for line in LOG if ": loaded" in line]) == 1


def test_the_least_recently_used_model_is_unloaded(folders) -> None:
    async def work(pool: Pool) -> list[str]:
        states = []
        for names in ("a", "b", "ac", "b"):
            await use(pool, names)
            states.append(loaded(pool))
        return states

    assert run(folders, work, memory=size_of(folders["a"]) * 5 // 2) == ["a", "ab", "ac", "bc"]


def test_a_model_in_use_stays_and_the_next_one_waits(folders) -> None:
    async def work(pool: Pool) -> None:
        async with pool.lease("a", 1):
            waiting = asyncio.create_task(use(pool, "b"))
            await until(lambda: pool.entries["a"].gives_way)
            assert (loaded(pool), waiting.done()) == ("a", False)
        await waiting
        assert loaded(pool) == "b"

    run(folders, work, memory=size_of(folders["a"]) * 3 // 2)


def test_a_model_that_gives_way_answers_later(folders) -> None:
    """A request that arrives while its model gives way waits for the model's next turn."""
    order: list[str] = []

    async def ask(pool: Pool, name: str) -> None:
        async with pool.lease(name, 1) as model:
            order.append(name)
            assert pool.entries[name].model is model

    async def work(pool: Pool) -> None:
        async with pool.lease("a", 1) as first:
            tasks = [asyncio.create_task(ask(pool, "b"))]
            await until(lambda: pool.entries["a"].gives_way)
            tasks += [asyncio.create_task(ask(pool, "a")) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert (order, pool.entries["a"].model) == ([], first)
        await asyncio.gather(*tasks)
        assert order == ["b", "a", "a", "a"]

    run(folders, work, memory=size_of(folders["a"]) * 3 // 2)


def test_another_model_becomes_idle_first(folders) -> None:
    """The model that should give way stays, and its requests go on."""

    async def work(pool: Pool) -> None:
        async with pool.lease("a", 1):
            async with pool.lease("b", 1):
                third = asyncio.create_task(use(pool, "c"))
                await until(lambda: pool.entries["a"].gives_way)
                fourth = asyncio.create_task(use(pool, "a"))
            await asyncio.gather(third, fourth)
            assert loaded(pool) == "ac"
            assert not pool.entries["a"].gives_way
        assert pool.entries["a"].leases == set()

    run(folders, work, memory=size_of(folders["a"]) * 5 // 2)


def test_nobody_waits_for_memory_any_more(folders) -> None:
    async def work(pool: Pool) -> None:
        async with pool.lease("a", 1):
            waiting = asyncio.create_task(use(pool, "b"))
            await until(lambda: pool.entries["a"].gives_way)
            waiting.cancel()
            await until(lambda: pool.entries["b"].loading is None)
            await use(pool, "a")
        assert (loaded(pool), pool.entries["b"].bytes) == ("a", 0)
        await use(pool, "b")

    run(folders, work, memory=size_of(folders["a"]) * 3 // 2)


@pytest.mark.parametrize("names", ["aba", "abab"])
def test_models_that_are_loaded_again_parse_no_tokenizer(folders, monkeypatch, names) -> None:
    """Parsing holds Python's lock, so it would stop the event loop. The three models have the same tokenizer."""
    parses = []
    parse = Tokenizer.from_json
    monkeypatch.setattr(Tokenizer, "from_json", lambda *a, **k: parses.append(a) or parse(*a, **k))

    async def work(pool: Pool) -> None:
        await use(pool, names)

    run(folders, work, memory=size_of(folders["a"]) * 3 // 2)
    assert sum("unloaded" in line for line in LOG) == len(names) - 1
    assert len(parses) == 1


def test_the_only_model_is_loaded_again_without_parsing_its_tokenizer(folders, monkeypatch) -> None:
    parses = []
    parse = Tokenizer.from_json
    monkeypatch.setattr(Tokenizer, "from_json", lambda *a, **k: parses.append(a) or parse(*a, **k))
    sources, settings = {"a": folders["a"]}, ServeSettings(idle_unload=0.05)

    async def main() -> None:
        pool = Pool(sources, settings, LOG.append, early_load(sources, settings, LOG.append))
        unloading = asyncio.create_task(pool.unload_idle())
        await pool.preload()
        await until(lambda: not loaded(pool))
        await use(pool, "a")
        unloading.cancel()

    asyncio.run(main())
    assert len(parses) == 1


def test_three_models_in_the_memory_of_two_answer_a_mixed_load(folders, monkeypatch) -> None:
    """No request fails or starves, and the models never take more than the limit."""
    limit, most, count = size_of(folders["a"]) * 5 // 2, [0], dict.fromkeys("abc", 0)

    class Stub:
        engine = SimpleNamespace(slots=8)

    def load(*_: Any) -> Any:
        return Loaded(Stub(), is_replayed=True)

    monkeypatch.setattr("precast.loaders.serving.pool.load_verified", load)

    async def ask(pool: Pool, name: str, seconds: float) -> None:
        for _ in range(20):
            entry = pool.entries[name]
            async with pool.lease(name) as model:
                most[0] = max(most[0], sum(e.bytes for e in pool.entries.values()))
                assert entry.model is model
                await asyncio.sleep(seconds)
                assert entry.model is model
                count[name] += 1

    async def work(pool: Pool) -> None:
        asks = [ask(pool, name, 0.002 * n) for n in range(1, 4) for name in "abc"]
        async with asyncio.timeout(120):
            await asyncio.gather(*asks)

    run(folders, work, memory=limit)
    assert count == dict.fromkeys("abc", 60)
    assert most[0] <= limit


def test_a_load_that_fails_fails_all_who_wait_and_frees_its_memory(folders, monkeypatch) -> None:
    """The estimate may be wrong: the load then finds too little memory."""

    def fail(*_: Any) -> None:
        raise PrecastError("weights.safetensors: expected 2 GB of free memory, found 1 GB.")

    async def work(pool: Pool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("precast.loaders.serving.pool.load_verified", fail)
            errors = await asyncio.gather(*(use(pool, "a") for _ in range(4)), return_exceptions=True)
        assert [error.status for error in errors if isinstance(error, ApiError)] == [503] * 4
        assert pool.entries["a"].bytes == 0
        await use(pool, "ba")

    run(folders, work, memory=size_of(folders["a"]) * 5 // 2)


def test_a_model_that_never_fits(folders) -> None:
    async def work(pool: Pool) -> None:
        with pytest.raises(
            ApiError, match=r"^The model 'a' could not be loaded; the server's log gives the reason\.$"
        ):
            await use(pool, "a")

    run(folders, work, memory=1000)
    assert "--memory allows" in LOG[-1]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_model_in_a_cycle_is_freed_even_if_collections_skip_it(is_frozen: bool) -> None:
    """Later collections skip objects if they did so before."""

    class Stub:
        pass

    stub: Any = Stub()
    stub.itself = stub
    gone, models = weakref.ref(stub), [stub]
    del stub
    gc.unfreeze()
    if is_frozen:
        gc.freeze()
    try:
        _free(models)
        assert gone() is None
        assert (gc.get_freeze_count() > 0) == is_frozen
    finally:
        gc.unfreeze()


def test_an_idle_model_is_unloaded_and_its_memory_freed(folders) -> None:
    async def work(pool: Pool) -> None:
        async with pool.lease("a", 1) as model:
            engine = weakref.ref(model.engine)
            await asyncio.sleep(0.3)
        del model
        while loaded(pool):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)  # a thread frees the memory
        assert engine() is None
        await use(pool, "a")

    run(folders, work, idle_unload=0.1)
    assert LOG[1] == "a: unloaded"


def test_a_broken_model_fails_alone(folders) -> None:
    (folders["b"] / "tokenizer.json").write_text("{}")

    async def work(pool: Pool) -> None:
        with pytest.raises(ApiError, match="could not be loaded") as caught:
            await use(pool, "b")
        assert str(folders["b"]) not in str(caught.value)
        await use(pool, "a")

    run(folders, work)
    assert any(line.startswith("b: ") and "tokenizer.json" in line for line in LOG)


def test_any_error_of_a_load(folders, monkeypatch) -> None:
    """The log has the reason, and the next request tries again."""

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    async def work(pool: Pool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("precast.loaders.serving.pool.load_verified", fail)
            await pool.preload()
        entry = pool.entries["a"]
        assert pool.obstacle == "The model could not be loaded; the server's log gives the reason."
        assert (entry.problem, entry.bytes, entry.leases) == ("MemoryError('no room')", 0, set())
        await use(pool, "a")
        assert pool.obstacle is None

    run({"a": folders["a"]}, work)
    assert LOG[0] == "a: MemoryError('no room')"


def test_a_store_that_hangs_blocks_only_its_model(folders, monkeypatch) -> None:
    release = threading.Event()

    def hanging_measure(source: Path, *rest: Any) -> Any:
        if source.name == "a":
            release.wait(60)
        return measure(source, *rest)

    monkeypatch.setattr("precast.loaders.serving.pool.measure", hanging_measure)

    async def work(pool: Pool) -> str:
        hanging = asyncio.create_task(use(pool, "a"))
        try:
            await use(pool, "b")
            return loaded(pool)
        finally:
            release.set()
            await hanging

    assert run(folders, work) == "b"


def test_requests_without_answers_have_a_queue_of_their_own(folders) -> None:
    async def work(pool: Pool) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(8):
                await stack.enter_async_context(pool.lease("a"))
            assert not pool.entries["a"].is_idle
            with pytest.raises(ApiError, match="Too many requests are waiting"):
                await stack.enter_async_context(pool.lease("a"))
            await use(pool, "a")
        assert pool.entries["a"].is_idle

    run(folders, work, max_queue=pool_queue(folders["a"]))


def pool_queue(root: Path) -> int:
    """Return the queue with which a model accepts eight answers."""
    return 8 - json.loads((root / "manifest.json").read_text())["slots"]


def test_a_model_with_other_answers_is_refused(folders, edit_manifest) -> None:
    """Golden answers are replayed before the first answer."""
    import hashlib

    path = folders["a"] / "golden.json"
    golden = json.loads(path.read_text())
    tokens = next(answer["token_ids"] for answer in golden["greedy"] if answer["token_ids"])
    tokens[0] = (tokens[0] + 1) % 300
    path.write_text(json.dumps(golden))
    data = path.read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(folders["a"], lambda manifest: manifest["files"]["golden.json"].update(entry))

    async def work(pool: Pool) -> str | None:
        await pool.preload()
        return pool.obstacle

    reason = run({"a": folders["a"]}, work)
    assert reason == "The model could not be loaded; the server's log gives the reason."
    assert "do not use it here" in LOG[-1]


def test_a_signature_is_required(folders, tmp_path) -> None:
    key = tmp_path / "public.pem"
    key.write_text("")

    async def work(pool: Pool) -> None:
        with pytest.raises(ApiError, match="could not be loaded"):
            await use(pool, "a")

    run(folders, work, loading={"require_signature": key})
    assert "sign" in LOG[-1]


def test_a_model_is_pulled_from_a_store(folders, tmp_path, own_cache) -> None:
    from precast.loaders.store.push import push

    url = f"file://{tmp_path}/store/team/pushed"
    push(folders["a"], url)
    shutil.rmtree(folders["a"])
    sources = named_sources([url, folders["b"]])

    async def work(pool: Pool) -> str:
        async with pool.lease("pushed", 1):
            return loaded(pool)

    assert list(sources) == ["pushed", "b"]
    assert run(sources, work) == "pushed"


def test_names(folders, tmp_path) -> None:
    root = tmp_path / "models"
    assert named_sources([root]) == {name: root / name for name in "abc"}
    assert named_sources([root / "a", "s3://bucket/b/"]) == {"a": root / "a", "b": "s3://bucket/b/"}
    with pytest.raises(PrecastError, match="expected models with different names, found 'a' here and at"):
        named_sources([root, root / "a"])
    with pytest.raises(PrecastError, match="does not exist"):
        named_sources([tmp_path / "nothing"])


def test_a_load_that_began_before_the_server(folders, monkeypatch) -> None:
    """The pool takes the model of that load, and loads it anew after a failure or an unloading."""
    settings = ServeSettings(idle_unload=0.1)
    sources = {"a": folders["a"]}
    good = early_load(sources, settings, LOG.append)
    assert good is not None
    good.join()
    with monkeypatch.context() as patch:
        patch.setattr("precast.loaders.serving.loading.load", lambda *_, **__: 1 / 0)
        bad = early_load(sources, settings, LOG.append)
        assert bad is not None
        bad.join()

    async def main() -> None:
        pool = Pool(sources, settings, LOG.append, good)
        await pool.preload()
        entry = pool.entries["a"]
        assert entry.model is not None
        assert entry.bytes == measure(folders["a"], settings, LOG.append)[1]
        engine = weakref.ref(entry.model.engine)
        await asyncio.sleep(0.1)  # the event loop forgets the load
        await pool._unload(entry)
        assert engine() is None
        await use(pool, "a")
        assert loaded(pool) == "a"

        pool = Pool(sources, settings, LOG.append, bad)
        await pool.preload()
        assert "could not be loaded" in str(pool.obstacle)
        await use(pool, "a")
        assert pool.obstacle is None

    asyncio.run(main())
    assert "a: ZeroDivisionError('division by zero')" in LOG


def test_loads_that_wait_for_the_server(folders) -> None:
    """Several models, a URL, and a model under a limit of memory are loaded by the pool."""
    several = {name: folders[name] for name in "ab"}
    assert early_load(several, ServeSettings(), LOG.append) is None
    assert early_load({"a": "s3://bucket/a"}, ServeSettings(), LOG.append) is None
    assert early_load({"a": folders["a"]}, ServeSettings(memory=10**12), LOG.append) is None
    assert early_load({}, ServeSettings(), LOG.append) is None
