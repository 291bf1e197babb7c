"""The command ``precast eval``: its output with each kind of reference, and its errors."""

import json
import math
import re

import numpy as np
import pytest

from precast.loaders.audit import evaluate as e

KEYS = ["artifact", "text", "window", "windows", "tokens", "perplexity", "reference"]
COMPARED = ["reference_perplexity", "kl_mean", "kl_p99", "top1"]
PROSE = "the quick brown fox jumps over the lazy dog. the cat sat on the mat. " * 12


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


@pytest.fixture
def record(cli):
    """Return a function that calls ``precast eval --json`` and parses the line."""

    def run(*arguments):
        result = cli("eval", *arguments, "--json")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        (line,) = result.stdout.splitlines()
        return json.loads(line)

    return run


@pytest.fixture
def refused(cli):
    """Return a function that calls ``precast eval``, which must fail, and returns the error."""

    def run(*arguments):
        result = cli("eval", *arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


@pytest.fixture
def unlike(artifact_copy, edit_manifest):
    """Return a function that copies the tiny artifact and edits its tokenizer."""
    import hashlib

    def make(change):
        file = artifact_copy / "tokenizer.json"
        value = json.loads(file.read_text())
        change(value)
        data = json.dumps(value).encode()
        file.write_bytes(data)
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edit_manifest(artifact_copy, lambda manifest: manifest["files"].update({"tokenizer.json": entry}))
        return artifact_copy

    return make


# --- without a reference ------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_uncached_model(record, text, tiny_artifact, tiny_model, reference):
    found = record(tiny_artifact, "--text", text)
    assert list(found) == KEYS + COMPARED
    assert found["artifact"] == "tiny"
    assert found["text"] == "prose.txt"
    ids = tiny_model.tokenizer.encode(PROSE)
    count = len(ids) // 64
    assert (found["window"], found["windows"], found["tokens"]) == (64, count, count * 32)
    losses = []
    for i in range(count):
        window = ids[i * 64 : (i + 1) * 64]
        p = np.exp(reference(window).astype(float))
        p /= p.sum(1, keepdims=True)
        losses += [-math.log(p[at - 1, window[at]]) for at in range(32, 64)]
    assert found["perplexity"] == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-4)
    assert [found[key] for key in ("reference", *COMPARED)] == [None] * 5


def test_the_shipped_text_is_the_default(record, tiny_artifact):
    found = record(tiny_artifact, "--tokens", "130")
    assert (found["text"], found["windows"], found["tokens"]) == ("persuasion.txt", 2, 64)


def test_the_options_tokens_and_window(record, tiny_artifact, text):
    found = record(tiny_artifact, "--text", text, "--tokens", "100", "--window", "16")
    assert (found["window"], found["windows"], found["tokens"]) == (16, 6, 48)


def test_the_text_for_people_has_perplexity_alone(cli, record, tiny_artifact, text):
    found = record(tiny_artifact, "--text", text, "--tokens", "64")
    result = cli("eval", tiny_artifact, "--text", text, "--tokens", "64")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout == (
        "tiny on prose.txt: 32 predictions in 1 window of 64\n"
        f"  perplexity            {found['perplexity']:.4f}\n"
    )


def test_jax_is_not_imported_without_a_source(python, tiny_artifact, text):
    program = (
        "import sys\nfrom precast.cli import main\n"
        f"main(['eval', {str(tiny_artifact)!r}, '--text', {str(text)!r}, '--tokens', '64', '--reference',"
        f" {str(tiny_artifact)!r}], standalone_mode=False)\n"
        "assert sys.modules.get('jax') is None and 'rich' not in sys.modules"
    )
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    assert "100.00%" in result.stdout


# --- with one -----------------------------------------------------------------------------------------------


def test_an_artifact_agrees_with_itself(record, tiny_artifact, text):
    found = record(tiny_artifact, "--text", text, "--reference", tiny_artifact)
    assert found["reference"] == "tiny"
    assert found["reference_perplexity"] == found["perplexity"]
    assert (found["kl_mean"], found["kl_p99"], found["top1"]) == (0.0, 0.0, 1.0)


def test_an_artifact_agrees_with_its_source_to_rounding(record, tiny_artifact, tiny_checkpoint, text):
    found = record(tiny_artifact, "--text", text, "--reference", tiny_checkpoint())
    assert found["reference"] == "checkpoint"
    assert found["reference_perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    assert 0 <= found["kl_mean"] <= found["kl_p99"] < 1e-6
    assert found["top1"] == 1


def test_another_artifact_differs(cli, record, tiny_artifact, depths, text):
    found = record(tiny_artifact, "--text", text, "--reference", depths[2])
    assert found["kl_p99"] > found["kl_mean"] > 0.1
    assert found["top1"] < 0.9
    back = record(depths[2], "--text", text, "--reference", tiny_artifact)
    assert (back["perplexity"], back["top1"]) == (found["reference_perplexity"], found["top1"])
    assert back["kl_mean"] != found["kl_mean"]
    lines = cli("eval", tiny_artifact, "--text", text, "--reference", depths[2]).stdout.splitlines()
    assert lines[1:] == [
        f"  perplexity            {found['perplexity']:.4f}",
        f"  reference perplexity  {found['reference_perplexity']:.4f}  (tiny)",
        f"  KL divergence         {found['kl_mean']:.3g} nats per token, 99th percentile {found['kl_p99']:.3g}",
        f"  top-1 agreement       {found['top1']:.2%}",
    ]


def test_several_slots_and_one_measure_the_same(record, slots_artifact, tiny_artifact, text):
    found = record(slots_artifact, "--text", text, "--reference", tiny_artifact)
    assert found["kl_p99"] < 1e-6
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-5)


def test_the_shorter_context_is_the_window(record, tiny_artifact, export_tiny, text):
    short = export_tiny(context=48, targets=("cpu",))
    assert record(tiny_artifact, "--text", text, "--reference", short)["window"] == 48
    assert record(short, "--text", text, "--reference", tiny_artifact)["window"] == 48


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected some text, found none; name another file."),
        (b" \n\t ", "expected some text, found none; name another file."),
        (b"\x89PNG\r\n\x1a\n", "expected text in UTF-8, found other bytes; convert it first."),
        (b"abc\0def", "expected text, found NUL bytes; name a text file."),
        ("caf\u00e9".encode("latin-1"), "expected text in UTF-8, found other bytes; convert it first."),
    ],
)
def test_files_that_are_not_text_are_refused(refused, tiny_artifact, tmp_path, content, expected):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert refused(tiny_artifact, "--text", path) == f"{path}: {expected}"


def test_a_missing_text_is_refused(refused, tiny_artifact, tmp_path):
    path = tmp_path / "nothing"
    expected = f"{path}: expected a text file, but it does not exist; check the spelling."
    assert refused(tiny_artifact, "--text", path) == expected
    assert str(tmp_path) in refused(tiny_artifact, "--text", tmp_path)
    assert refused(tiny_artifact, "--text", "x" * 500)


def test_a_text_too_short(refused, tiny_artifact, tmp_path, text):
    path = tmp_path / "text"
    path.write_text("the cat")
    line = refused(tiny_artifact, "--text", path)
    assert re.fullmatch(
        re.escape(f"{path}: ") + r"expected at least 64 tokens \(enough for one window\), found \d;"
        r" give a longer text, a larger --tokens or a smaller --window\.",
        line,
    )
    assert "expected at least 32 tokens (enough for one window), found 20;" in refused(
        tiny_artifact, "--text", text, "--tokens", "20", "--window", "32"
    )


@pytest.mark.parametrize("window", ["65", "7", "0", "-3"])
def test_a_window_that_does_not_fit(refused, tiny_artifact, window):
    assert refused(tiny_artifact, "--window", window) == (
        f"--window: expected 8 to 64 (the context of tiny), found {window}."
    )


def test_a_window_that_does_not_fit_the_reference(refused, tiny_artifact, export_tiny):
    short = export_tiny(context=48, targets=("cpu",))
    assert "--window: expected 8 to 48 (the context of tiny), found 64." in refused(
        tiny_artifact, "--window", "64", "--reference", short
    )


@pytest.mark.parametrize("tokens", ["0", "-1", "10000001", "9" * 30])
def test_an_impossible_number_of_tokens_is_refused(refused, tiny_artifact, tokens):
    line = refused(tiny_artifact, "--tokens", tokens)
    assert line == f"--tokens: expected 1 to 10000000, found {tokens}."


def test_a_missing_artifact_is_refused(refused, tmp_path, tiny_artifact):
    missing = tmp_path / "nothing"
    assert refused(missing) == (
        f"{missing}: expected the folder of an artifact, but it does not exist; make an artifact with precast"
        " export, or check the path."
    )
    for reference in (missing, "x" * 500):
        assert refused(tiny_artifact, "--reference", reference) == (
            "--reference: expected an artifact, a Hugging Face directory or a .gguf file, but"
            f" {reference} does not exist; check the path."
        )


def test_a_reference_that_is_neither_artifact_nor_source(refused, tmp_path, tiny_artifact, text):
    (tmp_path / "empty").mkdir()
    assert "expected the folder of an artifact, but it contains no manifest.json" in refused(
        tiny_artifact, "--reference", tmp_path / "empty"
    )
    assert "found a file of another kind" in refused(tiny_artifact, "--reference", text)


def test_a_reference_with_another_vocabulary(refused, tiny_artifact, unlike):
    def shrink(value):
        value["added_tokens"] = value["added_tokens"][:-1]
        del value["model"]["vocab"]["<|im_end|>"]

    other = unlike(shrink)
    line = refused(tiny_artifact, "--reference", other)
    assert re.fullmatch(
        r"tiny: has \d+ tokens in its tokenizer, but tiny has \d+;"
        r" compare models with the same tokenizer\.",
        line,
    )


def test_a_reference_with_other_merges(refused, tiny_artifact, unlike):
    def forget(value):
        value["model"]["merges"] = []

    assert refused(tiny_artifact, "--reference", unlike(forget)) == (
        "tiny: its tokenizer splits the text differently from the tokenizer of tiny; compare models with"
        " the same tokenizer."
    )


def test_a_reference_with_other_logits(refused, tiny_artifact, tiny_source, export_tiny):
    wider = export_tiny(tiny_source(config={"vocab_size": 336}), targets=("cpu",))
    assert "tiny: has 336 logits, but tiny has 320;" in refused(tiny_artifact, "--reference", wider)


def test_a_source_is_refused_where_jax_is_missing(refused, tiny_artifact, tiny_checkpoint, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else find(name))
    assert refused(tiny_artifact, "--reference", tiny_checkpoint()) == (
        "a reference that is not an artifact needs jax, which is not installed: pip install 'precast[export]'"
    )


def test_the_method_is_in_the_help(cli):
    said = " ".join(cli("eval", "--help").stdout.split())
    for words in (
        "KL(reference || artifact)",
        "first half of each window is prefilled",
        "at least 64 tokens",
    ):
        assert words in said
    assert str(e.DEFAULT_TOKENS) in said


# --- progress -----------------------------------------------------------------------------------------------


def test_progress_is_a_line_on_a_terminal(cli, tiny_artifact, text, terminal, own_cache):
    options = ("--text", text, "--tokens", "64", "--window", "32")
    quiet = cli("eval", tiny_artifact, *options)
    assert quiet.exit_code == 0
    shown = terminal.getvalue().split("\r\x1b[K")
    assert shown[1].startswith("hashing: 0.")
    assert shown[2] == "loading cache …"
    first = shown.index("scoring: 0 of 32 predictions")
    assert shown[first + 1] == "scoring: 1 of 32 predictions"
    assert shown[-2:] == ["scoring: 32 of 32 predictions", ""]
    terminal.truncate(0)
    assert cli("eval", tiny_artifact, *options, "--reference", tiny_artifact).exit_code == 0
    assert "reading the reference …" in terminal.getvalue()
