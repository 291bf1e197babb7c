"""Fixtures for tests that add targets to an artifact, and for tests of tokenizers."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from precast.loaders.add_target import Addition, add_target
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import SamplingDefaults
from precast.loaders.compiling import compiler as compiling
from precast.loaders.compiling import isa
from precast.loaders.generation.model import Model
from precast.loaders.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that reads all files below a folder, and returns their contents by name."""

    def read(root: Path) -> dict[str, bytes]:
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    return read


@pytest.fixture(scope="session")
def replaced_bytes() -> Callable[..., list[int]]:
    """Return a function that maps token ids to the ids that a stream decodes.

    In each run of byte tokens, U+FFFD replaces all bytes from the first invalid byte. The library replaces the whole
    run, including complete characters that a stream has already returned.
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
    """Compile each program only once, because all copies of the tiny artifact have the same programs."""
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
    """Return a function that tries to add a target, which must fail without a change, and returns the error."""

    def run(name: str | None = "x86-64-v3", **options: Any) -> str:
        before = tree(artifact_copy)
        with pytest.raises(PrecastError) as raised:
            add(name, **options)
        assert tree(artifact_copy) == before
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return run


class ScriptedEngine:
    """An engine whose greedy tokens follow a script, for any prompt."""

    context, slots, vocab, buckets, score_tokens = 4096, 2, 400, (4096,), 0
    windows: Mapping[str, int] = MappingProxyType({})

    def __init__(self, script: list[int]) -> None:
        self._script = script
        self._prompts: dict[int, int] = {}

    def new_cache(self) -> None:
        return None

    def prefill_chunk(self, tokens: list[int], cache: None, *, start: int, slot: int) -> Any:
        self._prompts[slot] = start + len(tokens)
        return self._step([0])

    def decode(self, rows: list[Any], cache: None) -> Any:
        return self._step([row.position + 1 - self._prompts[row.slot] for row in rows])

    def logits(self, step: Any) -> np.ndarray:
        return np.stack([np.eye(1, self.vocab, token, np.float32)[0] for token in step.token])

    def _step(self, places: list[int]) -> Any:
        last = len(self._script) - 1
        return SimpleNamespace(token=np.array([self._script[min(n, last)] for n in places], np.int32))


@pytest.fixture(scope="session")
def scripted_model(tiny_source: Any) -> Callable[..., Any]:
    """Return a function that makes a model with a chat template, whose answer is a given text."""
    source, end = json.loads(tiny_source().tokenizer_json), 1

    def make(text: str, template: str, *, special: Sequence[str] = (), marks: Sequence[str] = ()) -> Model:
        data = json.loads(json.dumps(source))
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for number, content in enumerate((*special, *marks)):
            token = {"id": len(data["model"]["vocab"]) + number, "content": content}
            data["added_tokens"].append({**token, "special": number < len(special), **flags})
        tokenizer = Tokenizer.from_json(
            json.dumps(data).encode(), chat_template=template, bos_token="<s>", eos_token="</s>"
        )
        manifest = SimpleNamespace(
            tokenizer=SimpleNamespace(eos_token_ids=(end,)), sampling=SamplingDefaults(), name="scripted"
        )
        engine: Any = ScriptedEngine([*tokenizer.encode(text), end])
        target: Any = SimpleNamespace(name="cpu", kernels=None)
        made: Any = manifest
        return Model(engine=engine, tokenizer=tokenizer, manifest=made, target=target, compiles=0)

    return make
