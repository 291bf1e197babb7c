"""The cache of executables that ``run --compile`` compiles: logged, counted, and checked before use."""

import hashlib
import os
import re
from pathlib import Path

import pytest

from precast.loaders.compiling import cache as compile_cache
from precast.loaders.compiling import child_process
from precast.loaders.compiling import compiler as compiling
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load

PROMPT = [7, 200, 31]
PROGRAMS = ("cache", "prefill_8", "prefill_16", "decode_1", "decode", "score")


@pytest.fixture(scope="module")
def filled(tmp_path_factory, tiny_artifact) -> tuple[Path, list[str], int]:
    """Return a cache folder with the portable target, the messages, and the number of compiled programs."""
    folder, said = tmp_path_factory.mktemp("compiled"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRECAST_CACHE", str(folder))
        model = load(tiny_artifact, target="portable", allow_compile=True, trusted=True, log=said.append)
    return folder, said, model.compiles


@pytest.fixture
def run(filled, tiny_artifact, tmp_path, monkeypatch):
    """Return a function that loads the portable target with the filled cache or a changed copy of it.

    The function returns the model and the messages.
    """

    def again(change=None):
        folder = filled[0]
        if change is not None:
            folder = tmp_path / "cache"
            (folder / "compiled").mkdir(parents=True)
            for entry in (filled[0] / "compiled").iterdir():
                (folder / "compiled" / entry.name).write_bytes(entry.read_bytes())
            change(folder / "compiled")
        monkeypatch.setenv("PRECAST_CACHE", str(folder))
        said: list[str] = []
        model = load(tiny_artifact, target="portable", allow_compile=True, trusted=True, log=said.append)
        return model, said

    return again


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda entry: entry.stat().st_size)


def test_the_first_load_compiles_and_logs_each_program(filled):
    folder, said, compiles = filled
    assert said == [f"compiling {name} from StableHLO …" for name in PROGRAMS]
    assert compiles == len(PROGRAMS)
    assert len(entries(folder / "compiled")) == len(PROGRAMS)


def test_the_next_load_compiles_nothing_and_logs_that(run, filled, tiny_artifact, tiny_model):
    model, said = run()
    where = f"{tiny_artifact}: target 'portable'"
    assert said == [
        f"{where}: all programs were compiled here before, and are taken from {filled[0]}/compiled"
    ]
    assert model.compiles == 0
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    assert model.generate(PROMPT, params).token_ids == tiny_model.generate(PROMPT, params).token_ids


def flip(folder: Path) -> None:
    entry = entries(folder)[0]
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)


def truncate(folder: Path) -> None:
    entries(folder)[0].write_bytes(entries(folder)[0].read_bytes()[:-1])


def empty(folder: Path) -> None:
    entries(folder)[0].write_bytes(b"")


def remove(folder: Path) -> None:
    entries(folder)[0].unlink()


@pytest.mark.parametrize("damage", [flip, truncate, empty, remove])
def test_a_damaged_entry_is_compiled_again(run, damage):
    model, said = run(damage)  # the smallest entry is the program that makes an empty KV cache
    assert re.search(r": 5 of 6 programs were compiled here before, and are taken from ", said[0])
    assert said[1:] == ["compiling cache from StableHLO …"]
    assert model.compiles == 1
    assert len(model.generate(PROMPT, SamplingParams(max_tokens=4, ignore_eos=True)).token_ids) == 4


def test_an_entry_that_xla_refuses_is_compiled_again(run):
    def junk(folder: Path) -> None:
        data = b"another compiler's executable"
        entries(folder)[0].write_bytes(hashlib.sha256(data).digest() + data)

    model, said = run(junk)
    assert said[1].endswith(": target 'portable': XLA refuses the cached executable of cache")
    assert said[2:] == ["compiling cache from StableHLO …"]
    assert model.compiles == 1


def test_a_cache_that_cannot_be_written_to_is_logged(tmp_path, monkeypatch, compiler):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path / "file" / "cache"))
    said: list[str] = []
    found = executables([("decode", b"code")], log=said.append)
    assert found["decode"].is_new
    (line,) = said
    assert line == (
        f"art: will be compiled again at the next start, because {tmp_path}/file/cache/compiled cannot be written to;"
        " set PRECAST_CACHE to a writable folder."
    )


@pytest.fixture
def compiler(monkeypatch):
    """Replace the compiler with a function that takes no time."""
    made = compiling.Compilation(executable=b"x", memory=None, layouts=((), ()), seconds=0.0)
    monkeypatch.setattr(
        compile_cache, "compile_programs", lambda programs, *_, **__: {n: made for n, _ in programs}
    )


def test_without_a_home_folder_every_load_compiles_and_logs_that(homeless, compiler):
    for _ in range(2):
        said: list[str] = []
        found = executables([("decode", b"code")], log=said.append)
        assert found["decode"].is_new
        (line,) = said
        assert line == (
            "art: will be compiled again at the next start, because this user has no home folder to hold"
            " the cache folder; set PRECAST_CACHE to a folder."
        )


def test_old_entries_are_removed(tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path))
    executables([("decode", b"old"), ("cache", b"new")])
    old = entry(b"old")
    os.utime(old, (1, 1))
    executables([("decode", b"newer")])
    left = {entry(code) for code in (b"new", b"newer")}
    assert set((tmp_path / "compiled").iterdir()) == left


def machine(**changes):
    from dataclasses import replace

    from precast.loaders.runtime.installed import this_machine

    return replace(this_machine(), **changes)


def executables(programs, log=lambda _: None):
    return compile_cache.executables(programs, machine(), "art", threads=1, log=log)


def entry(code: bytes, threads: int = 1, **changes) -> Path:
    compiler = compile_cache._CachingCompiler(
        machine=machine(**changes), where="art", threads=threads, log=print
    )
    return compiler._entry(code)


def test_an_entry_is_for_one_compiler_and_one_machine(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    names = [entry(b"code"), entry(b"other"), entry(b"code", threads=2)]
    for change in ({"jaxlib": "9.9"}, {"kernel_abi": 99}, {"features": ("sse2",)}, {"machine": "aarch64"}):
        names.append(entry(b"code", **change))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX")
    names.append(entry(b"code"))
    assert len(set(names)) == len(names)


def test_programs_are_compiled_with_as_many_threads_as_the_load(tiny_artifact, own_cache, monkeypatch):
    """A limit on threads may not allow more."""
    asked, original = [], child_process.Child.ask

    def ask(self, request, *rest, **options):
        asked.append(request["threads"])
        return original(self, request, *rest, **options)

    monkeypatch.setattr(child_process.Child, "ask", ask)
    options = {"target": "portable", "allow_compile": True, "trusted": True}
    assert load(tiny_artifact, threads=1, log=lambda _: None, **options).compiles == len(PROGRAMS)
    assert asked == [1] * len(PROGRAMS)
    # XLA distributes loops over its threads at compile time.
    assert load(tiny_artifact, threads=2, log=lambda _: None, **options).compiles == len(PROGRAMS)
    assert load(tiny_artifact, threads=1, log=lambda _: None, **options).compiles == 0
