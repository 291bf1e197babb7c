"""A short run of `make fuzz`: a few hundred mutated artifacts, and proof that the harness notices what it looks for."""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

FUZZ = Path(__file__).resolve().parent / "fuzz"
# More than `run.py` gives a worker to start, and a few cases that hang: its own limits say what is slow.
LIMIT_S = 900
# Each of the others starts a process a case; they are part of make fuzz.
QUICK = (
    "manifest,manifest_bytes,weights,weights_and_manifest,tokenizer,template,golden,prefix,names,folder,altered,"
    "store"
)


@pytest.fixture
def fuzzing(monkeypatch):
    """The modules of the folder, which are scripts."""
    monkeypatch.syspath_prepend(str(FUZZ))
    yield
    for name in ("kinds", "mutate", "run", "templates", "worker"):
        sys.modules.pop(name, None)


@pytest.fixture
def signed(prefixed_artifact, tmp_path, fuzzing) -> Path:
    """The artifact with a prefix, with a signature and the key for it."""
    from run import sign_base

    folder = tmp_path / "base" / "artifact"
    shutil.copytree(prefixed_artifact, folder)
    sign_base(folder)
    return folder


def fuzz(artifact, tmp_path, *options, cwd=None) -> subprocess.CompletedProcess[str]:
    where = ("--artifact", str(artifact), "--findings", str(tmp_path / "findings"))
    command = [sys.executable, str(FUZZ / "run.py"), *where, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=LIMIT_S, check=False)


def run(artifact, tmp_path, *options) -> list[str]:
    result = fuzz(artifact, tmp_path, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_hundreds_of_mutated_artifacts(prefixed_artifact, tmp_path):
    lines = run(prefixed_artifact, tmp_path, "--cases", "250", "--only", QUICK, "--processes", "1")
    assert json.loads(lines[-1]) | {"seconds": 0} == {"cases": 250, "findings": 0, "seconds": 0}
    for kind in ("manifest", "prefix"):
        assert re.search(rf"^{kind} +\d+ +0 +[\d.]+ s +\d+ refused", "\n".join(lines), re.MULTILINE)


def test_mutated_programs(tiny_artifact, tmp_path):
    lines = run(tiny_artifact, tmp_path, "--cases", "3", "--only", "executable", "--processes", "1")
    assert json.loads(lines[-1])["findings"] == 0


def test_mutated_signatures(signed, tmp_path):
    lines = run(signed, tmp_path, "--cases", "40", "--only", "signature", "--processes", "1")
    assert json.loads(lines[-1])["findings"] == 0
    assert re.search(r"^signature +40 +0 +[\d.]+ s +\d+ refused", "\n".join(lines), re.MULTILINE)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "signature",
            (
                "needs a signed artifact with its public key in keys/public.pem beside its folder; sign it with precast"
                " sign, or leave --artifact out."
            ),
        ),
        (
            "prefix",
            "needs an artifact with a prefix; add one with precast add-prefix, or leave --artifact out.",
        ),
    ],
)
def test_kinds_that_the_artifact_has_no_files_for(tiny_artifact, tmp_path, kind, text):
    result = fuzz(tiny_artifact, tmp_path, "--cases", "3", "--only", f"manifest,{kind}")
    assert (result.returncode, result.stderr) == (1, f"--only {kind} {text}\n")


def test_what_is_planned(fuzzing):
    from run import plan

    every = {kind for kind, _ in plan(500, 1, None, missing={})}
    missing = {"signature": "needs one", "prefix": "needs another"}
    assert every - {kind for kind, _ in plan(500, 1, None, missing=missing)} == set(missing)
    assert plan(2, 7, "signature", missing={}) == [("signature", 7), ("signature", 8)]
    with pytest.raises(SystemExit, match=r"^--only: there is no kind 'sigs'; choose of manifest, "):
        plan(2, 7, "sigs", missing={})


def test_the_key_is_found_whatever_the_folder_is_called(signed, tmp_path):
    result = fuzz(".", tmp_path, "--cases", "1", "--only", "signature", "--processes", "1", cwd=signed)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("careless", "outcome"), [(False, "refused"), (True, "accepted")])
def test_a_signature_over_another_statement_is_noticed(signed, tmp_path, monkeypatch, careless, outcome):
    """A verifier that does not look lets one pass: the statement says the same, and is not the one that was signed."""
    import kinds
    import worker

    if careless:
        monkeypatch.setattr(worker.signing, "_verify", lambda *_: None)
    place = worker.Place(kinds.Base.read(signed), tmp_path / "place")
    key = kinds.key_of(signed)
    assert checked(worker, place, key) == ("accepted", [])
    whole = place.base.files[kinds.SIGNATURE]
    bundle = json.loads(whole)
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload + b" ").decode()
    assert json.loads(payload + b" ") == json.loads(payload)
    place.apply({kinds.SIGNATURE: json.dumps(bundle).encode()})
    text = "signature: it was accepted over another statement than was signed"
    assert checked(worker, place, key) == (outcome, [text] if careless else [])
    # Spaces between the parts of a bundle are signed by nobody.
    place.apply({kinds.SIGNATURE: json.dumps(json.loads(whole), indent=3).encode()})
    assert checked(worker, place, key) == ("accepted", [])


def checked(worker, place, key):
    problems = worker.Problems()
    return worker.check_signature(place, key, problems), problems.found


def test_a_case_can_be_made_again(signed, fuzzing):
    import kinds

    base = kinds.Base.read(signed)
    for kind in kinds.KINDS:
        cases = [kinds.make(base, kind, n) for n in range(6)]
        assert cases == [kinds.make(base, kind, n) for n in range(6)]
        assert len({repr(case) for case in cases}) > 2
        assert all(case.changes or case.index for case in cases)


def test_what_is_past_the_hashes_is_past_them(prefixed_artifact, fuzzing):
    import hashlib

    import kinds

    base = kinds.Base.read(prefixed_artifact)
    for kind in ("weights", "tokenizer", "template", "golden", "prefix", "stablehlo", "executable"):
        for n in range(6):
            changes = kinds.make(base, kind, n).changes
            listed = json.loads(changes["manifest.json"])["files"]
            for name in set(changes) - {"manifest.json"}:
                expected = {"bytes": len(changes[name]), "sha256": hashlib.sha256(changes[name]).hexdigest()}
                assert listed[name] == expected


@pytest.mark.parametrize("seed", range(5))
def test_mutations_of_json_are_written_whatever_they_are(fuzzing, seed):
    from mutate import mutate_json, write_json

    tree = {"a": [1, 2.5, "x", None, True], "b": {"c": [], "d": {"e": "text"}}}
    random = Random(seed)
    written = [write_json(mutate_json(tree, random)) for _ in range(300)]
    assert len(set(written)) > 200
    assert tree == {"a": [1, 2.5, "x", None, True], "b": {"c": [], "d": {"e": "text"}}}


# In a process of its own, which an audit hook stays in; its folder is none that it may read.
GUARDED = """
import os, shutil, socket, subprocess, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import worker

inside, outside, cache = (Path(sys.argv[2]) / name for name in ("inside", "outside", "cache"))
for folder in (inside, outside, cache):
    folder.mkdir()
    (folder / "file").write_text("x")
    (folder / "tree" / "sub" / "below").mkdir(parents=True)
    for path in ("tree/file", "tree/sub/file", "tree/sub/below/file"):
        (folder / path).write_text("x")
os.chdir(outside)
(inside / "link").symlink_to(outside / "file")
guard = worker.Guard((inside,), (cache,))

def found(act, children=False):
    with guard.watching(children=children):
        try:
            act()
        except OSError:
            pass
    return bool(guard.found)

assert not found(lambda: (inside / "file").read_text())
assert not found(lambda: (cache / "file").write_text("y"))
assert found(lambda: (outside / "file").read_text())
assert found(lambda: (inside / "link").read_text())
assert found(lambda: (inside / ".." / "outside" / "file").read_text())
assert found(lambda: os.open("/etc/passwd", os.O_RDONLY))
assert found(lambda: (inside / "file").write_text("y"))
assert found(lambda: (inside / "file").unlink())
assert found(lambda: subprocess.run(["true"]))
assert not found(lambda: shutil.rmtree(cache / "tree")), guard.found
assert not (cache / "tree").exists()
assert found(lambda: shutil.rmtree(outside / "tree"))
assert found(lambda: socket.socket().connect(("127.0.0.1", 9)))
assert not found(lambda: (outside / "none")), "nothing was opened"

# Names relative to folders that are open; whether they may be read says nothing of the current one.
i, o, c = (os.open(folder, os.O_RDONLY) for folder in (inside, outside, cache))
new = os.O_CREAT | os.O_WRONLY
for current in (cache, outside):
    os.chdir(current)
    assert not found(lambda: os.open("file", os.O_RDONLY, dir_fd=i))
    assert found(lambda: os.open("file", os.O_RDONLY, dir_fd=o))
    assert found(lambda: os.open("link", os.O_RDONLY, dir_fd=i))
    assert found(lambda: os.open("../outside/file", os.O_RDONLY, dir_fd=c))
    assert not found(lambda: os.open(cache / "file", os.O_RDONLY, dir_fd=o)), "an absolute name needs no folder"
    assert not found(lambda: os.open("new", new, dir_fd=c))
    assert found(lambda: os.open("new", new, dir_fd=i))
    assert found(lambda: os.open("new", new, dir_fd=o))
    assert not found(lambda: os.mkdir("d", dir_fd=c))
    assert found(lambda: os.mkdir("d", dir_fd=o))
    assert not found(lambda: os.rmdir("d", dir_fd=c))
    assert found(lambda: os.rmdir("d", dir_fd=o))
    assert not found(lambda: os.open("none", os.O_RDONLY, dir_fd=999))
assert found(lambda: os.open("file", os.O_RDONLY))
assert found(lambda: os.mkdir("e"))

# Both ends of what moves, and of what gets another name.
assert not found(lambda: os.rename(cache / "new", cache / "moved"))
assert found(lambda: os.rename(cache / "moved", outside / "moved"))
assert found(lambda: os.rename(outside / "moved", cache / "moved"))
assert not found(lambda: os.rename("moved", "new", src_dir_fd=c, dst_dir_fd=c))
assert found(lambda: os.replace("new", "moved", src_dir_fd=c, dst_dir_fd=o))
assert found(lambda: os.replace("moved", "new", src_dir_fd=o, dst_dir_fd=c))
assert not found(lambda: os.link(cache / "new", cache / "second"))
assert found(lambda: os.link(cache / "new", outside / "second"))
assert found(lambda: os.link(outside / "file", cache / "third"))
assert found(lambda: os.link("file", "fourth", src_dir_fd=o, dst_dir_fd=c))
assert not found(lambda: os.symlink(outside / "file", cache / "leads out")), "it was not followed"
assert found(lambda: (cache / "leads out").read_text())
assert found(lambda: os.truncate(cache / "leads out", 0))
assert found(lambda: os.chmod(cache / "leads out", 0o600))
assert not found(lambda: (cache / "leads out").unlink()), "the link itself was removed"
assert found(lambda: os.symlink(cache / "file", outside / "leads in"))
assert found(lambda: os.symlink(cache / "file", "leads in 2", dir_fd=o))
assert found(lambda: (outside / "leads in").unlink())
assert os.open is guard._os_open

def in_a_thread(act):
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
assert found(lambda: in_a_thread(lambda: os.close(os.open("file", os.O_RDONLY, dir_fd=o))))
assert not found(lambda: in_a_thread(lambda: os.close(os.open("file", os.O_RDONLY, dir_fd=c))))

problems = worker.Problems()
def refuse(text):
    raise worker.PrecastError(text)
def fail():
    raise KeyError("x")
problems.attempt("a", lambda: refuse("one line"))
assert (problems.found, problems.refused) == ([], 1)
problems.attempt("b", fail)
assert problems.found[0].startswith("b: KeyError at <string>:")
"""


def test_the_guard_notices_what_it_should(python, tmp_path):
    result = python("-c", GUARDED, str(FUZZ), str(tmp_path))
    assert result.returncode == 0, result.stderr
