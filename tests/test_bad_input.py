"""Bad input on the command line: one line with a remedy, exit code 2, and no half-written output."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

VOCAB, CAPACITY = 320, 64


@pytest.fixture
def refused(cli):
    """Return a function that runs a command, which must fail, and returns the error."""

    def run(*arguments, stdin="") -> str:
        result = cli(*arguments, stdin=stdin)
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output
        lines = result.stderr.splitlines()
        assert [line.startswith("error: ") for line in lines].count(True) == 1
        assert lines[-1].startswith("error: ")
        assert result.stdout == ""
        return lines[-1].removeprefix("error: ")

    return run


# --- export -------------------------------------------------------------------------------------------------


@pytest.fixture
def export_refused(refused, tmp_path):
    """Return a function like `refused` for an export, which must leave no output."""
    parent = tmp_path / "output"

    def run(source, *options) -> str:
        text = refused(
            "export",
            source,
            "-o",
            parent / "artifact",
            "--buckets",
            "8",
            "--context",
            "64",
            "--weights",
            "float32",
            *options,
        )
        assert not parent.exists() or os.listdir(parent) == []
        return text

    return run


def test_a_source_that_is_missing_or_empty(export_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "model.zip").write_bytes(b"PK")
    expected = {
        "no/such/folder/anywhere": "expected a Hugging Face directory, a GGUF file or a hub id",
        "missing.gguf": "expected a Hugging Face directory, a GGUF file or a hub id",
        str(tmp_path / "model.zip"): "found a file of another kind",
        str(
            tmp_path / "empty"
        ): "expected config.json, found an empty directory; name a Hugging Face model directory",
        str(tmp_path / "empty.gguf"): "empty.gguf",
        "[/no] [bold]markup": "'[/no] [bold]markup': expected",
        "line\nbreak/of/a": "expected a Hugging Face directory",
        "x" * 5000: "",
    }
    for source, text in expected.items():
        assert text in export_refused(source)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"model_type": "mamba"},
            "qwen3_moe, smollm3, found 'mamba'.",
        ),
        (
            {"model_type": None},
            "qwen3_moe, smollm3, found None.",
        ),
        ({"model_type": ["llama"]}, "qwen3_moe, smollm3, found ['llama']."),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"hidden_size": "48"}, "'hidden_size' is '48', expected a whole number above 0."),
        ({"hidden_act": "relu"}, "'hidden_act' is 'relu', expected one of"),
        ({"num_key_value_heads": 3}, "expected num_attention_heads to be a multiple of num_key_value_heads"),
        (
            {"sliding_window_pattern": 3},
            "'sliding_window_pattern' may change the model's maths and is not understood",
        ),
        (
            {"rope_scaling": {"rope_type": "spiral"}},
            "expected the RoPE type to be one of default",
        ),
        (
            {"auto_map": {}},
            "auto_map names Python code in the checkpoint, and precast never runs such code; use a checkpoint",
        ),
    ],
)
def test_a_source_whose_config_is_not_supported(export_refused, tiny_checkpoint, config, text):
    folder = tiny_checkpoint()
    merged = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    assert text in export_refused(folder)


NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({NAME: None}, f"tensor '{NAME}' is missing; use the config and the weights of the same model."),
        (
            {NAME: np.zeros((48, 81), np.float32)},
            f"'{NAME}' has shape [48, 81], but the config requires [48, 80]; use the config and the weights",
        ),
        (
            {NAME: np.zeros((80, 48), np.float32)},
            f"'{NAME}' has shape [80, 48], but the config requires [48, 80]; use the config and the weights",
        ),
        (
            {"model.layers.3.mlp.down_proj.weight": np.zeros((48, 80), np.float32)},
            "tensor 'model.layers.3.mlp.down_proj.weight' belongs to no parameter of the model; use the",
        ),
        (
            {NAME: np.full((48, 80), np.nan, np.float32)},
            f"{NAME}: the tensor contains values that are not finite",
        ),
        (
            {"lm_head.weight": None},
            "lm_head.weight is missing, and config.json does not tie the output head to the embedding;",
        ),
        (
            {NAME: np.zeros((48, 80), np.int32)},
            f"expected {NAME} to be F32, F16 or BF16, found I32",
        ),
    ],
)
def test_tensors_that_are_wrong_or_missing(export_refused, tiny_checkpoint, tensors, text):
    assert text in export_refused(tiny_checkpoint(tensors=tensors))


def test_a_truncated_weight_file(export_refused, tiny_checkpoint):
    path = tiny_checkpoint() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: is not a complete safetensors file" in export_refused(path.parent)


def test_a_tokenizer_larger_than_the_vocabulary(export_refused, tiny_checkpoint):
    folder = tiny_checkpoint(config={"vocab_size": 200})
    assert (
        "the tokenizer has ids up to 299, not counting added tokens, but the model embeds only 200 tokens; use the"
        in export_refused(folder)
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--buckets", "0"], "--buckets: expected prompt lengths of 1 or more, found 0."),
        (["--buckets", "8,-4"], "--buckets: expected prompt lengths of 1 or more, found -4."),
        (["--buckets=-4"], "--buckets: expected prompt lengths of 1 or more, found -4."),
        (["--buckets", "8,16,8"], "--buckets: 8 is given twice; give each length once."),
        (
            ["--buckets", "8,65"],
            "--buckets: 65 is larger than the context of 64; leave it out or raise --context.",
        ),
        (["--context", "129"], "--context: expected 2 to 128 (the model's own limit), found 129."),
        (["--context", "1"], "--context: expected 2 or more, found 1."),
        (["--context", "-5"], "--context: expected 2 or more, found -5."),
        (["--slots", "0"], "--slots: expected 1 to 256, found 0."),
        (["--slots", "-1"], "--slots: expected 1 to 256, found -1."),
        (["--slots", "257"], "--slots: expected 1 to 256, found 257."),
        (
            ["--weights", "int3"],
            "--weights: expected one of float32, bfloat16, int8, int4, source, found 'int3'.",
        ),
        (["--calibrate", "text"], "--calibrate: expected --weights int4 or --bits, found --weights float32;"),
        (["--weights", "int4", "--calibrate", "none"], "none: expected a text file, but it does not exist"),
    ],
)
def test_impossible_options(export_refused, tiny_checkpoint, options, text):
    assert text in export_refused(tiny_checkpoint(), *options)


def test_an_output_that_exists(refused, tiny_checkpoint, tmp_path, tiny_artifact):
    source = tiny_checkpoint()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("mine")
    shutil.copytree(tiny_artifact, tmp_path / "artifact")
    options = ("--buckets", "8", "--context", "64")
    for name in ("file", "folder", "artifact"):
        text = refused("export", source, "-o", tmp_path / name, *options)
        assert text == (
            f"{tmp_path / name}: exists already; choose another folder with -o, or replace it with --overwrite."
        )
    for name in ("file", "folder"):
        text = refused("export", source, "-o", tmp_path / name, *options, "--overwrite")
        assert text.endswith(
            "exists and is not an artifact, so --overwrite does not replace it; remove it yourself."
        )
    assert "cannot be created" in refused("export", source, "-o", tmp_path / "file" / "below", *options)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "thesis").read_text() == "mine"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("place", ["weights", "tokenizer", "at the very end"])
def test_a_disk_that_is_full(export_refused, tiny_checkpoint, monkeypatch, place):
    source = tiny_checkpoint()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "weights":
        monkeypatch.setattr("precast.loaders.artifact.weights._write_pieces", full)
    elif place == "tokenizer":
        write = Path.write_bytes
        # Do not fail at the marker of the temporary folder, which is written first.
        monkeypatch.setattr(
            Path,
            "write_bytes",
            lambda path, data: (full if path.name == "tokenizer.json" else write)(path, data),
        )
    else:
        monkeypatch.setattr(os, "fsync", full)
    text = export_refused(source)
    assert text.endswith(
        ": writing stopped (No space left on device), and the unfinished folder was removed; free some space on the"
        " disk, or choose another folder with -o."
    )


def test_missing_packages_for_an_export(refused, monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    hidden = lambda name, *rest: None if name in ("jax", "rich") else original(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    text = refused("export", "anything")
    assert text == "exporting needs jax, rich, which are not installed: pip install 'precast[export]'"


# --- run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["-p", ""], "prompt: expected at least one token, found none; give the model some text."),
        ([], "prompt: expected at least one token, found none; give the model some text."),
        (["--chat", "-p", " \n"], "prompt: expected some text, found none; give it with -p or pipe it in."),
        (
            ["-p", "fox " * 200],
            f"tokens leave no room in a context of {CAPACITY}; shorten it to {CAPACITY - 1}",
        ),
        (["--ids", ",".join("5" * CAPACITY)], "prompt: 64 tokens leave no room in a context of 64"),
        (
            ["--ids", f"1,{VOCAB}"],
            f"prompt: expected token ids from 0 to {VOCAB - 1}, found {VOCAB} at index 1.",
        ),
        (["--ids", "-1"], f"prompt: expected token ids from 0 to {VOCAB - 1}, found -1 at index 0."),
        (
            ["--ids", str(2**40)],
            f"prompt: expected token ids from 0 to {VOCAB - 1}, found {2**40} at index 0.",
        ),
        (["-p", "a", "--ids", "1"], "--prompt and --ids cannot be combined; give one of them."),
        (
            ["--chat", "--ids", "1"],
            "--chat needs text to format with the chat template; use --prompt instead",
        ),
        (
            ["--system", "be brief", "--ids", "1"],
            "--system needs text to format with the chat template; use --prompt instead",
        ),
        (
            ["-p", "a", "--target", "gpu"],
            "target 'gpu' is not in the artifact; name one of its targets: 'cpu-",
        ),
        (
            ["-p", "a", "--target", "portable"],
            "target 'portable': it must be compiled first (--compile does so)",
        ),
        (["-p", "a", "-n", "0"], "max_tokens must be an integer from 1 to 2^63 - 1, found 0."),
        (
            ["-p", "a", "--temperature", "-1"],
            "temperature must be a finite number of at least 0, found -1.0.",
        ),
        (
            ["-p", "a", "--temperature", "nan"],
            "temperature must be a finite number of at least 0, found nan.",
        ),
        (["-p", "a", "--top-p", "2"], "top_p must be a finite number between 0 and 1, found 2.0."),
        (["-p", "a", "--top-k", "-1"], "top_k must be an integer from 0 to 2^63 - 1, found -1."),
        (["-p", "a", "--seed", "-1"], "seed must be an integer from 0 to 2^128 - 1, found -1."),
        (["-p", "a", "--repetition-penalty", "0"], "repetition_penalty must be greater than 0, found 0."),
        (["-p", "a", "--stop", ""], "stop must be a list of non-empty strings"),
    ],
)
def test_requests_that_cannot_be_answered(refused, tiny_artifact, options, text):
    assert text in refused("run", tiny_artifact, *options)
    assert text in refused("run", tiny_artifact, *options, "--json")


def test_a_prompt_that_is_not_text(refused, tiny_artifact):
    assert (
        "standard input: expected a prompt in utf-8, found other bytes; convert the text first."
        in refused("run", tiny_artifact, stdin=b"\xff\xfe")
    )


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_paths_that_hold_no_artifact_or_several(refused, tmp_path, command):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        (tmp_path / "two" / name / "manifest.json").write_text("{}")
    options = ["-p", "x"] if command == "run" else []
    remedy = "make an artifact with precast export, or check the path."
    for name, text in {
        "nowhere": f"expected the folder of an artifact, but it does not exist; {remedy}",
        "x" * 500: f"expected the folder of an artifact, but it does not exist; {remedy}",
        "file": f"expected the folder of an artifact, but it is a file; {remedy}",
        "empty": f"expected the folder of an artifact, but it contains no manifest.json; {remedy}",
        "two": "expected one artifact, found 2 (a, b); name one of them.",
    }.items():
        assert refused(command, tmp_path / name, *options) == f"{tmp_path / name}: {text}"


def test_a_message_is_one_line_whatever_it_quotes(refused, tmp_path):
    text = refused("run", tmp_path / "two\nlines", "-p", "x")
    assert text.startswith(f"{tmp_path}/two lines: expected the folder of an artifact")


def set_key(*path_and_value):
    *path, last, value = path_and_value

    def change(manifest):
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_key("rope", 1), "manifest.json: key 'rope' is not known to this format version;"),
        (
            set_key("model", "scale", 2),
            "manifest.json: model: key 'scale' is not known to this format version;",
        ),
        (
            set_key("format_version", 8),
            "expected format version 4 to 7, found 8; update precast.",
        ),
        (
            set_key("format_version", 0),
            "expected format version 4 to 7, found 0; export the model again.",
        ),
        (
            set_key("capacity", "64"),
            "manifest.json: capacity: expected a whole number, found '64'; export the model again.",
        ),
        (
            set_key("capacity", 128),
            "cache 'cache.keys': expected 128 to 128 positions, found 64; export the model again.",
        ),
        (set_key("targets", []), "expected at least one target, found none; export the model again."),
    ],
)
def test_manifests_that_are_not_understood(refused, artifact_copy, edit_manifest, change, text):
    edit_manifest(artifact_copy, change)
    assert text in refused("run", artifact_copy, "-p", "x")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"a": NaN}'])
def test_manifests_that_are_not_json(refused, artifact_copy, data):
    (artifact_copy / "manifest.json").write_bytes(data)
    for command in (("run", artifact_copy, "-p", "x"), ("inspect", artifact_copy)):
        assert refused(*command).startswith(f"{artifact_copy / 'manifest.json'}: ")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"jaxlib": "0.9.0"}, r"it was compiled by jaxlib 0\.9\.0, but [\d.]+ is installed"),
        ({"machine": "s390x"}, r"it was compiled for s390x, but this machine is \w+"),
        ({"cpu_features": ["avx1024"]}, r"it uses CPU features that this machine lacks \(avx1024\)"),
        ({"kernel_abi": 99}, r"it calls kernels of ABI 99, but ABI \d+ is installed"),
        ({"platform": "rocm"}, r"it needs platform rocm, but this loader supports only cpu and cuda"),
    ],
)
def test_artifacts_of_another_machine(refused, artifact_copy, edit_manifest, change, text):
    edit_manifest(artifact_copy, lambda manifest: manifest["targets"][0].update(change))
    message = refused("run", artifact_copy, "-p", "x")
    assert re.search(
        f"no target runs here: target 'cpu-[^']+': {text}; target 'portable': it must be compiled", message
    )


@pytest.mark.parametrize("name", ["weights.safetensors", "programs/cpu/decode.xla", "tokenizer.json"])
def test_files_that_are_truncated_or_altered_or_gone(refused, artifact_copy, own_cache, name):
    path = artifact_copy / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    text = f"{artifact_copy}: file {name!r} has {len(data) - 1} bytes, expected {len(data)}; it has been truncated"
    assert text in refused("run", artifact_copy, "-p", "x")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert f"{artifact_copy}: file {name!r} has sha256 " in refused("run", artifact_copy, "-p", "x")
    path.unlink()
    assert f"{artifact_copy}: file {name!r} is missing; copy" in refused("run", artifact_copy, "-p", "x")


def test_errors_of_the_system_are_one_line(refused, tiny_artifact, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "/some/file")

    monkeypatch.setattr("precast.loaders.load.map_weights", refuse)
    assert (
        refused("run", tiny_artifact, "-p", "x")
        == "/some/file: Permission denied; check the path and its disk."
    )


def test_a_real_process_says_the_same(tiny_artifact, python, tmp_path):
    for arguments, text in (
        (
            ["run", str(tmp_path), "-p", "x"],
            "expected the folder of an artifact, but it contains no manifest.json",
        ),
        (
            ["run", str(tiny_artifact), "--ids", "999"],
            "prompt: expected token ids from 0 to 319, found 999 at index 0.",
        ),
        (["inspect", str(tmp_path / "none")], "expected the folder of an artifact, but it does not exist"),
    ):
        result = python("cli.py", *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert text in line
