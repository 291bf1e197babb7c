"""A short run of `make kill`, and proof that it notices an incomplete artifact."""

import json
import shutil
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parent / "fuzz"


@pytest.mark.parametrize(
    ("command", "kills"),
    [("add-target", 3), ("pull", 12), ("add-prefix", 3), ("remove-prefix", 5), ("batch", 3)],
)
def test_killed_at_random_moments(tiny_artifact, python, command, kills):
    """Only `make kill` kills exports, because they take longest."""
    result = python(
        str(FUZZ / "kill.py"), "--artifact", str(tiny_artifact), "--only", command, "--kills", str(kills)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["findings"] == 0


HALF = """
import shutil, sys
from pathlib import Path
from random import Random
sys.path.insert(0, sys.argv[1])
import kill

whole, folder = Path(sys.argv[2]), Path(sys.argv[3])
artifact = folder / "made" / "tiny"

def careless():
    '''Copy file by file, slowly.'''
    import time
    shutil.rmtree(artifact, ignore_errors=True)
    for path in sorted(whole.rglob("*")):
        if path.is_file():
            copy = artifact / path.relative_to(whole)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            time.sleep(0.02)

outcomes, found = kill.kill(kill.Command("careless", artifact, careless, True), 4, Random(1), folder / "log")
assert any("after kill" in text for text in found), (outcomes, found)
"""


def test_an_incomplete_artifact_is_noticed(tiny_artifact, python, tmp_path):
    result = python("-c", HALF, str(FUZZ), str(tiny_artifact), str(tmp_path))
    assert result.returncode == 0, result.stderr


POINTS = """
import os, shutil, sys
from pathlib import Path
from precast.loaders import add_prefix as adding
from precast.loaders.artifact import folders
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.files import unlisted_files
from precast.loaders.artifact_changes import PREFIXES, changing
from precast.loaders.audit.verify import check_files
from precast.loaders.locate import read_manifest

sys.path.insert(0, sys.argv[1])
from kill import run_and_exit
from run import sign_base

plain, prefixed, root = (Path(argument) for argument in sys.argv[2:])
sign_base(plain)
sign_base(prefixed)
(prefix,) = read_manifest(prefixed).prefixes
contents = {name: [(prefixed / name).read_bytes()] for name in (prefix.file, prefix.arrays)}
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
quiet = lambda _: None

def add():
    with changing(root, PREFIXES, None, quiet) as (artifact, manifest):
        adding._store(artifact, manifest, prefix, contents)

def remove():
    adding.remove_prefix(root, prefix.name, log=quiet)

def replace():
    with folders.new_folder(root, overwrite=True) as folder:
        shutil.copytree(plain, folder, copy_function=os.link, dirs_exist_ok=True)

def tidy():
    try:
        adding.remove_prefix(root, "none", log=quiet)
    except PrecastError as error:
        assert "prefix 'none'" in str(error)

def killed_before(n, function):
    '''Run a function in a process that ends before its n-th change of files; return the process's exit code.'''
    if (child := os.fork()) != 0:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename") or (
            event == "open" and arguments[2] & writing
        ):
            seen += 1
            if seen == n:
                os._exit(9)
    sys.addaudithook(hook)
    run_and_exit(function)

for before, act, after in ((plain, add, tidy), (prefixed, remove, tidy), (plain, replace, replace)):
    code, n = 9, 0
    while code == 9:
        n += 1
        shutil.rmtree(root.parent, ignore_errors=True)
        shutil.copytree(before, root)
        code = killed_before(n, act)
        where = f"{act.__name__}, before change {n}"
        assert code in (0, 9), where
        manifest = read_manifest(root)
        assert not check_files(root, manifest, quiet).problems, where
        after()
        assert read_manifest(root).prefixes == manifest.prefixes, where
        signature = root / "manifest.json.sig"
        is_signed = (root / "manifest.json").read_bytes() == (before / "manifest.json").read_bytes()
        assert signature.exists() == is_signed, where
        left = [path.name for path in root.parent.iterdir() if path != root]
        assert left + unlisted_files(root, manifest.files) == [], where
    assert n > 10
    print(act.__name__, n)
"""


def test_killed_before_every_change_of_files(tiny_artifact, prefixed_artifact, python, tmp_path):
    """The next command completes or undoes the change, removes leftovers, and restores a valid signature."""
    plain, prefixed = tmp_path / "plain" / "tiny", tmp_path / "prefixed" / "tiny"
    shutil.copytree(tiny_artifact, plain)
    shutil.copytree(prefixed_artifact, prefixed)
    result = python("-c", POINTS, str(FUZZ), str(plain), str(prefixed), str(tmp_path / "in" / "tiny"))
    assert result.returncode == 0, result.stderr
