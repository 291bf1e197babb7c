"""Artifacts moved between two jaxlibs, in both directions: executables are refused by name, and StableHLO compiles.

PRECAST_OTHER_PYTHON must name an interpreter with precast and another jaxlib, as `.ci/run` does.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from precast.loaders.runtime.pjrt import jaxlib_version

OTHER = os.environ.get("PRECAST_OTHER_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not OTHER, reason="PRECAST_OTHER_PYTHON names no interpreter with another jaxlib"
)
ROOT = Path(__file__).resolve().parent.parent
IDS = ("--ids", "7,200,31", "-n", "12", "--ignore-eos", "--temperature", "0", "--json")


def other(*arguments: object) -> Any:
    return subprocess.run(
        [OTHER, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def other_jaxlib() -> str:
    found = other("-c", "from jaxlib.version import __version__ as v; print(v)").stdout.strip()
    assert found, f"{OTHER} has no jaxlib"
    assert found != jaxlib_version, "both interpreters have the same jaxlib"
    return found


def tokens(result: Any, compiles: int) -> tuple[list[int], str]:
    """Return the answer and the target of a run that must have compiled this number of programs."""
    stderr = result.stderr
    assert (result.exit_code if hasattr(result, "exit_code") else result.returncode) == 0, stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["compiles"] == compiles, stderr
    assert found["timing"]["target"] == found["target"]
    return found["token_ids"], found["target"]


def check(
    root: Path, made_by: str, run_by: str, here: Callable[..., Any], there: Callable[..., Any], programs: int
) -> None:
    """Check that `there` refuses the executables of an artifact made by `here`, and compiles its StableHLO."""
    answer, native = tokens(here("run", root, *IDS), 0)
    refused = there("run", root, *IDS)
    assert (refused.exit_code if hasattr(refused, "exit_code") else refused.returncode) == 2
    assert (
        f"target {native!r}: it was compiled by jaxlib {made_by}, but {run_by} is installed" in refused.stderr
    )
    assert "or compile from StableHLO with --compile." in refused.stderr
    # Two targets are compiled on request: the one whose executables do not fit, and the portable one.
    assert tokens(there("run", root, *IDS, "--compile"), programs) == (answer, native)
    again = there("run", root, *IDS, "--compile")
    assert tokens(again, 0) == (answer, native)
    assert "all programs were compiled here before" in again.stderr
    # The portable target has an additional program, which decodes a single sequence.
    assert tokens(there("run", root, *IDS, "--compile", "--target", "portable"), programs + 1) == (
        answer,
        "portable",
    )
    # add-target compiles the programs once, as a new target.
    added = there("add-target", root)
    assert f"target {native}-jaxlib{run_by} added: {programs} programs" in added.stdout, added.stderr
    assert tokens(there("run", root, *IDS, "--rehash"), 0) == (answer, f"{native}-jaxlib{run_by}")
    assert tokens(here("run", root, *IDS), 0) == (answer, native)


def test_an_artifact_made_here_runs_there(artifact_copy, other_jaxlib, cli, own_cache):
    check(artifact_copy, jaxlib_version, other_jaxlib, cli, lambda *a: other("cli.py", *a), 5)


def test_an_artifact_made_there_runs_here(tiny_checkpoint, tmp_path, other_jaxlib, python, own_cache):
    # Use a new process, because this one has imported jax.
    root = tmp_path / "made-there"
    options = ("--buckets", "8", "--context", "64", "--weights", "float32")
    made = other("cli.py", "export", tiny_checkpoint(), "-o", root, *options)
    assert made.returncode == 0, made.stderr
    check(
        root,
        other_jaxlib,
        jaxlib_version,
        lambda *a: other("cli.py", *a),
        lambda *a: python("cli.py", *map(str, a)),
        4,
    )
