"""``precast diff``: the differences between two artifacts, by section."""

import json
import shutil
from contextlib import nullcontext
from hashlib import sha256

import pytest

from precast.loaders.audit.diff import ABSENT, diff
from precast.loaders.locate import read_manifest
from precast.loaders.progress import Step


@pytest.fixture
def compare(tiny_artifact):
    """Return a function that compares with another artifact, and returns each section's changes by name."""

    def run(other):
        found = diff(tiny_artifact, read_manifest(tiny_artifact), other, read_manifest(other))
        return {
            section: {c.what: (c.before, c.after) for c in changes}
            for section, changes in found.items()
            if changes
        }

    return run


def relist(root, name, edit_manifest):
    data = (root / name).read_bytes()
    entry = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    edit_manifest(root, lambda m: m["files"].update({name: entry}))


def test_an_artifact_and_its_copy_are_the_same(cli, tiny_artifact, artifact_copy):
    result = cli("diff", tiny_artifact, artifact_copy)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{tiny_artifact} and {artifact_copy} are the same\n"
    found = json.loads(cli("diff", tiny_artifact, artifact_copy, "--json").stdout)
    assert found["same"] is True
    assert set(found["sections"]) >= {"weights", "model", "targets", "tokenizer", "versions"}
    assert not any(found["sections"].values())


def test_one_byte_of_one_tensor_differs(compare, artifact_copy, edit_manifest):
    path = artifact_copy / "weights.safetensors"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin, _ = header["model.norm.weight"]["data_offsets"]
    data[8 + int.from_bytes(data[:8], "little") + begin + 5] ^= 1
    path.write_bytes(data)
    relist(artifact_copy, "weights.safetensors", edit_manifest)
    assert compare(artifact_copy) == {
        "weights": {"model.norm.weight": ("float32 [1, 48]", "1 of 192 bytes differ")}
    }


def test_progress_is_told_and_shown_on_a_terminal(
    cli, tiny_artifact, artifact_copy, edit_manifest, monkeypatch
):
    from precast.loaders.console import diff as diff_console

    path = artifact_copy / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    relist(artifact_copy, "weights.safetensors", edit_manifest)
    told: list[Step] = []
    shown: list[Step] = []
    a, b = read_manifest(tiny_artifact), read_manifest(artifact_copy)
    diff(tiny_artifact, a, artifact_copy, b, told.append)
    done = [step.done for step in told]
    assert done == sorted(done)
    assert {step.total for step in told} == {done[-1]}
    monkeypatch.setattr(diff_console, "show_progress", lambda: nullcontext(shown.append))
    cli("diff", tiny_artifact, artifact_copy)
    assert shown == told
    assert {(step.text, step.unit) for step in shown} == {("comparing weights", "bytes")}


def test_other_weights_and_another_geometry(cli, tiny_artifact, export_tiny):
    other = export_tiny(weights="int8", buckets=(8,), context=32, targets=("cpu",))
    result = cli("diff", tiny_artifact, other)
    assert (result.exit_code, result.stderr) == (1, "")
    shown = result.stdout.splitlines()
    assert shown[0] == f"{tiny_artifact} → {other}"
    for line in (
        "    ~ model.embed_tokens.weight: float32 [320, 48] → int8 [1, 20, 32, 16, 2]",
        "    + lm_head.weight.scale: float16 [1, 20, 2, 16]",
        "    ~ weights: float32 → int8",
        "    ~ context: 64 → 32",
        "    ~ buckets: -16",
        "    ~ cache.keys dtype: float32 → bfloat16",
    ):
        assert line in shown
    assert any(line.startswith("    - portable: stablehlo, ") for line in shown)
    assert any(" … and " in line for line in shown)
    assert shown[-1].startswith("  the same: tokenizer, sampling")
    sections = json.loads(cli("diff", tiny_artifact, other, "--json").stdout)["sections"]
    added = next(c for c in sections["weights"] if c["what"] == "lm_head.weight.scale")
    assert added == {"what": "lm_head.weight.scale", "after": "float16 [1, 20, 2, 16]"}
    gone = next(c for c in sections["targets"] if c["what"] == "portable")
    assert set(gone) == {"what", "before"}


@pytest.mark.parametrize(
    ("change", "section", "what", "before", "after"),
    [
        (lambda m: m["provenance"]["versions"].update(jaxlib="9"), "versions", "jaxlib", ..., "9"),
        (lambda m: m["provenance"]["versions"].pop("numpy"), "versions", "numpy", ..., ABSENT),
        (lambda m: m["provenance"].update(licence="MIT"), "origin", "licence", "Apache-2.0", "MIT"),
        (lambda m: m["sampling"].update(top_k=5), "sampling", "top_k", ABSENT, 5),
        (lambda m: m.update(name="other"), "model", "name", "tiny", "other"),
        (lambda m: m["tokenizer"].update(eos_token_ids=[1, 2]), "tokenizer", "eos_token_ids", (1,), (1, 2)),
        (lambda m: m["targets"][1].update(xla_flags="-x"), "targets", "portable xla_flags", "", "-x"),
        (
            lambda m: m["targets"][1]["programs"][0].update(flops=7),
            "targets",
            "portable cache flops",
            0,
            7,
        ),
    ],
)
def test_each_section_reports_its_own_changes(
    compare, artifact_copy, edit_manifest, change, section, what, before, after
):
    edit_manifest(artifact_copy, change)
    found = compare(artifact_copy)
    assert set(found) == {section}
    ((name, (old, new)),) = found[section].items()
    assert name == what
    assert new == after
    assert before is ... or old == before


def test_files_by_their_hashes(compare, artifact_copy, edit_manifest):
    for name, section, what in (
        ("programs/cpu/decode.xla", "targets", " decode executable"),
        ("programs/portable/decode.stablehlo", "targets", "portable decode StableHLO"),
        ("tokenizer.json", "tokenizer", "tokenizer"),
        ("chat_template.jinja", "tokenizer", "chat template"),
        ("golden.json", "golden answers", "golden"),
        ("README.md", "other files", "README.md"),
    ):
        data = (artifact_copy / name).read_bytes()
        (artifact_copy / name).write_bytes(data + b" ")
        relist(artifact_copy, name, edit_manifest)
        found = compare(artifact_copy)
        assert set(found) == {section}
        ((found_what, (old, new)),) = found[section].items()
        assert found_what.endswith(what)
        assert old.startswith(f"{len(data)} bytes, sha256 ")
        assert new.startswith(f"{len(data) + 1} bytes, sha256 ")
        (artifact_copy / name).write_bytes(data)
        relist(artifact_copy, name, edit_manifest)


def test_a_signature_that_differs(compare, artifact_copy, edit_manifest):
    def change(manifest):
        for program in manifest["targets"][1]["programs"]:
            program["arguments"] = [v for v in program["arguments"] if v["name"] != "rope.cos"]

    edit_manifest(artifact_copy, change)
    found = compare(artifact_copy)["targets"]
    names = ("prefill_8", "prefill_16", "decode_1", "decode", "score")
    assert set(found) == {f"portable {p} signature" for p in names}
    old, new = found["portable decode signature"]
    (gone,) = set(old) - set(new)
    assert gone.startswith("argument rope.cos: table float32 [")


def test_what_cannot_be_read_is_exit_code_2(cli, tiny_artifact, tmp_path, artifact_copy, edit_manifest):
    assert cli("diff", tiny_artifact, tmp_path / "none").exit_code == 2
    path = artifact_copy / "weights.safetensors"
    edit_manifest(artifact_copy, lambda m: m["files"]["weights.safetensors"].update(sha256="0" * 64))
    result = cli("diff", tiny_artifact, artifact_copy)
    assert result.exit_code == 2
    assert "file 'weights.safetensors' has sha256 " in result.stderr
    path.unlink()
    shutil.copy(tiny_artifact / "README.md", path)
    assert cli("diff", tiny_artifact, artifact_copy).exit_code == 2
