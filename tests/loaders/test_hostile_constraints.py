"""Hostile constraints end within the time limit: each gives some tokens, or an error of one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llguidance")

SCRIPT = Path(__file__).parent.parent / "fuzz" / "constraints_hostile.py"
LONGEST_S = 20.0  # a few seconds on an idle machine
LARGEST_MB = 600


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 69), pytest.param(1000, 506, marks=pytest.mark.long)], ids=["some", "many"]
)
def test_hostile_constraints_are_bounded(seed: int, count: int) -> None:
    command = [sys.executable, str(SCRIPT), str(seed), str(count)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=900, check=False)
    assert result.returncode == 0, result.stdout[-300:] + result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == count
    assert max(case["seconds"] for case in found) < LONGEST_S
    assert max(case["peak_mb"] for case in found) < LARGEST_MB
    for case in found:
        assert case["outcome"] == "generated" or case["outcome"].endswith((".", ";")), case
        assert "\n" not in case["outcome"], case
    assert {case["outcome"] == "generated" for case in found} == {True, False}
