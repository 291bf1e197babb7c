"""The commands ``precast export`` and ``precast inspect``."""

import json
import re
import shutil
import sys

PROMPT = "7,200,31"


def test_export_then_run(cli, record, tiny_checkpoint, tmp_path, answer, monkeypatch):
    """Export a Hugging Face directory to the default folder."""
    source = tiny_checkpoint()
    monkeypatch.chdir(tmp_path)
    result = cli("export", source, "--buckets", "16,8", "--context", "64", "--weights", "float32")
    assert result.exit_code == 0, result.output
    output = tmp_path / "artifacts" / "checkpoint-float32"
    assert "answers checked against the reference" in result.stdout
    assert "prefill_16" in result.stdout
    assert record(output, "--ids", PROMPT, "--ignore-eos")["token_ids"] == list(answer.token_ids)
    before = (output / "manifest.json").read_bytes()
    assert cli("export", source, "--buckets", "8", "--context", "64", "--weights", "float32").exit_code == 2
    assert (output / "manifest.json").read_bytes() == before


def test_weights_are_int8_by_default(cli, record, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts" / "checkpoint-int8").mkdir(parents=True)  # an export may write to an empty folder
    result = cli("export", tiny_checkpoint(), "--buckets", "8", "--context", "64")
    assert result.exit_code == 0, result.output
    output = tmp_path / "artifacts" / "checkpoint-int8"
    assert len(record(output, "--ids", PROMPT, "--ignore-eos", "-n", "4")["token_ids"]) == 4
    shown = cli("inspect", output).stdout
    assert re.search(r"weights int8 \(\d+(\.\d+)? bits each\)", shown)
    assert "bfloat16" in shown
    assert "KL divergence" in shown


def test_inspect_shows_the_facts(cli, tiny_artifact):
    result = cli("inspect", tiny_artifact)
    assert result.exit_code == 0
    for fact in (
        "tiny",
        "llama",
        "64 positions",
        "prefill buckets 8, 16",
        "decode",
        "L=3",
        "runs on ",
        "jaxlib",
    ):
        assert fact in result.stdout
    assert cli("inspect", tiny_artifact.parent).stdout == result.stdout


def test_inspect_as_json_agrees_with_the_manifest(cli, tiny_artifact):
    facts = json.loads(cli("inspect", tiny_artifact, "--json").stdout)
    manifest = json.loads((tiny_artifact / "manifest.json").read_text())
    assert facts["model"] == manifest["model"]
    assert (facts["context"], facts["slots"], facts["buckets"]) == (64, 8, [8, 16])
    assert (
        facts["cache"]["bytes"] == sum(a["bytes"] for a in manifest["cache"]) == 2 * 3 * 8 * 2 * 64 * 12 * 4
    )
    assert facts["bytes"] == sum(
        p.stat().st_size for p in tiny_artifact.rglob("*") if p.is_file() and p.name != "manifest.json"
    )
    target = facts["targets"][0]
    assert [p["name"] for p in target["programs"]] == ["cache", "prefill_8", "prefill_16", "decode", "score"]
    for program in target["programs"]:
        path = tiny_artifact / "programs" / "cpu" / f"{program['name']}.xla"
        assert program["executable_bytes"] == path.stat().st_size
    assert facts["provenance"]["versions"]["jaxlib"] == target["jaxlib"]


def test_inspect_reads_nothing_but_the_manifest(cli, tmp_path, tiny_artifact):
    """It can therefore also describe artifacts that do not run here."""
    shutil.copy(tiny_artifact / "manifest.json", tmp_path)
    assert cli("inspect", tmp_path).exit_code == 0
    assert sys.modules.get("jax") is not None  # the process of the tests keeps jax
