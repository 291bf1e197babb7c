"""Standard error shows only precast's own messages and XLA's errors, without XLA's notes about CPUs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from precast.loaders.artifact.machine import CODEGEN_FEATURES, cpu_features, processor_family
from precast.loaders.compiling import isa
from precast.loaders.locate import read_manifest

PROMPT = ("--ids", "7,200,31", "-n", "2")
# Messages of working commands, one line each.
OWN = re.compile(
    r"reading .*|writing weights|lowering target \w+|compiling target cpu for .*"
    r"|  \w+ +lowered [0-9.]+ s(, compiled [0-9.]+ s)?, [0-9.]+ kB|checking answers .*"
    r"|skipping native: its executables need x86-64-v\d, and that target exists already"
    r"|[a-z ]+: [0-9.,]+ of [0-9.,]+ \w+.*|measuring fidelity .*|compiling \w+ from StableHLO.*|checking its answers .*"
)


@pytest.fixture(scope="module")
def said(python, tmp_path_factory) -> Callable[..., str]:
    """Return a function that runs a command in a new process, and returns its standard error.

    The cache folder differs from that of the export, so each artifact counts as made on another machine, and its first
    load includes a trial.
    """
    caches = {"export": str(tmp_path_factory.mktemp("maker"))}
    other = str(tmp_path_factory.mktemp("user"))

    def run(command: str, *arguments: object, code: int = 0) -> str:
        cache = {"PRECAST_CACHE": caches.get(command, other)}
        result = python("cli.py", command, *map(str, arguments), env=cache)
        assert result.returncode == code, result.stderr
        return result.stderr

    return run


@pytest.fixture(scope="module")
def exported(said, tmp_path_factory, tiny_source) -> tuple[Path, str]:
    """Export a native artifact; return it with the export's messages."""
    from safetensors.numpy import save_file

    source, folder = tiny_source(), tmp_path_factory.mktemp("source")
    save_file({name: t.read() for name, t in source.tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(source.config))
    (folder / "tokenizer.json").write_bytes(source.tokenizer_json)
    artifact = folder / "artifact"
    sizes = ("--buckets", "8", "--context", "64", "--cpu-isa", "native")
    return artifact, said("export", folder, "-o", artifact, *sizes)


def is_own(text: str) -> bool:
    return all(OWN.fullmatch(line) for line in text.splitlines() if line)


def test_every_command_speaks_for_itself(said, exported):
    artifact, text = exported
    assert text
    assert is_own(text), text
    for command in (
        ("run", artifact, *PROMPT, "--json"),
        ("check", artifact),
        ("inspect", artifact),
        ("verify", artifact),
        ("diff", artifact, artifact),
    ):
        assert said(*command) == ""
    assert is_own(said("eval", artifact, "--tokens", "64", "--json"))
    added = said("add-target", artifact, "--target", "portable")
    assert added
    assert is_own(added), added
    assert said("run", artifact, *PROMPT, "--target", "cuda", code=2).startswith("error: ")


def test_signing_is_silent(said, exported, tmp_path):
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    key = ec.generate_private_key(ec.SECP256R1())
    file = tmp_path / "private.pem"
    file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    assert said("sign", exported[0], "--key", file) == ""


LOAD = """
import sys
from pathlib import Path
from precast.loaders.runtime import pjrt
pjrt.client().load(Path(sys.argv[1]).read_bytes(), (), "x")
"""


@pytest.fixture
def loaded(python, tmp_path) -> Callable[[bytes], str]:
    """Return the output of XLA's loader about an executable."""

    def load(executable: bytes) -> str:
        (tmp_path / "x.xla").write_bytes(executable)
        result = python("-c", LOAD, str(tmp_path / "x.xla"))
        assert result.returncode == 0, result.stderr
        return result.stderr

    return load


def features(executable: bytes) -> bytes:
    (found,) = set(re.findall(rb"(?:[+-][a-z0-9._-]+,){4,}[+-][a-z0-9._-]+", executable))
    assert isinstance(found, bytes)
    return found


@pytest.mark.skipif(processor_family() != "x86_64", reason="levels are those of x86-64")
def test_an_executable_of_another_cpu_is_loaded_without_a_word(loaded, tiny_artifact):
    """XLA with AVX-512 writes such lists, with tuning features and with features that this machine lacks."""
    target = read_manifest(tiny_artifact).targets[0]
    data = (tiny_artifact / target.programs[-1].executable).read_bytes()
    stated = features(data)
    assert loaded(data) == ""
    # A placeholder of the same length for features that this machine lacks.
    names = stated.split(b",")
    lacked = CODEGEN_FEATURES - set(cpu_features())
    absent = [n for n in names if n.startswith(b"-") and n[1:].decode() in lacked - {"avx512f"}][:6]
    assert absent
    other = stated
    for name in absent:
        other = other.replace(name + b",", b"+" + name[1:] + b",")
    other = other.replace(b"-avx512f,", b"+avx512f,")
    assert len(other) == len(stated)
    assert other != stated
    wide = data.replace(stated, other)
    # XLA's errors are shown.
    assert "is not  supported on the host machine" in loaded(wide)
    assert loaded(isa.declare_features(wide, target.cpu_features)) == ""
    tuned = isa.declare_features(wide, (*target.cpu_features, *isa.LEVELS["x86-64-v4"].features))
    assert b"+avx512" not in features(tuned)
