"""A short run of `make fuzz`: a few hundred mutated artifacts, and proof that the harness notices what it looks for."""

import json
import re
import shutil
import sys
from pathlib import Path
from random import Random

import pytest

FUZZ = Path(__file__).resolve().parent / "fuzz"
# Each of the others starts a process a case; they are part of make fuzz.
QUICK = "manifest,manifest_bytes,weights,weights_and_manifest,tokenizer,template,golden,names,folder,altered,store"


@pytest.fixture
def fuzzing(monkeypatch):
    """The modules of the folder, which are scripts."""
    monkeypatch.syspath_prepend(str(FUZZ))
    yield
    for name in ("kinds", "mutate", "run", "templates", "worker"):
        sys.modules.pop(name, None)


@pytest.fixture
def signed(tiny_artifact, tmp_path, fuzzing) -> Path:
    """The artifact, with a signature and the key for it."""
    from run import sign_base

    folder = tmp_path / "base" / "artifact"
    shutil.copytree(tiny_artifact, folder)
    sign_base(folder)
    return folder


def run(python, artifact, tmp_path, *options) -> list[str]:
    result = python(
        str(FUZZ / "run.py"), "--artifact", str(artifact), "--findings", str(tmp_path / "findings"), *options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_hundreds_of_mutated_artifacts(tiny_artifact, python, tmp_path):
    lines = run(python, tiny_artifact, tmp_path, "--cases", "250", "--only", QUICK, "--processes", "1")
    assert json.loads(lines[-1]) | {"seconds": 0} == {"cases": 250, "findings": 0, "seconds": 0}
    assert re.search(r"^manifest +\d+ +0 +[\d.]+ s +\d+ refused", "\n".join(lines), re.MULTILINE)


def test_mutated_programs(tiny_artifact, python, tmp_path):
    lines = run(python, tiny_artifact, tmp_path, "--cases", "3", "--only", "executable", "--processes", "1")
    assert json.loads(lines[-1])["findings"] == 0


def test_mutated_signatures(signed, python, tmp_path):
    lines = run(python, signed, tmp_path, "--cases", "40", "--only", "signature", "--processes", "1")
    assert json.loads(lines[-1])["findings"] == 0
    assert re.search(r"^signature +40 +0 +[\d.]+ s +\d+ refused", "\n".join(lines), re.MULTILINE)


def test_a_case_can_be_made_again(signed, fuzzing):
    import kinds

    base = kinds.Base.read(signed)
    for kind in kinds.KINDS:
        cases = [kinds.make(base, kind, n) for n in range(6)]
        assert cases == [kinds.make(base, kind, n) for n in range(6)]
        assert len({repr(case) for case in cases}) > 2
        assert all(case.changes or case.index for case in cases)


def test_what_is_past_the_hashes_is_past_them(tiny_artifact, fuzzing):
    import hashlib

    import kinds

    base = kinds.Base.read(tiny_artifact)
    for kind in ("weights", "tokenizer", "template", "golden", "stablehlo", "executable"):
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


# In a process of its own, which an audit hook stays in.
GUARDED = """
import os, shutil, socket, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import worker

inside, outside, cache = (Path(sys.argv[2]) / name for name in ("inside", "outside", "cache"))
for folder in (inside, outside, cache):
    folder.mkdir()
    (folder / "file").write_text("x")
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
(outside / "tree").mkdir()
(outside / "tree" / "file").write_text("x")
(cache / "tree").mkdir()
(cache / "tree" / "file").write_text("x")
assert not found(lambda: shutil.rmtree(cache / "tree"))
assert found(lambda: shutil.rmtree(outside / "tree"))
assert found(lambda: socket.socket().connect(("127.0.0.1", 9)))
assert not found(lambda: (outside / "none")), "nothing was opened"

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
