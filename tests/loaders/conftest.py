"""Fixtures for tests that add targets to an artifact, and for tests of tokenizers."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from precast.loaders.add_target import Addition, add_target
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.compiling import compiler as compiling
from precast.loaders.compiling import isa
from precast.loaders.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that reads all files below a folder, by name."""

    def read(root: Path) -> dict[str, bytes]:
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    return read


@pytest.fixture(scope="session")
def replaced_bytes() -> Callable[..., list[int]]:
    """Return a function that replaces ids of byte tokens with U+FFFD, from the first invalid byte of a run on.

    The library replaces the whole run, including complete characters, which a stream has already returned.
    """

    def replace(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> list[int]:
        library, result, run = tokenizer._library, list[int](), bytearray()

        def end_run() -> None:
            try:
                bytes(run).decode()
                valid = len(run)
            except UnicodeDecodeError as error:
                valid = error.start
            names = [f"<0x{byte:02X}>" for byte in run[:valid]]
            names += ["\N{REPLACEMENT CHARACTER}"] * (len(run) - valid)
            result.extend(library.token_to_id(name) for name in names)
            run.clear()

        for token_id in ids:
            token = library.id_to_token(token_id)
            if not token or (skip and token_id in tokenizer._special_ids):
                continue
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                run.append(int(token[3:5], 16))
            else:
                end_run()
                result.append(token_id)
        end_run()
        assert None not in result
        return result

    return replace


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """Compile each program once: all copies of the tiny artifact have the same."""
    made: dict[tuple[str, ...], Any] = {}

    def compile_programs(
        programs: Any, where: str, *, isa: str = isa.NATIVE, log: Callable[[str], None]
    ) -> Any:
        programs = list(programs)
        key = (isa, *(hashlib.sha256(code).hexdigest() for _, code in programs))
        if key not in made:
            made[key] = compile_for_real(programs, where, isa=isa, log=log)
        return made[key]

    compile_for_real = compiling.compile_programs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "compile_programs", compile_programs)
        yield


@pytest.fixture
def add(compiled_once: None, artifact_copy: Path) -> Callable[..., tuple[Addition, list[str]]]:
    """Return a function that adds a target to the copy, and returns the result and the messages."""

    def run(name: str | None = "x86-64-v3", **options: Any) -> tuple[Addition, list[str]]:
        messages: list[str] = []
        return add_target(artifact_copy, isa=name, log=messages.append, **options), messages

    return run


@pytest.fixture
def refused(
    add: Callable[..., Any], artifact_copy: Path, tree: Callable[[Path], dict[str, bytes]]
) -> Callable[..., str]:
    """Return a function that fails to add a target, and returns the error; the artifact must be unchanged."""

    def run(name: str | None = "x86-64-v3", **options: Any) -> str:
        before = tree(artifact_copy)
        with pytest.raises(PrecastError) as raised:
            add(name, **options)
        assert tree(artifact_copy) == before
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return run
