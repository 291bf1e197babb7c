"""FAULTS 12 and 13: bytes that change or are not written, and unexpected files."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from precast.exporter import export as pipeline
from precast.exporter.manifest import write_manifest
from precast.exporter.options import ExportOptions
from precast.loaders.artifact.cache_folder import cache_folder
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.audit.verify import check_files
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.locate import read_manifest

PROMPT = [7, 200, 31]
FREE = SamplingParams(ignore_eos=True)


def is_whole(root: Path) -> bool:
    found = check_files(root, read_manifest(root), lambda *_: None)
    return not found.problems and not found.unlisted


# --- 12: truncation and flipped bits ------------------------------------------------------------------------


def test_fault_12_a_flipped_bit_anywhere_is_found(artifact_copy, cli, own_cache):
    chance = random.Random(0)
    names = sorted(read_manifest(artifact_copy).files)
    assert len(names) > 10
    for name in names:
        path, data = artifact_copy / name, (artifact_copy / name).read_bytes()
        place = chance.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
        result = cli("verify", artifact_copy)
        assert result.exit_code == 1
        assert f"file {name!r} has sha256 " in result.stderr
        assert "not replayed, because files differ" in result.stdout
        path.write_bytes(data)
    assert cli("verify", artifact_copy).exit_code == 0


def test_fault_12_a_flipped_bit_of_the_manifest_is_found_or_harmless(
    artifact_copy, answers, cli, tiny_artifact
):
    """Only a signature protects the manifest's own bytes, but parsing is strict."""
    chance, data = random.Random(1), (artifact_copy / "manifest.json").read_bytes()
    right, refused = answers(tiny_artifact), 0
    for _ in range(150):
        place = chance.randrange(len(data))
        (artifact_copy / "manifest.json").write_bytes(
            data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
        )
        result = cli("check", artifact_copy, "--json")
        assert result.exit_code in (0, 1, 2), result.output
        refused += result.exit_code == 2
        if result.exit_code == 0 and chance.random() < 0.1:
            ran = cli("run", artifact_copy, "--ids", "7,200,31", "-n", "4", "--ignore-eos", "--json")
            assert ran.exit_code == 2 or json.loads(ran.stdout)["token_ids"] == right
    assert refused > 50


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_fault_12_a_truncated_file_is_named(artifact_copy, cli, own_cache, share):
    for name in sorted(read_manifest(artifact_copy).files):
        path, data = artifact_copy / name, (artifact_copy / name).read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        result = cli("verify", artifact_copy)
        assert result.exit_code == 1
        assert f"file {name!r} has {int(len(data) * share)} bytes, expected {len(data)}" in result.stderr
        path.write_bytes(data)


# --- 12: writes that fail -----------------------------------------------------------------------------------


@pytest.fixture
def quick_export(tiny_artifact, tiny_source, monkeypatch):
    """Return an export of the tiny model that writes every file without compiling or computing."""
    made, source = read_manifest(tiny_artifact), tiny_source()

    def build(*arguments, **options):
        (folder,) = (a for a in (*arguments, *options.values()) if isinstance(a, Path))
        names = {n for p in made.targets[0].programs for n in (p.executable, p.stablehlo)}
        for name in sorted(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((tiny_artifact / name).read_bytes())
        return [made.targets[0]]

    def record(folder, manifest, stored, weights_sha256):
        (folder / "golden.json").write_bytes((tiny_artifact / "golden.json").read_bytes())
        write_manifest(folder, manifest, weights_sha256)

    monkeypatch.setattr(pipeline, "_build", build)
    monkeypatch.setattr(pipeline, "record_golden", record)
    options = {"buckets": (8, 16), "context": 64, "weights": "float32", "targets": ("cpu",)}

    def export(output: Path, *, overwrite: bool = False) -> None:
        pipeline.export(source, output, ExportOptions(**options, overwrite=overwrite))

    return export


@pytest.mark.parametrize(
    ("how", "there"),
    [
        ("once", False),
        ("for good", True),
        pytest.param("once", True, marks=pytest.mark.long),
        pytest.param("for good", False, marks=pytest.mark.long),
    ],
)
def test_fault_12_an_export_whose_nth_write_fails_is_whole_or_absent(
    quick_export, tiny_artifact, disks, tmp_path, own_cache, how, there
):
    """Let each operation of an export fail in turn: no file is partly written, and no earlier file is lost."""
    # The model names of the old and the new artifact differ.
    old = json.loads((tiny_artifact / "manifest.json").read_text()) | {"name": "old"}
    refused = 0
    for n in range(1, 1000):
        parent = tmp_path / str(n)
        parent.mkdir()
        target = parent / "artifact"
        if there:
            shutil.copytree(tiny_artifact, target)
            (target / "manifest.json").write_text(json.dumps(old))
        error = None
        with disks.Disk(n, how).at_work() as disk:
            try:
                quick_export(target, overwrite=there)
            except PrecastError as raised:
                error = raised
        if error is None:
            assert os.listdir(parent) == ["artifact"]
            assert is_whole(target)
            assert read_manifest(target).name == "tiny"
        else:
            refused += 1
            assert "No space left on device" in str(error)
            kept = [p.parent for p in parent.rglob("manifest.json")] if there else []
            # A folder that could not be renamed back stays beside the artifact.
            assert [p for p in kept if read_manifest(p).name == "old" and is_whole(p)] == kept
            assert len(kept) == there
            if how == "once":
                assert os.listdir(parent) == ["artifact"] * there
        shutil.rmtree(parent)
        if not disk.failed:
            break
    assert not disk.failed
    assert refused > 40
    quick_export(tmp_path / "artifact")
    assert is_whole(tmp_path / "artifact")


def test_fault_12_killed_at_the_nth_write_an_artifact_is_whole_or_absent(tiny_artifact, tmp_path, python):
    """Kill a process at each operation in turn while it writes an artifact; the next process must succeed."""
    code = f"""
import importlib.util, os, shutil, sys
from pathlib import Path
from precast.loaders.artifact import files, folders
from precast.loaders.locate import read_manifest
spec = importlib.util.spec_from_file_location("disk", {str(Path(__file__).parent / "disk.py")!r})
disk = importlib.util.module_from_spec(spec)
spec.loader.exec_module(disk)
source, parent = Path({str(tiny_artifact)!r}), Path({str(tmp_path)!r})
manifest = read_manifest(source)
listed = ("weights.safetensors", "tokenizer.json", "programs/cpu/decode.xla")
contents = {{name: (source / name).read_bytes() for name in (*listed, "manifest.json")}}

def write(target, overwrite):
    with folders.new_folder(target, overwrite=overwrite) as folder:
        for name, data in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

def whole(target):
    return not files.unlisted_files(target, listed) and all(
        (target / name).read_bytes() == data for name, data in contents.items())

killed = 0
for overwrite in (False, True):
    for n in range(1, 1000):
        target = parent / f"{{overwrite}}-{{n}}" / "artifact"
        target.parent.mkdir()
        if overwrite:
            write(target, False)
        child = os.fork()
        if not child:
            with disk.Disk(n, disk.KILLED).at_work():
                write(target, overwrite)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if target.exists():
            assert whole(target), n
        if not status:
            break
        assert os.WTERMSIG(status) == 9
        killed += 1
        write(target, target.exists())
        assert whole(target), n
        shutil.rmtree(target.parent)
    assert target.exists()
print(killed)
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


# --- 12: a file rewritten while mapped ----------------------------------------------------------------------


@pytest.mark.parametrize("change", ["a byte", "truncated", "zeros", "longer"])
def test_fault_12_weights_rewritten_while_mapped_are_noticed(artifact_copy, change):
    """Truncation would end the process with SIGBUS at the next access; other changes would alter the answers."""
    path = artifact_copy / "weights.safetensors"
    model = load(artifact_copy)
    before = model.generate(PROMPT, FREE).token_ids
    size = path.stat().st_size
    with path.open("r+b") as file:
        if change == "truncated":
            file.truncate(size // 2)
        elif change == "longer":
            file.seek(0, os.SEEK_END)
            file.write(b"x")
        else:
            file.seek(size // 2)
            file.write(b"x" if change == "a byte" else bytes(size // 4))
    text = f"{path}: was written to while it was in use; load the artifact again, and replace its folder instead of"
    for _ in range(2):
        with pytest.raises(PrecastError) as raised:
            model.generate(PROMPT, FREE)
        assert str(raised.value).startswith(text)
    assert len(before) == 61


def test_fault_12_weights_rewritten_in_the_middle_of_an_answer_end_it(artifact_copy):
    model = load(artifact_copy)
    stream = iter(model.stream(PROMPT, FREE))
    next(stream)
    with (artifact_copy / "weights.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(PrecastError, match="was written to while it was in use"):
        list(stream)


def test_fault_12_an_artifact_replaced_or_removed_while_in_use_goes_on_answering(
    artifact_copy, tiny_artifact
):
    """Renaming replaces whole files, so a mapping keeps the old contents."""
    model = load(artifact_copy)
    expected = model.generate(PROMPT, FREE).token_ids
    artifact_copy.rename(artifact_copy.parent / "old")
    shutil.copytree(tiny_artifact, artifact_copy)
    assert model.generate(PROMPT, FREE).token_ids == expected
    shutil.rmtree(artifact_copy.parent / "old")
    assert model.generate(PROMPT, FREE).token_ids == expected


# --- 13: extra or altered files -----------------------------------------------------------------------------


def test_fault_13_extra_files_are_named_by_verify_and_read_by_nobody(
    artifact_copy, cli, answers, tiny_artifact, tmp_path
):
    code = f"import os; os.mkdir({str(tmp_path / 'ran')!r})"
    extra = ["numpy.py", "jaxlib.py", "sitecustomize.py", "precast/__init__.py", "programs/cpu/prefill_4.xla"]
    for name in [*extra, "tokenizer_config.json", ".hidden", "weights.safetensors.bak"]:
        (artifact_copy / name).parent.mkdir(exist_ok=True)
        (artifact_copy / name).write_text(code if name.endswith(".py") else "{}")
    (artifact_copy / "link").symlink_to("/etc")
    (artifact_copy / "empty").mkdir()
    assert answers(artifact_copy) == answers(tiny_artifact)
    result = cli("verify", artifact_copy, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["files"]["unlisted"] == sorted(
        [*extra, "tokenizer_config.json", ".hidden", "weights.safetensors.bak", "link", "empty/"]
    )
    assert found["replay"]["problems"] == []
    text = f"{artifact_copy}: 'link' is a link, and not listed in the manifest; remove it, or copy the artifact again."
    assert text in found["problems"]
    assert not (tmp_path / "ran").exists()


def test_fault_13_modules_in_the_folder_it_is_run_from_are_not_imported(
    artifact_copy, tmp_path, own_cache, monkeypatch, answers
):
    """Check this also for the child process that tries the artifact."""
    for name in ("numpy.py", "jaxlib.py", "json.py", "precast.py"):
        (artifact_copy / name).write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    monkeypatch.chdir(artifact_copy)
    assert len(answers(artifact_copy)) == 4
    assert list((own_cache / "tried").iterdir())
    assert not (tmp_path / "ran").exists()


def test_fault_13_an_altered_record_of_the_cache_hides_nothing(artifact_copy, own_cache, run_refused):
    load(artifact_copy)
    (record,) = (own_cache / "verified").iterdir()
    path = artifact_copy / "weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    # The record must name the altered file and contain the hash that the manifest expects.
    status = path.stat()
    fields = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    mine = record.with_name("-".join(map(str, fields)) + ".json")
    for content in (b"", b"{", b'{"sha256": null}', b'{"sha256": ["x"]}', b"\xff" * 99):
        mine.write_bytes(content)
        assert "file 'weights.safetensors' has sha256 " in run_refused(artifact_copy)


def test_fault_13_an_altered_executable_in_the_cache_is_compiled_again(artifact_copy, own_cache, cli):
    options = ("--target", "portable", "--compile", "--ids", "7,200,31", "-n", "4", "--json")
    first = cli("run", artifact_copy, *options)
    assert first.exit_code == 0, first.output
    entries = list((own_cache / "compiled").iterdir())
    assert len(entries) == 6
    data = bytearray(entries[0].read_bytes())
    data[len(data) // 2] ^= 1
    entries[0].write_bytes(data)
    again = cli("run", artifact_copy, *options)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["token_ids"] == json.loads(first.stdout)["token_ids"]
    assert json.loads(again.stdout)["compiles"] == 1


def test_fault_13_what_is_no_file_in_the_cache_is_no_record(artifact_copy, own_cache, answers, tiny_artifact):
    answers(artifact_copy)
    for path in [*(own_cache / "tried").iterdir(), *(own_cache / "verified").iterdir()]:
        path.unlink()
        path.symlink_to("/dev/null/nothing")
    assert answers(artifact_copy) == answers(tiny_artifact)


def test_signals_are_as_they_were():
    """The tests above left no alarm and no signal handler."""
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert cache_folder().is_dir()
