"""Golden answers are replayed once for each combination of artifact and machine."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import precast
from precast import kernels
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import processor_model
from precast.loaders.audit import replayed


@pytest.fixture
def replays(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets an item at each replay, and use an empty cache folder."""
    found: list[str] = []
    original = replayed.replay

    def counted(model: Any, golden: Any, where: str) -> Any:
        found.append(where)
        return original(model, golden, where)

    monkeypatch.setattr(replayed, "replay", counted)
    return found


def test_a_success_is_recorded(replays: list[str], tiny_model: Any, tiny_artifact: Path) -> None:
    assert [replayed.replay_once(tiny_model, tiny_artifact) for _ in range(2)] == [True, False]
    assert replays == [str(tiny_artifact)]
    assert replayed.replay_once(tiny_model, tiny_artifact, again=True)
    assert len(replays) == 2


def test_a_record_names_the_processor_and_its_kernels(
    replays: list[str], tiny_model: Any, tiny_artifact: Path, own_cache: Path
) -> None:
    replayed.replay_once(tiny_model, tiny_artifact)
    (record,) = (own_cache / "replayed").iterdir()
    assert json.loads(record.read_text()) == {
        "artifact": "tiny",
        "target": tiny_model.target.name,
        "processor": processor_model(),
        "kernels": kernels.isa(),
    }


@pytest.mark.parametrize("name", ["README.md", "golden.json"])
def test_verify_that_fails_removes_the_record(
    replays: list[str], artifact_copy: Path, cli: Callable[..., Any], name: str
) -> None:
    model = precast.load(artifact_copy)
    replayed.replay_once(model, artifact_copy)
    assert cli("verify", artifact_copy).exit_code == 0
    assert not replayed.replay_once(model, artifact_copy)
    before = (artifact_copy / name).read_bytes()
    (artifact_copy / name).write_bytes(before + b" ")
    assert cli("verify", artifact_copy).exit_code == 1
    (artifact_copy / name).write_bytes(before)
    assert replayed.replay_once(model, artifact_copy)


def test_another_machine_replays_again(
    replays: list[str], tiny_model: Any, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed.replay_once(tiny_model, tiny_artifact)
    machine = replace(replayed.this_machine(cuda=False), jaxlib="0.0.1")
    monkeypatch.setattr(replayed, "this_machine", lambda cuda: machine)
    replayed.replay_once(tiny_model, tiny_artifact)
    assert len(replays) == 2


def other_manifest(model: Any, _: pytest.MonkeyPatch) -> None:
    manifest = model.manifest
    model.manifest = replace(manifest, sampling=replace(manifest.sampling, temperature=0.123))


def other_flags(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")


def other_numpy(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed.np, "__version__", "0.0.1")


def other_processor(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed, "processor_model", lambda: "model name Other")


def other_features(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replayed.this_machine(cuda=False)
    fewer = replace(machine, features=machine.features[1:])
    monkeypatch.setattr(replayed, "this_machine", lambda cuda: fewer)


@pytest.mark.parametrize(
    "change", [other_manifest, other_flags, other_numpy, other_processor, other_features]
)
def test_a_change_replays_again(
    replays: list[str],
    tiny_model: Any,
    tiny_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any, pytest.MonkeyPatch], None],
) -> None:
    replayed.replay_once(tiny_model, tiny_artifact)
    model = copy.copy(tiny_model)
    change(model, monkeypatch)
    for _ in range(2):
        replayed.replay_once(model, tiny_artifact)
    assert len(replays) == 2


def test_another_version_of_the_code_replays_again(
    replays: list[str],
    tiny_model: Any,
    tiny_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = tmp_path / "loaders" / "audit" / "replayed.py"
    code.parent.mkdir(parents=True)
    code.touch()
    monkeypatch.setattr(replayed, "__file__", str(code))
    replayed.replay_once(tiny_model, tiny_artifact)
    os.utime(code, (1, 1))
    for _ in range(2):
        replayed.replay_once(tiny_model, tiny_artifact)
    assert len(replays) == 2


def test_a_failure_removes_the_record(
    replays: list[str], tiny_model: Any, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed.replay_once(tiny_model, tiny_artifact)
    with monkeypatch.context() as patch:
        patch.setattr("precast.loaders.audit.verify._token_problems", lambda *_: ["a token differs"])
        with pytest.raises(PrecastError, match="a token differs"):
            replayed.replay_once(tiny_model, tiny_artifact, again=True)
    replayed.replay_once(tiny_model, tiny_artifact)
    assert len(replays) == 3


def test_a_failure_is_not_recorded(
    replays: list[str], tiny_model: Any, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("precast.loaders.audit.verify._token_problems", lambda *_: ["a token differs"])
        for _ in range(2):
            with pytest.raises(PrecastError, match="a token differs"):
                replayed.replay_once(tiny_model, tiny_artifact)
    replayed.replay_once(tiny_model, tiny_artifact)
    assert len(replays) == 3


def test_without_a_cache_folder_each_call_replays(
    replays: list[str], tiny_model: Any, tiny_artifact: Path, own_cache: Path
) -> None:
    own_cache.mkdir()
    (own_cache / "replayed").write_text("a file")
    for _ in range(2):
        replayed.replay_once(tiny_model, tiny_artifact)
    assert len(replays) == 2
