"""Tokenizers and vocabularies that outlive a model."""

import gc
import json
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import precast
from precast.loaders.generation import grammars as grammars_module
from precast.loaders.generation.grammars import Grammars
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.text.known_tokenizers import Derived, KnownTokenizers
from precast.loaders.text.tokenizer import Tokenizer


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the list of the files that are parsed from now on."""
    found: list[bytes] = []
    parse = Tokenizer.from_json

    def counted(data: bytes, **given: Any) -> Tokenizer:
        found.append(data)
        return parse(data, **given)

    monkeypatch.setattr(Tokenizer, "from_json", counted)
    return found


def test_a_model_that_is_loaded_again_parses_no_tokenizer(tiny_artifact: Path, parses: list[bytes]) -> None:
    known = KnownTokenizers()
    first = precast.load(tiny_artifact, tokenizers=known)
    known.keep(first.manifest, first.tokenizer)
    second = precast.load(tiny_artifact, tokenizers=known)
    assert len(parses) == 1
    assert second.tokenizer.library is first.tokenizer.library
    messages = [{"role": "user", "content": "hi"}]
    assert second.chat_prompt(messages) == first.chat_prompt(messages)
    precast.load(tiny_artifact)
    assert len(parses) == 2


def test_another_file_is_parsed(tiny_artifact: Path, parses: list[bytes]) -> None:
    known = KnownTokenizers()
    model = precast.load(tiny_artifact)
    spec, files = model.manifest.tokenizer, model.manifest.files
    other = replace_file(model.manifest, spec.file, replace(files[spec.file], sha256="0" * 64))
    known.keep(other, model.tokenizer)
    precast.load(tiny_artifact, tokenizers=known)
    assert len(parses) == 2


def replace_file(manifest: Any, name: str, entry: Any) -> Any:
    return replace(manifest, files={**manifest.files, name: entry})


def test_the_tokenizers_that_were_loaded_least_recently_are_dropped(tiny_artifact: Path) -> None:
    model = precast.load(tiny_artifact)
    name = model.manifest.tokenizer.file
    entry = model.manifest.files[name]
    manifests = [
        replace_file(model.manifest, name, replace(entry, sha256=f"{n}" * 64, bytes=size))
        for n, size in enumerate((40, 40, 40, 1000))
    ]
    known = KnownTokenizers(most_bytes=100)
    for manifest in (*manifests[:2], manifests[0], manifests[2]):
        known.keep(manifest, model.tokenizer)
    assert [known.find(manifest) is not None for manifest in manifests] == [True, False, True, False]
    known.keep(manifests[3], model.tokenizer)  # the latest one, although it alone exceeds the limit
    assert [known.find(manifest) is not None for manifest in manifests] == [False, False, False, True]


def words() -> Tokenizer:
    """Return a byte-level tokenizer of the ASCII letters."""
    letters = {chr(code): code - 32 for code in range(33, 127)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, **letters}, []))
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["</s>"])
    data = json.loads(library.to_str())
    return Tokenizer.from_json(
        json.dumps(data).encode(), chat_template=None, bos_token=None, eos_token="</s>"
    )


def test_tokenizers_of_one_file_share_the_vocabulary_for_constraints(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    reads: list[int] = []
    read = grammars_module.vocabulary_bytes
    monkeypatch.setattr(
        grammars_module, "vocabulary_bytes", lambda *given: reads.append(given[1]) or read(*given)
    )
    text = SamplingParams(regex="[a-c]+").constraint
    assert text is not None
    first = words()
    again = first.with_templates(chat_template="{{ messages }}")
    masks = [Grammars(t, size, [0]).start(text).mask() for t in (first, again) for size in (95, 96)]
    assert reads == [95, 96]
    assert masks[0].tolist() == masks[2].tolist()
    Grammars(first, 95, [0, 5]).start(text)  # another end token
    Grammars(words(), 95, [0]).start(text)  # another file
    assert reads == [95, 96, 95, 95]


def test_a_vocabulary_is_freed_with_its_tokenizers() -> None:
    """llguidance's objects are invisible to the garbage collector, so a cycle through them would stay for ever."""
    pytest.importorskip("llguidance")
    tokenizer = words()
    text = SamplingParams(regex="[a-c]+").constraint
    assert text is not None
    Grammars(tokenizer, 95, [0]).start(text)
    gone = weakref.ref(tokenizer._derived)
    del tokenizer
    gc.collect()
    assert gone() is None


def test_threads_make_a_value_once() -> None:
    derived, made, go = Derived(), [], threading.Event()

    def make() -> int:
        assert go.wait(60)
        made.append(1)
        return len(made)

    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(derived.get("key", make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(60)
    assert found == [1] * 4
    assert derived.get("other", lambda: 7) == 7


def test_the_two_values_that_were_used_last_are_kept() -> None:
    derived = Derived()
    made = [derived.get(key, lambda n=n: n) == n for n, key in enumerate("abacabcb")]
    assert made == [True, True, False, True, False, True, True, False]


def test_a_value_that_could_not_be_made_is_made_later() -> None:
    derived = Derived()
    with pytest.raises(ZeroDivisionError):
        derived.get("key", lambda: 1 // 0)
    assert derived.get("key", lambda: 3) == 3
