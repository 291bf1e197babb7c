"""generation_config.json against transformers' generate(), on a tiny checkpoint with every setting that is applied.

``tests/reference/make_generation.py`` recorded transformers' answers; if torch is installed, the test also compares
with transformers directly.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from precast.exporter.export import export
from precast.exporter.options import ExportOptions
from precast.exporter.sources.generation import KEYS, Treatment
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.manifest import SamplingDefaults
from precast.loaders.generation.model import Model
from precast.loaders.load import load

HERE = Path(__file__).parent / "reference"
RECORDS = json.loads((HERE / "generation.json").read_text(encoding="utf-8"))


def identity(record: dict[str, Any]) -> str:
    return record["name"] + ("-in-config" if record["in_config"] else "")


@pytest.fixture(scope="module")
def script(import_reference_script: Callable[[str], Any]) -> Any:
    """Return the script that writes the reference."""
    return import_reference_script("make_generation")


@pytest.fixture(scope="module")
def model(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    work = tmp_path_factory.mktemp("generation")
    script.write_checkpoint(work / "plain", {}, in_config=False)
    options = ExportOptions(buckets=(8,), context=64, weights="float32", targets=("cpu",))
    export(open_source(str(work / "plain")), work / "artifact", options)
    return load(work / "artifact", log=lambda _: None)


def with_defaults(model: Model, folder: Path) -> Model:
    """Return the model with the end tokens and sampling defaults that an export of the folder would have."""
    source = open_source(str(folder))
    tokenizer = dataclasses.replace(model.manifest.tokenizer, eos_token_ids=source.eos_token_ids)
    manifest = dataclasses.replace(
        model.manifest, tokenizer=tokenizer, sampling=SamplingDefaults(**source.sampling)
    )
    return Model(
        engine=model.engine, tokenizer=model.tokenizer, manifest=manifest, target=model.target, compiles=0
    )


@pytest.mark.parametrize("record", RECORDS, ids=identity)
def test_the_answer_is_that_of_transformers(record, script, model, tmp_path):
    script.write_checkpoint(tmp_path / "model", record["said"], in_config=record["in_config"])
    found = with_defaults(model, tmp_path / "model").generate(script.PROMPT)
    assert list(found.token_ids) == record["tokens"]


def test_every_case_is_recorded(script):
    greedy = next(record["tokens"] for record in RECORDS if record["name"] == script.GREEDY)
    wanted = [(name, where, said) for where in (False, True) for name, said in script.cases(greedy).items()]
    assert [(r["name"], r["in_config"], r["said"]) for r in RECORDS] == wanted


def test_every_applied_key_has_a_case():
    """Keys that apply only with do_sample are excluded; tests/loaders/test_sampling.py tests them."""
    used = {key for record in RECORDS for key in record["said"]}
    applied = {
        key for key, known in KEYS.items() if known.treatment is Treatment.APPLIED and not known.sampling
    }
    assert applied - used == {"stop_strings"}  # generate() accepts it only with a tokenizer


@pytest.mark.parametrize("record", [r for r in RECORDS if not r["in_config"]], ids=identity)
def test_transformers_still_gives_the_recorded_answers(one_thread, record, script, tmp_path):
    script.write_checkpoint(tmp_path / "model", record["said"], in_config=False)
    assert script.answer(tmp_path / "model")[0] == record["tokens"]
