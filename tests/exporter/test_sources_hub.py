"""The hub: the form of ids, and the error for each failure. The tests need no network."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from precast.exporter.sources.hub import is_hub_id
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

NOWHERE = "http://127.0.0.1:9"  # the discard port: refused at once


def opened(spec: str, home, **environment: str) -> subprocess.CompletedProcess:
    """Run open_source in a new process, because huggingface-hub reads its settings only once."""
    code = (
        "import sys\n"
        "from precast.exporter.sources.open import open_source\n"
        "from precast.loaders.artifact.errors import PrecastError\n"
        "try: print(open_source(sys.argv[1]).name)\n"
        "except PrecastError as error: print(error)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    return subprocess.run(
        [sys.executable, "-c", code, spec],
        env=kept | {"HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def cache(home, repo: str, commit: str = "a" * 40) -> None:
    """Write a snapshot in the layout of huggingface-hub's cache."""
    folder = home / "hub" / ("models--" + repo.replace("/", "--"))
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    (snapshot / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}})
    )
    save_file({"w": np.ones((2, 2), np.float32)}, snapshot / "model.safetensors")


@pytest.mark.parametrize(
    "spec", ["gpt2", "org/name", "org/name@main", "a-b/c.d_e@refs/pr/1", "Qwen/Qwen2.5-0.5B-Instruct"]
)
def test_hub_ids(spec):
    assert is_hub_id(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        ".",
        "/abs/path",
        "./model",
        "a/b/c",
        "model.gguf",
        "org/x.safetensors",
        "a b",
        "a--b/c",
        "org/",
        "~/m",
        "o/..",
        "x@",
    ],
)
def test_strings_that_are_no_hub_ids(spec):
    assert not is_hub_id(spec)


def test_a_name_of_nothing(tmp_path):
    with pytest.raises(PrecastError) as caught:
        open_source(str(tmp_path / "missing.gguf"))
    assert str(caught.value) == (
        f"'{tmp_path}/missing.gguf': expected a Hugging Face directory, a GGUF file or a hub id such as "
        "org/name or org/name@revision, found nothing of that name here; check the spelling."
    )


def test_a_file_of_another_kind(tmp_path, monkeypatch):
    (tmp_path / "notes").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrecastError, match="found a file of another kind; check the spelling"):
        open_source("notes")


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}])
def test_offline_and_not_cached(tmp_path, environment):
    done = opened("org/name", tmp_path, **environment)
    assert done.stdout.splitlines() == [
        (
            "org/name: is missing from the local hub cache, or incomplete, and the hub cannot be reached; "
            "connect to the network (unset HF_HUB_OFFLINE if it is set), or name a directory or .gguf file."
        )
    ]
    assert "Traceback" not in done.stderr


def test_a_hub_that_never_answers_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = opened("org/name", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="1")
    assert "the hub cannot be reached" in done.stdout


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}])
@pytest.mark.parametrize("spec", ["org/My.Name", "org/My.Name@main", "org/My.Name@" + "a" * 40])
def test_a_cached_snapshot_needs_no_network(tmp_path, environment, spec):
    cache(tmp_path, "org/My.Name")
    assert opened(spec, tmp_path, **environment).stdout == "my.name\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GatedRepoError", "org/name: is gated; accept its terms on its page on the hub"),
        (
            "RepositoryNotFoundError",
            "org/name: there is no such directory or .gguf file, and the hub has no such model that you may read",
        ),
        ("RevisionNotFoundError", "org/name: has no revision 'v2' on the hub; check the spelling."),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
    ],
)
def test_the_hubs_own_errors(monkeypatch, name, expected):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = kind.__new__(kind)  # the constructors require an HTTP response

    def fail(*_, **__):
        raise error

    def not_cached(*_, local_files_only, **__):
        assert local_files_only
        raise errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_cached)
    with pytest.raises(PrecastError) as caught:
        open_source("org/name@v2")
    assert expected in str(caught.value)


def test_any_other_error_is_one_sentence(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise RuntimeError("the disk is full.\nand more\nlines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(PrecastError) as caught:
        open_source("org/name")
    assert str(caught.value) == (
        "org/name: cannot be fetched from the hub (RuntimeError: the disk is full); try again later."
    )


def test_neither_pickles_nor_code_are_asked_for(monkeypatch, tmp_path):
    import fnmatch

    import huggingface_hub

    asked = {}

    def note(repo, *, revision, allow_patterns, local_files_only):
        assert not local_files_only
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", note)
    with pytest.raises(PrecastError, match=r"expected config\.json"):
        open_source("org/name@v2")
    assert (asked["repo"], asked["revision"]) == ("org/name", "v2")

    def fetched(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in asked["patterns"])

    assert fetched("model-00001-of-00002.safetensors")
    texts = "added_tokens.json special_tokens_map.json tokenizer_config.json chat_template.jinja chat_template.json"
    assert all(map(fetched, [*texts.split(), "additional_chat_templates/tool_use.jinja"]))
    assert not any(
        map(fetched, ["pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "model.pt"])
    )


def test_a_package_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PrecastError) as caught:
        open_source("org/name")
    assert str(caught.value) == (
        "exporting needs the package huggingface_hub, which is not installed; run "
        "pip install 'precast[export]'."
    )


def test_importing_the_sources_is_cheap():
    code = "import sys, precast.exporter.sources.open\nprint(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "gguf",
        "transformers",
        "huggingface_hub",
        "safetensors",
        "tokenizers",
        "ml_dtypes",
        "yaml",
        "jax",
        "torch",
    }
    assert heavy.isdisjoint(loaded)
