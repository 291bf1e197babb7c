"""Adding a target: the artifact is complete at any moment, despite interrupts, failures and other writers."""

import base64
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from precast.loaders import add_target as adding
from precast.loaders import artifact_changes
from precast.loaders.add_target import add_target
from precast.loaders.artifact import folders
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import cpu_features
from precast.loaders.audit.verify import check_files
from precast.loaders.compiling import isa
from precast.loaders.locate import read_manifest

pytestmark = pytest.mark.skipif(
    isa.widest_level(cpu_features()) in (None, "x86-64-v2"), reason="this CPU has no wider instruction set"
)
NAME = "cpu-x86-64-v3"


class Stop(BaseException):
    """An exception that no code handles, like a signal that ends the process."""


def stop_at(monkeypatch, n: int, error: Exception) -> list[str]:
    """Make the n-th call that changes files or folders fail; return the list of the calls so far."""
    seen: list[str] = []

    def failing(name, real):
        def call(*arguments, **options):
            seen.append(name)
            if len(seen) == n:
                raise error
            return real(*arguments, **options)

        return call

    for name in ("mkdir", "rename", "replace", "unlink"):
        monkeypatch.setattr(Path, name, failing(name, getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", failing("fsync", os.fsync))
    return seen


def restore(root: Path, contents: dict[str, bytes]) -> None:
    shutil.rmtree(root)
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, Stop()], ids=["full", "stopped"])
def test_the_artifact_is_whole_whatever_fails(add, artifact_copy, monkeypatch, error, tree):
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)  # slow, and tested elsewhere
    before = tree(artifact_copy)
    for n in range(1, 100):
        restore(artifact_copy, before)
        with monkeypatch.context() as patch:
            seen = stop_at(patch, n, error)
            try:
                add()
                failed = None
            except (PrecastError, Stop) as raised:
                failed = raised
        if len(seen) < n:
            break
        if isinstance(failed, PrecastError):
            assert str(failed).startswith(f"{artifact_copy}: the target cannot be added (No space left")
            assert tree(artifact_copy) == before
        manifest = read_manifest(artifact_copy)
        added = NAME in {t.name for t in manifest.targets}
        if not added:
            assert {name: data for name, data in tree(artifact_copy).items() if name in before} == before
        assert check_files(artifact_copy, manifest, lambda *_: None).problems == ()
        # The next run succeeds, and leaves nothing of this one.
        add(overwrite=added)
        assert set(tree(artifact_copy)) == set(read_manifest(artifact_copy).files) | {"manifest.json"}
    assert 10 < n < 99


@pytest.mark.parametrize("overwrite", [False, True])
def test_leftovers_of_a_killed_run_are_removed(add, artifact_copy, monkeypatch, overwrite, tree):
    """Kill the command at each step without any clean-up, then run it again."""
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)
    if overwrite:
        add()
    whole = tree(artifact_copy)
    for n in range(1, 100):
        restore(artifact_copy, whole)
        with monkeypatch.context() as patch:
            patch.setattr(artifact_changes, "_settle", lambda *_: None)
            patch.setattr(folders, "remove", lambda _: None)
            seen = stop_at(patch, n, Stop())
            with suppress(Stop):
                add(overwrite=overwrite)
        if len(seen) < n:
            break
        added = NAME in {t.name for t in read_manifest(artifact_copy).targets}
        add(overwrite=added or overwrite)
        listed = set(read_manifest(artifact_copy).files) | {"manifest.json"}
        assert set(tree(artifact_copy)) == listed, f"after {seen[-1]}, call {n}"
    assert 10 < n < 99


def look_alikes(programs: Path) -> None:
    """Make a user's folders, files and links with names and contents like precast's."""
    mark, text = folders._MARK, folders._MARK_TEXT
    for name in (".mine.partial", ".add-target.0123456789ab.partial", "mine", "empty"):
        (programs / name).mkdir()
    (programs / "mine" / "decode.xla").write_bytes(b"mine")
    for n, contents in enumerate((b"", text[:-1], text + b"more")):
        folder = programs / f".add-target.precast-00000000000{n}.partial"
        folder.mkdir()
        (folder / mark).write_bytes(contents)
    (programs / f".add-target.precast-{'c' * 12}.partial" / "unmarked").mkdir(parents=True)
    for name in ("add-target.precast-01234567890g", "add-target.precast-0123", "other.precast-" + "0" * 12):
        (programs / f".{name}.partial").mkdir()
        (programs / f".{name}.partial" / mark).write_bytes(text)
    (programs / f".add-target.precast-{'a' * 12}.partial").write_bytes(text)
    outside = programs.parent.parent / "outside"
    outside.mkdir()
    (outside / mark).write_bytes(text)
    (programs / f".add-target.precast-{'b' * 12}.partial").symlink_to(outside)


def test_lookalikes_of_our_folders_are_kept(add, artifact_copy, monkeypatch):
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)
    programs = artifact_copy / "programs"
    look_alikes(programs)
    before = sorted(programs.parent.parent.rglob("*"))
    add()
    add(overwrite=True)
    assert [p for p in before if not os.path.lexists(p)] == []


def test_a_file_that_was_replaced_is_kept(add, artifact_copy, monkeypatch):
    """A killed process wrote the file, and then a user replaced it."""
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)
    with monkeypatch.context() as patch:
        patch.setattr(artifact_changes, "_settle", lambda *_: None)
        patch.setattr(folders, "remove", lambda _: None)
        patch.setattr(adding, "replace_manifest", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            add()
    (artifact_copy / "programs" / NAME / "decode.xla").write_bytes(b"mine")
    add()
    assert (artifact_copy / "programs" / NAME / "decode.xla").read_bytes() == b"mine"
    assert os.listdir(artifact_copy / "programs" / NAME) == ["decode.xla"]
    assert f"programs/{NAME}.2/decode.xla" in read_manifest(artifact_copy).files


def test_an_artifact_that_cannot_be_written_to(refused, artifact_copy, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert refused() == (
        f"{artifact_copy}: the target cannot be added (Read-only file system); copy the artifact to a writable"
        " folder on a disk with free space."
    )


@pytest.mark.parametrize("what", ["link", "file"])
def test_programs_must_be_a_folder(refused, artifact_copy, tmp_path, what, tree):
    outside = tmp_path / "outside"
    (artifact_copy / "programs").rename(outside)
    if what == "link":
        (artifact_copy / "programs").symlink_to(outside)
    else:
        (artifact_copy / "programs").write_text("")
    before = tree(outside)
    assert refused() == (
        f"{artifact_copy}: 'programs' is a {what}, expected a folder; copy or export the artifact again."
    )
    assert tree(outside) == before


def elsewhere(root: Path, edit_manifest) -> None:
    """Move all programs from programs/ to another folder."""
    (root / "programs").rename(root / "code")

    def move(manifest):
        names = {name: name.replace("programs/", "code/", 1) for name in manifest["files"]}
        manifest["files"] = {names[name]: entry for name, entry in manifest["files"].items()}
        for program in (p for target in manifest["targets"] for p in target["programs"]):
            for key in ("executable", "stablehlo"):
                program[key] = names.get(program[key], program[key])

    edit_manifest(root, move)


def test_a_missing_programs_folder_is_made_only_by_a_complete_run(
    add, artifact_copy, edit_manifest, monkeypatch
):
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)
    elsewhere(artifact_copy, edit_manifest)
    for n in (1, 2, 3, 9):
        with monkeypatch.context() as patch:
            stop_at(patch, n, FULL)
            with pytest.raises(PrecastError, match="No space left"):
                add()
        assert not (artifact_copy / "programs").exists()
    add()
    assert [p.name for p in (artifact_copy / "programs").iterdir()] == [NAME]


def replaced_by_another(root: Path) -> None:
    """Replace the folder with another that has a target of the same name, as an export with --overwrite does."""
    other = Path(shutil.copytree(root, root.with_name("other")))
    (other / "programs" / NAME).mkdir(exist_ok=True)
    (other / "programs" / NAME / "decode.xla").write_bytes(b"another's")
    (other / "manifest.json").write_bytes(b"another's")
    root.rename(root.with_name("old"))
    other.rename(root)


def changed_in_place(root: Path) -> None:
    (root / "manifest.json").write_bytes((root / "manifest.json").read_bytes() + b"\n")


def copied(root: Path) -> None:
    """Replace the folder with a copy."""
    root.rename(root.with_name("old"))
    shutil.copytree(root.with_name("old"), root)


@pytest.mark.parametrize("change", [replaced_by_another, changed_in_place, copied])
@pytest.mark.parametrize("before", ["write_files", "replace_manifest"])
def test_an_artifact_that_was_replaced_meanwhile_is_left_alone(
    add, artifact_copy, monkeypatch, change, before, tree
):
    (artifact_copy / "manifest.json.sig").write_text("signed")
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)
    step, others = getattr(adding, before), {}

    def then(artifact, *rest):
        change(artifact.root)
        others.update(tree(artifact.root))
        return step(artifact, *rest)

    monkeypatch.setattr(adding, before, then)
    with pytest.raises(PrecastError) as raised:
        add()
    assert str(raised.value) == (
        f"{artifact_copy}: was replaced while its target was compiled; run precast add-target again."
    )
    if change is changed_in_place:  # this process wrote, and removes, the new files in it
        others = {
            name: data for name, data in others.items() if f"/{NAME}/" not in name and ".partial/" not in name
        }
    assert tree(artifact_copy) == others


def bundle(manifest: bytes) -> bytes:
    """Return a file that claims to be a signature of this manifest."""
    resource = {"name": ".", "algorithm": "sha256", "digest": hashlib.sha256(manifest).hexdigest()}
    statement = {
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"resources": [resource]},
    }
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    hint = {"publicKey": {"hint": "0" * 64}}
    return json.dumps({"verificationMaterial": hint, "dsseEnvelope": {"payload": payload}}).encode()


def killed_before_the_manifest_was_replaced(root: Path, signature: bytes) -> None:
    folder = folders.temporary_name(root / "programs", "add-target")
    os.close(folders.make_marked(folder))
    (folder / "manifest.json").write_text("the new one")
    (folder / "manifest.json.sig").write_bytes(signature)


def test_a_signature_that_a_killed_run_put_aside_is_put_back(refused, artifact_copy):
    signature = bundle((artifact_copy / "manifest.json").read_bytes())
    killed_before_the_manifest_was_replaced(artifact_copy, signature)
    with pytest.raises(AssertionError):  # refused, and the artifact is as before the killed run
        refused(source="gpu")
    assert (artifact_copy / "manifest.json.sig").read_bytes() == signature
    assert not list((artifact_copy / "programs").glob(".*"))


@pytest.mark.parametrize("own", [None, b"own"])
@pytest.mark.parametrize("signature", [bundle(b"another manifest"), b"junk"], ids=["another's", "junk"])
def test_a_signature_that_does_not_fit_is_not_put_back(refused, artifact_copy, own, signature, tree):
    if own is not None:
        (artifact_copy / "manifest.json.sig").write_bytes(own)
    before = tree(artifact_copy)
    killed_before_the_manifest_was_replaced(artifact_copy, signature)
    with pytest.raises(AssertionError):
        refused(source="gpu")
    assert tree(artifact_copy) == before


def test_a_signature_made_since_is_kept(refused, artifact_copy, tree):
    signature = bundle((artifact_copy / "manifest.json").read_bytes())
    (artifact_copy / "manifest.json.sig").write_bytes(b"newer")
    before = tree(artifact_copy)
    killed_before_the_manifest_was_replaced(artifact_copy, signature)
    with pytest.raises(AssertionError):
        refused(source="gpu")
    assert tree(artifact_copy) == before


def test_the_signature_stays_whatever_fails(add, artifact_copy, monkeypatch, tree):
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)
    (artifact_copy / "manifest.json.sig").write_text("signed")
    before, rename = tree(artifact_copy), Path.rename

    def failing(path, target):
        rename(path, target)
        if path.name == "manifest.json.sig" and Path(target).parent.name.endswith(".partial"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        add()
    assert {name: data for name, data in tree(artifact_copy).items() if name in before} == before


def test_two_at_once_wait_for_each_other(add, artifact_copy):
    said: list[str] = []
    waiting, results = threading.Event(), []

    def log(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            waiting.set()

    handle = os.open(artifact_copy, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    other = threading.Thread(
        target=lambda: results.append(add_target(artifact_copy, isa="x86-64-v3", log=log))
    )
    other.start()
    assert waiting.wait(30)
    assert said == [f"{artifact_copy}: waiting for another precast command that changes it"]
    assert NAME not in {t.name for t in read_manifest(artifact_copy).targets}
    os.close(handle)
    other.join(60)
    assert results[0].target.name == NAME
