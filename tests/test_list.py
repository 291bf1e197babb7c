"""``precast list``: every artifact below a folder, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from precast.loaders.locate import read_manifest

WHERE = "artifacts/good"


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_artifact, edit_manifest):
    """Make artifacts that run, that do not run, and that are broken, beside folders of other programs."""
    monkeypatch.chdir(tmp_path)
    root = Path("artifacts")

    def put(name, change=None):
        (root / name).mkdir(parents=True)
        shutil.copy(tiny_artifact / "manifest.json", root / name)
        if change is not None:
            edit_manifest(root / name, change)

    def targets(**values):
        return lambda manifest: [target.update(values) for target in manifest["targets"][:1]]

    put("good")
    put("below/deeper/other jaxlib", targets(jaxlib="0.9.0"))
    put("elsewhere", lambda m: (targets(kernel_abi=99)(m), m["targets"].pop()))
    (root / "elsewhere" / "programs" / "of" / "artifact").mkdir(parents=True)
    shutil.copy(tiny_artifact / "manifest.json", root / "elsewhere" / "programs" / "of" / "artifact")
    put("named", lambda manifest: manifest.update(name="\x1b]0;x\x07 \u202e"))
    put("newer", lambda manifest: manifest.update(format_version=999))
    put(".hidden")
    put("cut")
    (root / "cut" / "manifest.json").write_text('{"format_version": 5, "na')
    put("empty")
    (root / "empty" / "manifest.json").write_text("")
    (root / "empty" / "weights.safetensors").write_text("")
    put("extension/of a browser")
    (root / "extension" / "manifest.json").write_text('{"manifest_version": 3, "name": "x"}')
    (root / "linked").symlink_to("good")
    (root / "loop").symlink_to(".")
    return root


def test_artifacts_are_listed_by_path_and_the_broken_ones_with_the_reason(cli, folder, tiny_model):
    result = cli("list")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["artifact", "model", "weights", "context", "size", "runs", "here", "prefixes"]
    name = tiny_model.target.name
    shown = [line.split("  ")[0] for line in lines[1:] if not line.startswith("  ! ")]
    places = (
        "below/deeper/other jaxlib",
        "cut",
        "elsewhere",
        "empty",
        "extension/of a browser",
        "good",
        "linked",
    )
    assert shown == [f"artifacts/{place}" for place in (*places, "named", "newer")]
    row = next(line for line in lines if line.startswith("artifacts/good "))
    cells = [cell.strip() for cell in row.split("  ") if cell]
    assert cells[:4] == ["artifacts/good", "tiny (llama, 0.1 M)", "float32", "64"]
    assert cells[4].endswith(" kB")
    assert cells[5] == name
    assert next(line for line in lines if "other jaxlib" in line).endswith("  with --compile")
    assert next(line for line in lines if "elsewhere" in line).endswith("  no")
    for place, text in {
        "cut": "  ! artifacts/cut/manifest.json: ",
        "empty": "  ! artifacts/empty/manifest.json: ",
        "newer": "  ! artifacts/newer/manifest.json: expected format version 4 to 7, found 999; update precast.",
    }.items():
        assert lines[lines.index(f"artifacts/{place}") + 1].startswith(text)
    assert all(line.isprintable() for line in lines)


def test_a_list_as_json(cli, folder, tiny_model):
    found = {one["path"]: one for one in json.loads(cli("list", "artifacts", "--json").stdout)}
    assert len(found) == 9
    good = found["artifacts/good"]
    assert good == {
        "path": "artifacts/good",
        "problem": None,
        "name": "tiny",
        "architecture": "llama",
        "parameters": good["parameters"],
        "weights": "float32",
        "context": 64,
        "bytes": good["bytes"],
        "targets": [t.name for t in tiny_model.manifest.targets],
        "target": tiny_model.target.name,
        "compiles": True,
        "reason": None,
        "prefixes": [],
    }
    assert good["bytes"] > good["parameters"] > 50_000
    other = found["artifacts/below/deeper/other jaxlib"]
    assert (other["target"], other["compiles"]) == (None, True)
    assert "it was compiled by jaxlib 0.9.0" in other["reason"]
    elsewhere = found["artifacts/elsewhere"]
    assert (elsewhere["target"], elsewhere["compiles"]) == (None, False)
    assert "it calls kernels of ABI 99" in elsewhere["reason"]
    assert found["artifacts/named"]["name"] == "\x1b]0;x\x07 \u202e"
    broken = found["artifacts/cut"]
    assert "manifest.json" in broken["problem"]
    assert broken["target"] is broken["name"] is broken["bytes"] is broken["prefixes"] is None


def test_stored_prefixes_are_listed(cli, folder, prefixed_artifact, edit_manifest):
    """A prefix that another target computed is marked as unused."""
    shutil.copy(prefixed_artifact / "manifest.json", folder / "good")
    manifest = read_manifest(prefixed_artifact)
    (prefix,), other = manifest.prefixes, manifest.targets[-1].name
    shown = f"fox ({prefix.tokens} tokens)"
    lines = cli("list", folder / "good").stdout.splitlines()
    assert lines[1].endswith(f"  {prefix.target}  {shown}")
    second = {**vars(prefix), "name": "second", "target": other}
    edit_manifest(folder / "good", lambda manifest: manifest["prefixes"].append(second))
    lines = cli("list", folder / "good").stdout.splitlines()
    assert lines[1].endswith(f"  {shown}, second ({prefix.tokens} tokens, not used here)")
    (found,) = json.loads(cli("list", folder / "good", "--json").stdout)
    size = sum((prefixed_artifact / name).stat().st_size for name in (prefix.file, prefix.arrays))
    reason = f"target {other!r} computed it, but target {prefix.target!r} runs here"
    assert found["prefixes"] == [
        {"name": "fox", "tokens": prefix.tokens, "bytes": size, "obstacle": None},
        {"name": "second", "tokens": prefix.tokens, "bytes": size, "obstacle": reason},
    ]


def test_a_folder_that_is_an_artifact_or_holds_none(cli, folder, tmp_path):
    assert len(cli("list", folder / "good").stdout.splitlines()) == 2
    (tmp_path / "empty").mkdir()
    result = cli("list", tmp_path / "empty")
    assert result.exit_code == 0
    assert (
        result.stdout
        == f"{tmp_path / 'empty'}: no artifacts below this folder; make one with precast export\n"
    )
    assert json.loads(cli("list", tmp_path / "empty", "--json").stdout) == []


@pytest.mark.parametrize(("name", "what"), [("none", "does not exist"), ("file", "is a file")])
def test_a_path_that_is_not_a_folder_is_refused(cli, tmp_path, name, what):
    (tmp_path / "file").write_text("")
    result = cli("list", tmp_path / name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f": expected a folder, but it {what}" in result.stderr


def test_folders_that_cannot_be_read_are_named(cli, folder, monkeypatch):
    from precast.loaders.audit import listing

    scandir = listing.os.scandir

    def refuse(path):
        if Path(path).name == "deeper":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", refuse)
    lines = cli("list").stdout.splitlines()
    assert lines[1:3] == ["artifacts/below/deeper", "  ! artifacts/below/deeper: Permission denied."]


def test_an_unsigned_artifact_is_listed_as_unreadable(cli, folder, tmp_path):
    lines = cli("list", folder / "good", "--require-signature", tmp_path / "key.pem").stdout.splitlines()
    assert lines[1] == "artifacts/good"
    assert lines[2].startswith("  ! ")
