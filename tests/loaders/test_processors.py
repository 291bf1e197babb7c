"""Logits after bias, penalties and forbidden tokens, against recorded scores of transformers' processors.

``tests/reference/make_processors.py`` recorded them; if torch is installed, the test also compares with transformers
directly.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.loaders.generation.sampling import Sampler
from precast.loaders.generation.sampling_params import SamplingParams

FILE = Path(__file__).parent.parent / "reference" / "processors.json"
RECORDS = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script(import_reference_script: Callable[[str], Any]) -> Any:
    """Return the script that writes the reference."""
    return import_reference_script("make_processors")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_scores_are_those_of_transformers(record: dict[str, Any], script: Any) -> None:
    logits = script.logits()
    sampler = Sampler(SamplingParams(**record["said"]), script.PROMPT, script.V, script.ENDS)
    for token in script.ANSWER:
        sampler.observe(token)
    expected = [-np.inf if score is None else score for score in record["scores"]]
    np.testing.assert_array_equal(sampler._adjusted(logits), np.array(expected, np.float32))
    assert np.array_equal(logits, script.logits())


def test_every_case_is_recorded(script: Any) -> None:
    assert [(r["name"], r["said"]) for r in RECORDS] == list(script.CASES.items())
    changed = [r for r in RECORDS if r["scores"] != RECORDS[0]["scores"]]
    assert [r["name"] for r in RECORDS if r not in changed] == ["nothing", "min_length-reached"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_transformers_still_gives_the_recorded_scores(
    torch: Any, record: dict[str, Any], script: Any
) -> None:
    assert script.scores(record["said"]) == record["scores"]
