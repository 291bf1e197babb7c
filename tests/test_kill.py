"""A short run of `make kill`, and proof that it notices an incomplete artifact."""

import json
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parent / "fuzz"


@pytest.mark.parametrize(("command", "kills"), [("add-target", 3), ("pull", 12)])
def test_killed_at_random_moments(tiny_artifact, python, command, kills):
    """Exports, which take longest, are left to `make kill`."""
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
