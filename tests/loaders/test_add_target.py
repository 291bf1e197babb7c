"""A target added to an artifact that is there: whole at any moment, checked before it counts, weights untouched."""

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
from precast.loaders import target_files
from precast.loaders.add_target import add_target, summary
from precast.loaders.artifact import folders
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import cpu_features
from precast.loaders.audit.verify import check_files
from precast.loaders.compiling import compiler as compiling
from precast.loaders.compiling import isa
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.locate import read_manifest
from precast.loaders.runtime import pjrt

pytestmark = pytest.mark.skipif(
    isa.widest_level(cpu_features()) in (None, "x86-64-v2"), reason="this CPU has no wider instruction set"
)
EXPORTED, NAME = "cpu-x86-64-v2", "cpu-x86-64-v3"
PROMPT = [7, 200, 31]


@pytest.fixture(scope="module")
def compiled_once():
    """What the compiler makes of the tiny artifact, made once: programs are the same in all copies."""
    made = {}

    def compile_programs(programs, where, *, isa=isa.NATIVE, log):
        programs = list(programs)
        key = (isa, *(hashlib.sha256(code).digest() for _, code in programs))
        if key not in made:
            made[key] = compiling_for_real(programs, where, isa=isa, log=log)
        return made[key]

    compiling_for_real = compiling.compile_programs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "compile_programs", compile_programs)
        yield


@pytest.fixture
def add(compiled_once, artifact_copy):
    """Adds a target to the copy; gives what was done and what was said."""

    def run(name="x86-64-v3", **options):
        said: list[str] = []
        return add_target(artifact_copy, isa=name, log=said.append, **options), said

    return run


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def refused(add, artifact_copy):
    """What is said of a target that is not added; the artifact must be as it was."""

    def run(name="x86-64-v3", **options) -> str:
        before = tree(artifact_copy)
        with pytest.raises(PrecastError) as raised:
            add(name, **options)
        assert tree(artifact_copy) == before
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return run


# --- what is added ------------------------------------------------------------------------------------------


def test_a_target_is_added_and_nothing_else_changes(add, artifact_copy, tiny_model):
    before, weights = tree(artifact_copy), (artifact_copy / "weights.safetensors").stat()
    added, _ = add()
    after, manifest = tree(artifact_copy), read_manifest(artifact_copy)
    assert after.keys() - before.keys() == {
        f"programs/{NAME}/{p}.xla" for p in ("cache", "prefill_8", "prefill_16", "decode")
    }
    assert [name for name in before if after[name] != before[name]] == ["manifest.json"]
    assert (artifact_copy / "weights.safetensors").stat() == weights
    assert [t.name for t in manifest.targets] == [EXPORTED, "portable", NAME]
    assert (added.target, added.replaced, added.signature_removed) == (manifest.targets[-1], False, False)
    assert manifest.targets[-1].programs[0].stablehlo == manifest.targets[0].programs[0].stablehlo
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    model = load(artifact_copy, target=NAME, rehash=True)
    assert model.generate(PROMPT, params).token_ids == tiny_model.generate(PROMPT, params).token_ids
    assert model.compiles == 0
    # The wider target is chosen from now on.
    assert load(artifact_copy).target.name == NAME


def test_what_a_person_is_told(add, artifact_copy):
    (artifact_copy / "manifest.json.sig").write_text("signed")
    added, said = add()
    assert said[-1] == "checking its answers against the recorded ones"
    lines = summary(added, artifact_copy)
    assert lines[0].startswith(f"{artifact_copy}: target {NAME} added: 4 programs, ")
    assert lines[0].endswith(f"jaxlib {pjrt.jaxlib_version}, {added.answers} answers as recorded")
    assert lines[1].startswith(
        "  runs on Intel since Haswell (2013), AMD since Excavator (2015) (x86-64-v3); not "
    )
    assert lines[2].startswith("  manifest.json.sig was removed: it was for the manifest as it was")
    assert lines[3] == f"  run it with: precast run {artifact_copy} --target {NAME}"
    assert not (artifact_copy / "manifest.json.sig").exists()


def test_neither_jax_nor_a_trace_is_needed(artifact_copy, python):
    code = f"""
import sys
from precast.cli import main
try:
    main(["add-target", {str(artifact_copy)!r}, "--cpu-isa", "x86-64-v3"])
except SystemExit as end:
    assert end.code == 0, end.code
assert "jax" not in sys.modules
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert f"target {NAME} added: 4 programs" in result.stdout
    for program in ("cache", "prefill_8", "prefill_16", "decode"):
        assert f"compiling {program} from StableHLO for x86-64-v3 …" in result.stderr
    assert load(artifact_copy, target=NAME).compiles == 0


def test_another_jaxlibs_target_keeps_its_name(add, artifact_copy, edit_manifest):
    edit_manifest(artifact_copy, lambda m: m["targets"][0].update(jaxlib="0.9.9"))
    added, _ = add(None)  # which is what the export made, too
    assert added.target.name == f"{EXPORTED}-jaxlib{pjrt.jaxlib_version}"
    assert load(artifact_copy).target.name == added.target.name


def test_the_portable_form_is_compiled_on_request(add, artifact_copy):
    added, _ = add(None, source="portable")
    assert added.target.name.startswith("portable-x86-64-v")
    assert set(added.target.cpu_features) <= set(cpu_features())
    assert (added.target.kernels, added.target.kernel_abi) == ((), 0)


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_name_that_is_taken(add, refused, artifact_copy):
    add()
    assert refused() == (
        f"{artifact_copy}: target {NAME!r} is there already; replace it with --overwrite, or run it with --target"
        f" {NAME}."
    )
    assert f"target {EXPORTED!r} is there already" in refused(None)


def test_overwrite_replaces(add, artifact_copy):
    add()
    for _ in range(3):
        added, _ = add(overwrite=True)
        assert added.replaced
        manifest = read_manifest(artifact_copy)
        assert [t.name for t in manifest.targets].count(NAME) == 1
        assert load(artifact_copy, target=NAME, rehash=True).compiles == 0
        listed = set(manifest.files) | {"manifest.json"}
        assert set(tree(artifact_copy)) == listed
    # Also one of the export's own, whose StableHLO stays.
    add(None, overwrite=True)
    assert not list((artifact_copy / "programs" / "cpu").glob("*.xla"))
    assert load(artifact_copy, target=EXPORTED, rehash=True).target.name == EXPORTED


def test_what_cannot_be_compiled(refused, artifact_copy, monkeypatch):
    assert refused("mmx").startswith("--cpu-isa: 'mmx' is not known, expected one of x86-64-v2, x86-64-v3")
    assert refused(source="gpu") == (
        f"{artifact_copy}: target 'gpu' is not in the artifact, or holds no StableHLO for a CPU; those that do are"
        f" {EXPORTED!r}, 'portable'."
    )
    monkeypatch.setattr(isa, "cpu_features", lambda: isa.LEVELS["x86-64-v2"].features)
    assert "x86-64-v3 is wider than this machine, which lacks avx, avx2, bmi" in refused("x86-64-v3")


def test_stablehlo_that_is_altered(refused, artifact_copy):
    path = artifact_copy / "programs" / "cpu" / "decode.stablehlo"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert "file 'programs/cpu/decode.stablehlo' has sha256" in refused()


def test_an_artifact_that_is_damaged_elsewhere(refused, artifact_copy):
    path = artifact_copy / "programs" / "cpu" / "decode.xla"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert "file 'programs/cpu/decode.xla' has sha256" in refused()


def test_wrong_answers(refused, artifact_copy, edit_manifest):
    golden = artifact_copy / "golden.json"
    recorded = json.loads(golden.read_text())
    answer = next(a for a in recorded["greedy"] if a["token_ids"])
    answer["token_ids"][0] = (answer["token_ids"][0] + 1) % 300
    golden.write_text(json.dumps(recorded))
    data = golden.read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(artifact_copy, lambda m: m["files"].update({"golden.json": entry}))
    text = refused()
    assert f"{artifact_copy}: target {NAME!r}: answer " in text
    assert text.endswith("; the artifact is as it was.")


def test_what_this_jaxlib_does_not_take(artifact_copy):
    text = ""
    with pytest.raises(PrecastError) as raised:
        compiling.compile_programs([("decode", b"junk")], "x", isa="x86-64-v2", log=lambda _: None)
    text = str(raised.value)
    assert text.startswith(
        f"x: program 'decode': jaxlib {pjrt.jaxlib_version} does not compile this StableHLO"
    )
    assert text.endswith("It was compiled for x86-64-v2; XLA may manage --cpu-isa x86-64-v3.")


def test_a_compiler_that_crashes_is_a_sentence(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_there_is_no_such_flag=1")  # which ends the process that loads XLA
    with pytest.raises(
        PrecastError, match=r"^x: the process that compiled program 'decode' ended before it was done"
    ):
        compiling.compile_programs([("decode", b"junk")], "x", log=lambda _: None)


# --- whole at any moment ------------------------------------------------------------------------------------


class Stop(BaseException):
    """Like the signal that ends a process: nothing is there to handle it."""


def stop_at(monkeypatch, n: int, error: Exception) -> list[str]:
    """Makes the n-th call that changes or opens a file below programs/ or the manifest fail; the calls so far."""
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
def test_whatever_fails_the_artifact_is_whole(add, artifact_copy, monkeypatch, error):
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)  # which has its own tests, and takes long
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
def test_what_a_killed_run_left_is_removed(add, artifact_copy, monkeypatch, overwrite):
    """Kill it at each step without any clean-up, then run it again."""
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)
    if overwrite:
        add()
    whole = tree(artifact_copy)
    for n in range(1, 100):
        restore(artifact_copy, whole)
        with monkeypatch.context() as patch:
            patch.setattr(target_files, "_settle", lambda *_: None)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
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
    """Make a user's folders, files and links with names and contents like ours."""
    mark, text = folders._MARK, folders._MARK_TEXT
    for name in (".mine.partial", ".add-target.0123456789ab.partial", "mine", "empty"):
        (programs / name).mkdir()
    (programs / "mine" / "decode.xla").write_bytes(b"mine")
    for n, contents in enumerate((None, b"", text[:-1], text + b"more")):
        folder = programs / f".add-target.precast-00000000000{n}.partial"
        folder.mkdir()
        if contents is not None:
            (folder / mark).write_bytes(contents)
    for name in ("add-target.precast-01234567890g", "add-target.precast-0123", "other.precast-" + "0" * 12):
        (programs / f".{name}.partial").mkdir()
        (programs / f".{name}.partial" / mark).write_bytes(text)
    (programs / f".add-target.precast-{'a' * 12}.partial").write_bytes(text)
    outside = programs.parent.parent / "outside"
    outside.mkdir()
    (outside / mark).write_bytes(text)
    (programs / f".add-target.precast-{'b' * 12}.partial").symlink_to(outside)


def test_what_only_looks_like_ours_is_kept(add, artifact_copy, monkeypatch):
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)
    programs = artifact_copy / "programs"
    look_alikes(programs)
    before = sorted(programs.parent.parent.rglob("*"))
    add()
    add(overwrite=True)
    assert [p for p in before if not os.path.lexists(p)] == []


def test_a_file_that_is_no_longer_what_was_written_is_kept(add, artifact_copy, monkeypatch):
    """The killed process wrote it, and then somebody replaced it."""
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)
    with monkeypatch.context() as patch:
        patch.setattr(target_files, "_settle", lambda *_: None)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
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
        f"{artifact_copy}: the target cannot be added (Read-only file system); the artifact must be on a disk with"
        " room and in a folder that you may write to: copy it there."
    )


@pytest.mark.parametrize("what", ["link", "file"])
def test_programs_that_are_no_folder_of_the_artifact(refused, artifact_copy, tmp_path, what):
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
    """Puts StableHLO beside programs/, which is gone then."""
    (root / "programs").rename(root / "code")

    def move(manifest):
        names = {name: name.replace("programs/", "code/", 1) for name in manifest["files"]}
        manifest["files"] = {names[name]: entry for name, entry in manifest["files"].items()}
        for program in (p for target in manifest["targets"] for p in target["programs"]):
            for key in ("executable", "stablehlo"):
                program[key] = names.get(program[key], program[key])

    edit_manifest(root, move)


def test_programs_is_made_where_it_is_missing_and_only_for_good(
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
    """As an export with --overwrite does; the other has a target of the same name."""
    other = Path(shutil.copytree(root, root.with_name("other")))
    (other / "programs" / NAME).mkdir(exist_ok=True)
    (other / "programs" / NAME / "decode.xla").write_bytes(b"another's")
    (other / "manifest.json").write_bytes(b"another's")
    root.rename(root.with_name("old"))
    other.rename(root)


def changed_in_place(root: Path) -> None:
    (root / "manifest.json").write_bytes((root / "manifest.json").read_bytes() + b"\n")


def copied(root: Path) -> None:
    """The same bytes in another folder."""
    root.rename(root.with_name("old"))
    shutil.copytree(root.with_name("old"), root)


@pytest.mark.parametrize("change", [replaced_by_another, changed_in_place, copied])
@pytest.mark.parametrize("before", ["write_programs", "replace_manifest"])
def test_what_is_replaced_meanwhile_is_left_alone(add, artifact_copy, monkeypatch, change, before):
    (artifact_copy / "manifest.json.sig").write_text("signed")
    monkeypatch.setattr(adding, "_replay", lambda *_: 5)
    step, others = getattr(adding, before), {}

    def then(held, *rest):
        change(held.root)
        others.update(tree(held.root))
        return step(held, *rest)

    monkeypatch.setattr(adding, before, then)
    with pytest.raises(PrecastError) as raised:
        add()
    assert str(raised.value) == (
        f"{artifact_copy}: was replaced while its target was compiled; run precast add-target again."
    )
    if change is changed_in_place:  # then what was written there is this one's
        others = {
            name: data for name, data in others.items() if f"/{NAME}/" not in name and ".partial/" not in name
        }
    assert tree(artifact_copy) == others


@pytest.mark.parametrize("name", ["a/b", "/decode", "..", "a\0b", "a\\b", ""])
def test_a_program_whose_name_is_no_file_s(refused, artifact_copy, edit_manifest, monkeypatch, name):
    monkeypatch.setattr(adding, "compile_target", None)  # it does not come to that
    edit_manifest(
        artifact_copy, lambda m: [t["programs"][-1].update(name=name) for t in m["targets"] if t["programs"]]
    )
    text = refused()
    assert "is not the name of a file inside an artifact" in text or text == (
        f"{artifact_copy}: target {EXPORTED!r} has a program 'a/b', expected names without '/'; export the"
        " model again."
    )


def bundle(manifest: bytes) -> bytes:
    """What says it is a signature of this manifest."""
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
    with pytest.raises(AssertionError):  # it is refused, and the artifact is as it was before the killed run
        refused(source="gpu")
    assert (artifact_copy / "manifest.json.sig").read_bytes() == signature
    assert not list((artifact_copy / "programs").glob(".*"))


@pytest.mark.parametrize("own", [None, b"own"])
@pytest.mark.parametrize("signature", [bundle(b"another manifest"), b"junk"], ids=["another's", "junk"])
def test_a_signature_that_does_not_fit_is_not(refused, artifact_copy, own, signature):
    if own is not None:
        (artifact_copy / "manifest.json.sig").write_bytes(own)
    before = tree(artifact_copy)
    killed_before_the_manifest_was_replaced(artifact_copy, signature)
    with pytest.raises(AssertionError):
        refused(source="gpu")
    assert tree(artifact_copy) == before


def test_a_signature_made_since_is_kept(refused, artifact_copy):
    signature = bundle((artifact_copy / "manifest.json").read_bytes())
    (artifact_copy / "manifest.json.sig").write_bytes(b"newer")
    before = tree(artifact_copy)
    killed_before_the_manifest_was_replaced(artifact_copy, signature)
    with pytest.raises(AssertionError):
        refused(source="gpu")
    assert tree(artifact_copy) == before


def test_a_signature_is_there_whatever_fails(add, artifact_copy, monkeypatch):
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
    assert said == [f"{artifact_copy}: waiting for another precast add-target, which is at work there"]
    assert NAME not in {t.name for t in read_manifest(artifact_copy).targets}
    os.close(handle)
    other.join(60)
    assert results[0].target.name == NAME
