"""The programs of every architecture use only instructions of x86-64-v2, although no XLA flag enforces this."""

import dataclasses
import datetime
import importlib
from pathlib import Path
from typing import Any

import pytest

from precast.exporter.models.registry import ARCHITECTURES, read_model
from precast.exporter.programs import Geometry, build_programs, stored_model
from precast.exporter.sources.open import open_source
from precast.exporter.targets.build import build_target
from precast.exporter.targets.kinds import TARGET_KINDS
from precast.loaders.artifact.machine import cpu_features, processor_family
from precast.loaders.compiling import isa
from precast.loaders.compiling.compiler import compile_programs

REFERENCE = Path(__file__).parents[1] / "reference"
pytestmark = pytest.mark.skipif(
    processor_family() != "x86_64" or isa.widest_level(cpu_features()) is None,
    reason="levels are those of x86-64",
)


def _script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REFERENCE))
        return importlib.import_module("make_architectures")


SCRIPT = _script()
RECORDS = SCRIPT.read_records()
# Vary the formats of weights and cache and the number of slots in turn, because they mainly affect the kernels.
KINDS = (("int8", "bfloat16", 3), ("float32", "float32", 1), ("int4", "int8", 2), ("bfloat16", "float32", 1))


@pytest.fixture(scope="module")
def lowered(tmp_path_factory) -> dict[str, bytes]:
    """Return the StableHLO of the CPU programs of one checkpoint of each architecture, by name."""
    programs = {}
    kind = dataclasses.replace(TARGET_KINDS["cpu"], runtime="stablehlo")
    first = {record["config"]["model_type"]: name for name, record in reversed(RECORDS.items())}
    assert set(first) == set(ARCHITECTURES)
    for i, name in enumerate(sorted(first.values())):
        folder = tmp_path_factory.mktemp("levels")
        SCRIPT.write_checkpoint(folder / name, RECORDS[name])
        source = open_source(str(folder / name))
        spec = read_model(source.config, source.name).with_context(SCRIPT.CAPACITY)
        weights, cache, slots = KINDS[i % len(KINDS)]
        geometry = Geometry(context=SCRIPT.CAPACITY, slots=slots, buckets=(8,), kv_cache=cache)
        specs = build_programs(stored_model(spec, weights), geometry, kind.ops)
        target = build_target(kind, specs, folder, datetime.date(2026, 1, 1), lambda _: None)
        for program in target.programs:
            if program.kind != "cache":
                programs[f"{name} {program.name}"] = (folder / program.stablehlo).read_bytes()
    return programs


def test_no_architecture_needs_more_than_the_default_level(lowered):
    """Clamping signed indices and unused slots once compiled to the instruction andn of BMI1, which needs v3."""
    compiled = compile_programs(lowered.items(), "levels", isa="x86-64-v2", log=lambda _: None)
    executables = {name: c.executable for name, c in compiled.items()}
    assert isa.needed_features("x86-64-v2", executables, "levels") == isa.LEVELS["x86-64-v2"].features
    assert len(executables) == len(("prefill_8", "decode", "score")) * len(ARCHITECTURES)
