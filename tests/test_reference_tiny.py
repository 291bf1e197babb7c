"""precast compared with transformers and torch in float32, on tiny checkpoints of every supported shape.

``tests/reference/make_reference.py`` recorded the answers of transformers. If torch is installed, they are computed
again.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.exporter.export import export
from precast.exporter.models.parameters import abstract_model
from precast.exporter.models.registry import read_model
from precast.exporter.options import ExportOptions
from precast.exporter.sources.base import Source
from precast.exporter.sources.open import open_source
from precast.loaders.generation.engine import DecodeRow
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load

REFERENCE = Path(__file__).parent / "reference"
TINY = REFERENCE / "tiny"
NAMES = sorted(path.parent.name for path in TINY.glob("*/config.json"))

# The checkpoints whose portable target is also compared.
PORTABLE = ("llama-untied-linear-biases", "qwen2-tied-llama3")

BUCKETS, CAPACITY = (8, 16, 32), 160
STRIDE = 20
# Logits have a range of a few units. Float32 sums of some dozens of terms in another order differ by 1e-6 of this
# range.
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    prompt: list[int]
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A checkpoint, the answers of transformers, and the artifact."""

    folder: Path
    source: Source
    cases: Sequence[Case]
    logits: Mapping[str, np.ndarray]
    artifact: Path
    model: Model

    @property
    def sequence(self) -> list[int]:
        """Return the longest prompt and its answer, which fill the context."""
        return max((case.prompt + case.tokens for case in self.cases if len(case.tokens) > 1), key=len)


@pytest.fixture(scope="session")
def export_reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return a function that exports a reference checkpoint, each only once."""
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in made:
            made[name] = _export(name, tmp_path_factory.mktemp("reference"))
        return made[name]

    return make


def _export(name: str, work: Path) -> Exported:
    folder = Path(shutil.copytree(TINY / name, work / name))
    shutil.copy(TINY / "tokenizer.json", folder)
    record = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    source = open_source(str(folder))
    artifact = work / "artifact"
    targets = ("cpu", "portable") if name in PORTABLE else ("cpu",)
    export(
        source, artifact, ExportOptions(buckets=BUCKETS, context=CAPACITY, weights="float32", targets=targets)
    )
    with np.load(folder / "reference.npz") as arrays:
        logits = dict(arrays)
    cases = [Case(prompt=c["prompt_token_ids"], tokens=c["token_ids"]) for c in record["cases"]]
    return Exported(
        folder=folder, source=source, cases=cases, logits=logits, artifact=artifact, model=load(artifact)
    )


@pytest.fixture(params=NAMES)
def exported(request: pytest.FixtureRequest, export_reference: Callable[[str], Exported]) -> Exported:
    return export_reference(request.param)


@pytest.fixture(scope="session")
def make_reference(import_reference_script: Callable[[str], Any]) -> Any:
    """Return the script that writes the reference."""
    return import_reference_script("make_reference")


def _answers(model: Model, cases: Sequence[Case]) -> list[list[int]]:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    return [list(model.generate(case.prompt, params).token_ids) for case in cases]


def test_the_reference_covers_every_variant(make_reference: Any) -> None:
    assert sorted(tiny.name for tiny in make_reference.tiny_checkpoints()) == NAMES
    assert (make_reference.BUCKETS, make_reference.CAPACITY, make_reference.STRIDE) == (
        BUCKETS,
        CAPACITY,
        STRIDE,
    )
    for model_type in ("llama", "qwen2"):
        variants = [t for t in make_reference.tiny_checkpoints() if t.model_type == model_type]
        assert {t.tied for t in variants} == {True, False}
        assert {t.old_spelling for t in variants} == {True, False}
        assert {t.rope.get("rope_type", "default") for t in variants} == {"default", "linear", "llama3"}


def test_prompts_meet_every_edge(exported: Exported) -> None:
    lengths = {len(case.prompt) for case in exported.cases}
    assert {1, CAPACITY - 1} | {b + d for b in BUCKETS for d in (-1, 0, 1)} <= lengths
    assert {min(20, CAPACITY - len(c.prompt)) - len(c.tokens) for c in exported.cases} == {0}
    assert len(exported.sequence) == CAPACITY


def test_greedy_tokens_are_those_of_transformers(exported: Exported) -> None:
    assert _answers(exported.model, exported.cases) == [case.tokens for case in exported.cases]


@pytest.mark.parametrize("name", PORTABLE)
def test_the_portable_target_answers_the_same(export_reference: Callable[[str], Exported], name: str) -> None:
    exported = export_reference(name)
    model = load(exported.artifact, target="portable", allow_compile=True, log=lambda _: None)
    assert model.target.runtime == "stablehlo"
    assert _answers(model, exported.cases) == [case.tokens for case in exported.cases]


def test_logits_of_prefill_and_decode(exported: Exported) -> None:
    engine = exported.model.engine
    for i, case in enumerate(exported.cases):
        cache = engine.new_cache()
        step = engine.prefill(case.prompt, cache)
        first = np.array(engine.logits(step)[0])
        for position, token in enumerate(case.tokens[:-1], start=len(case.prompt)):
            step = engine.decode([DecodeRow(0, token, position)], cache)
        last = engine.logits(step)[0, ::STRIDE]
        np.testing.assert_allclose(first, exported.logits["first"][i], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(last, exported.logits["last"][i], rtol=0, atol=TOLERANCE)


def _uncached(source: Source, sequence: Sequence[int]) -> np.ndarray:
    """Run the Flax forward pass on the source's tensors; return logits ``[T, V]``."""
    import jax

    spec = read_model(source.config, source.name)
    model = abstract_model(spec)
    arrays = [
        np.stack([source.tensors[name].read() for name in p.sources]).reshape(p.shape)
        for p in model.parameters
    ]
    cos, sin = spec.tables(len(sequence))

    def forward(tokens: Any, *weights: Any) -> Any:
        return model.bind(weights).forward(tokens, cos, sin)

    return np.asarray(jax.jit(forward)(np.array([sequence], np.int32), *arrays))[0]


def test_the_uncached_pass_gives_every_logit(exported: Exported) -> None:
    found = _uncached(exported.source, exported.sequence)
    np.testing.assert_allclose(found[:, ::STRIDE], exported.logits["uncached"], rtol=0, atol=TOLERANCE)


def test_a_wrong_rope_frequency_is_detected(export_reference: Callable[[str], Exported]) -> None:
    """The comparison is sensitive enough: without its RoPE scaling the model gives other logits."""
    exported = export_reference("llama-untied-linear-biases")
    unscaled = dataclasses.replace(exported.source, config={**exported.source.config, "rope_scaling": None})
    found = _uncached(unscaled, exported.sequence)
    assert np.abs(found[:, ::STRIDE] - exported.logits["uncached"]).max() > 100 * TOLERANCE


# --- with torch ---------------------------------------------------------------------------------------------


@pytest.fixture
def reference_script(one_thread: Any, make_reference: Any) -> Any:
    """Return the script that writes the reference, or skip if it cannot run."""
    return make_reference


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_up_to_date(reference_script: Any, name: str) -> None:
    assert reference_script.tiny_differences(TINY / name) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_uncached_pass_gives_every_logit_of_torch(
    reference_script: Any, export_reference: Callable[[str], Exported], name: str
) -> None:
    exported = export_reference(name)
    expected = reference_script.uncached_logits(
        reference_script.load_reference(exported.folder), exported.sequence
    )
    found = _uncached(exported.source, exported.sequence)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_those_of_transformers(
    reference_script: Any, export_reference: Callable[[str], Exported], name: str
) -> None:
    exported = export_reference(name)
    state = reference_script.load_reference(exported.folder).state_dict()
    assert set(state) - set(exported.source.tensors) <= {"lm_head.weight"}
    for tensor_name, tensor in exported.source.tensors.items():
        np.testing.assert_array_equal(tensor.read(), state[tensor_name].numpy(), err_msg=tensor_name)
