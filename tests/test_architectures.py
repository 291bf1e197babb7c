"""Every architecture against transformers with torch: tiny random checkpoints, odd shapes, every RoPE.

``tests/reference/make_architectures.py`` recorded the answers of transformers and recreates the checkpoints without
torch. Where torch is installed, the tests also compute the answers again.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.exporter.export import export
from precast.exporter.models.parameters import abstract_model
from precast.exporter.models.registry import ARCHITECTURES, read_model
from precast.exporter.options import ExportOptions
from precast.exporter.programs import Geometry, ring_size
from precast.exporter.reference.fidelity import read_weights
from precast.exporter.sources.base import Source
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.engine import DecodeRow
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load

REFERENCE = Path(__file__).parent / "reference"

# Logits have a standard deviation of a few units.
TOLERANCE = 1e-3
# Limits of the mean Kullback-Leibler divergence from the float32 predictions, in nats; predictions for another position
# have 2 to 7. Rows of 36 to 72 random numbers, 32 of which share a scale, are a worst case for rounding. Measured: at
# most 0.002 and 0.24, or 0.017 and 1.1 if a rounded score selects another expert.
LOST = {"int8": 0.01, "int4": 0.5}
LOST_BY_MIXTURES = {"int8": 0.05, "int4": 1.5}


def _load_script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REFERENCE))
        return importlib.import_module("make_architectures")


SCRIPT = _load_script()
RECORDS = SCRIPT.read_records()
NAMES = list(RECORDS)
# The RoPE types of each family.
ROPES = {
    "llama": {"default", "linear", "llama3", "yarn"},
    "qwen2": {"default", "yarn"},
    "qwen3": {"default", "yarn"},
    "qwen3_moe": {"default", "yarn"},
    "gemma3_text": {"default", "linear"},
    "phi3": {"default", "longrope"},
}
# One checkpoint of each architecture, for slow tests.
FIRST = list({record["config"]["model_type"]: name for name, record in reversed(RECORDS.items())}.values())
# The same, except one whose answers are too close to ties for an export in int4.
REDUCED = ["olmo2-tied-biases-linear" if name == "olmo2-three-heads" else name for name in FIRST]
WINDOWED = [name for name, record in RECORDS.items() if record["config"].get("sliding_window")]


# Every run tests one checkpoint of each architecture; its siblings vary the options.
EACH = [pytest.param(name, marks=() if name in FIRST else pytest.mark.long) for name in NAMES]
# These four architectures cover windows, mixtures of experts, several RoPE tables and special layers.
SHORT_TYPES = ("llama", "gemma3_text", "mixtral", "gpt2")


def _short(names: Sequence[str]) -> list[Any]:
    """Mark the tests of architectures outside `SHORT_TYPES` as long."""
    types = {name: RECORDS[name]["config"]["model_type"] if name in RECORDS else name for name in names}
    return [pytest.param(n, marks=() if types[n] in SHORT_TYPES else pytest.mark.long) for n in names]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A checkpoint, the record of transformers' answers, and the exported artifact."""

    record: dict[str, Any]
    source: Source
    artifact: Path
    model: Model

    @property
    def sequence(self) -> list[int]:
        """The last prompt and its answer, which together fill the KV cache."""
        case = self.record["cases"][-1]
        return case["prompt_token_ids"] + case["token_ids"]


@pytest.fixture(scope="session")
def open_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """Make a checkpoint of the reference and open it."""

    def make(name: str) -> Source:
        folder = tmp_path_factory.mktemp("checkpoints") / name
        SCRIPT.write_checkpoint(folder, RECORDS[name])
        return open_source(str(folder))

    return make


@pytest.fixture(scope="session")
def export_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, open_checkpoint: Callable[[str], Source]
) -> Callable[[str], Exported]:
    """Export a checkpoint of the reference in float32, once."""
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in made:
            source, artifact = open_checkpoint(name), tmp_path_factory.mktemp("exported") / name
            _export(source, artifact, targets=("cpu", "portable") if name in FIRST else ("cpu",))
            made[name] = Exported(
                record=RECORDS[name], source=source, artifact=artifact, model=load(artifact)
            )
        return made[name]

    return make


def _export(source: Source, artifact: Path, *, weights: str = "float32", targets: tuple[str, ...]) -> None:
    options = ExportOptions(buckets=SCRIPT.BUCKETS, context=SCRIPT.CAPACITY, weights=weights, targets=targets)
    export(source, artifact, options)


@pytest.fixture(params=EACH)
def exported(request: pytest.FixtureRequest, export_checkpoint: Callable[[str], Exported]) -> Exported:
    return export_checkpoint(request.param)


def _answers(model: Model, record: dict[str, Any]) -> list[list[int]]:
    params = SamplingParams(max_tokens=SCRIPT.TOKENS, ignore_eos=True)
    return [list(model.generate(c["prompt_token_ids"], params).token_ids) for c in record["cases"]]


def _expected(record: dict[str, Any]) -> list[list[int]]:
    return [case["token_ids"] for case in record["cases"]]


def _uncached(source: Source, sequence: Sequence[int]) -> np.ndarray:
    """Return the logits ``[T, V]`` of the Flax forward pass with the source's weights."""
    import jax
    import jax.numpy as jnp

    spec = read_model(source.config, source.name)
    model = abstract_model(spec)
    weights = {name: jnp.asarray(array) for name, array in read_weights(source, spec).items()}
    # Tables for the exported context, because some depend on the context length.
    tables = spec.tables(SCRIPT.CAPACITY)
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(lambda tokens, *arrays: model.bind(arrays).forward(tokens, *tables))
        logits = forward(np.array([sequence], np.int32), *(weights[p.name] for p in model.parameters))
    return np.asarray(logits)[0]


# --- the reference itself -----------------------------------------------------------------------------------


def test_the_reference_covers_every_architecture() -> None:
    checkpoints = SCRIPT.tiny_checkpoints()
    assert sorted(tiny.name for tiny in checkpoints) == sorted(NAMES)
    assert {record["config"]["model_type"] for record in RECORDS.values()} == set(ARCHITECTURES)
    for model_type in ARCHITECTURES:
        records = [r for r in RECORDS.values() if r["config"]["model_type"] == model_type]
        assert len(records) > 1, model_type
        # gpt2's default is true
        assert {r["config"].get("tie_word_embeddings", True) for r in records} == {True, False}, model_type
        assert _rope_types(records) >= ROPES.get(model_type, set()), model_type


def _rope_types(records: Sequence[dict[str, Any]]) -> set[str]:
    """Return the types of all RoPEs in a config, in any spelling and place."""
    places = [r["config"].get(key) or {} for r in records for key in ("rope_parameters", "rope_scaling")]
    places += [nested for place in places for nested in place.values() if isinstance(nested, dict)]
    return {place[key] for place in places for key in ("rope_type", "type") if key in place}


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_the_same_everywhere(name: str) -> None:
    assert SCRIPT.digest(SCRIPT.make_tensors(RECORDS[name])) == RECORDS[name]["sha256"]


def test_prompts_cover_every_edge_case() -> None:
    """Prompts are shorter than a bucket, as long as one, and longer than the largest; most exceed the window."""
    small, large = SCRIPT.BUCKETS
    for record in RECORDS.values():
        lengths = [len(case["prompt_token_ids"]) for case in record["cases"]]
        assert max(lengths) + SCRIPT.TOKENS == SCRIPT.CAPACITY
        assert {len(tokens) for tokens in _expected(record)} == {SCRIPT.TOKENS}
        if "original_max_position_embeddings" not in record["config"]:
            assert min(lengths) < small
            assert large in lengths
    for name in WINDOWED:
        window = RECORDS[name]["config"]["sliding_window"]
        assert window < max(len(case["prompt_token_ids"]) for case in RECORDS[name]["cases"])


# --- float32 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_uncached_pass_gives_every_logit(open_checkpoint: Callable[[str], Source], name: str) -> None:
    case = RECORDS[name]["cases"][-1]
    found = _uncached(open_checkpoint(name), case["prompt_token_ids"] + case["token_ids"])
    expected = SCRIPT.read_logits(RECORDS[name])["uncached"]
    np.testing.assert_allclose(found[:: SCRIPT.POSITIONS, :: SCRIPT.STRIDE], expected, rtol=0, atol=TOLERANCE)


def test_greedy_tokens_are_those_of_transformers(exported: Exported) -> None:
    assert _answers(exported.model, exported.record) == _expected(exported.record)


def test_logits_of_prefill_and_decode(exported: Exported) -> None:
    engine, logits = exported.model.engine, SCRIPT.read_logits(exported.record)
    for i, case in enumerate(exported.record["cases"]):
        cache = engine.new_cache()
        step = engine.prefill(case["prompt_token_ids"], cache)
        first = np.array(engine.logits(step)[0, :: SCRIPT.STRIDE])
        for position, token in enumerate(case["token_ids"][:-1], start=len(case["prompt_token_ids"])):
            step = engine.decode([DecodeRow(0, token, position)], cache)
        last = engine.logits(step)[0, :: SCRIPT.STRIDE]
        np.testing.assert_allclose(first, logits["first"][i], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(last, logits["last"][i], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [p for p in EACH if p.values[0] in WINDOWED])
def test_layers_with_a_window_keep_a_ring(export_checkpoint: Callable[[str], Exported], name: str) -> None:
    manifest, window = export_checkpoint(name).model.manifest, RECORDS[name]["config"]["sliding_window"]
    ring = ring_size(window, Geometry(context=SCRIPT.CAPACITY, slots=1, buckets=SCRIPT.BUCKETS))
    keys = [array for array in manifest.cache if array.name.endswith("keys")]
    assert {array.window: array.shape[3] for array in keys}[window] == ring < SCRIPT.CAPACITY // 2
    assert sorted(layer for array in keys for layer in array.layers) == list(range(manifest.model.layers))


@pytest.mark.parametrize("name", _short(FIRST))
def test_the_portable_target_gives_the_same_tokens(
    export_checkpoint: Callable[[str], Exported], name: str
) -> None:
    exported = export_checkpoint(name)
    model = load(exported.artifact, target="portable", allow_compile=True, log=lambda _: None)
    assert model.target.runtime == "stablehlo"
    assert _answers(model, exported.record) == _expected(exported.record)


# --- configs that are not quite these -----------------------------------------------------------------------


@pytest.mark.parametrize("model_type", _short(list(ARCHITECTURES)))
def test_a_changed_config_gives_the_numbers_of_transformers_or_none(
    open_checkpoint: Callable[[str], Source], model_type: str
) -> None:
    """A change of any key has the same effect as in transformers or is refused."""
    record = SCRIPT.subject(model_type)
    source = open_checkpoint(record["name"])
    before = _last_logits(source, record)
    known, wrong, refused = {_fingerprint(source): before}, [], 0
    for row in SCRIPT.read_mutations(record["name"]):
        changed = dataclasses.replace(source, config={**source.config, **row["change"]})
        try:
            shape = _fingerprint(changed)
            if shape not in known:
                known[shape] = _last_logits(changed, record)
        except PrecastError:
            refused += 1
            continue
        expected = before if row["logits"] == "same" else row["logits"]
        if expected is None or np.abs(known[shape] - expected).max() > TOLERANCE:
            wrong.append(row["change"])
    assert wrong == []
    # At least one change was compared and one refused.
    assert len(known) > 3
    assert refused > 10


def _last_logits(source: Source, record: dict[str, Any]) -> np.ndarray:
    """Return the logits after the last prompt and its answer, without compiling a program for each config."""
    import jax

    case = record["cases"][-1]
    with jax.disable_jit():
        return _uncached(source, case["prompt_token_ids"] + case["token_ids"])[-1, :: SCRIPT.STRIDE]


def _fingerprint(source: Source) -> tuple[str, bytes]:
    """Return everything in a config that affects the forward pass."""
    spec = read_model(source.config, source.name)
    return repr(spec.config), b"".join(table.tobytes() for table in spec.tables(SCRIPT.CAPACITY))


# --- fewer bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", list(LOST))
@pytest.mark.parametrize("name", _short(REDUCED))
def test_quantised_exports_stay_close(
    export_checkpoint: Callable[[str], Exported], tmp_path: Path, name: str, weights: str
) -> None:
    exported = export_checkpoint(name)
    _export(exported.source, tmp_path / "artifact", weights=weights, targets=("cpu",))
    prompt = len(exported.record["cases"][-1]["prompt_token_ids"])
    exact, found = (
        _log_softmax(_forced(model, exported.sequence, prompt))
        for model in (exported.model, load(tmp_path / "artifact"))
    )
    divergence = (np.exp(exact) * (exact - found)).sum(axis=-1).mean()
    mixture = "num_experts_per_tok" in exported.record["config"]
    assert divergence < (LOST_BY_MIXTURES if mixture else LOST)[weights]


def _forced(model: Model, sequence: Sequence[int], prompt: int) -> np.ndarray:
    """Return logits ``[T - prompt, V]`` after feeding the rest of the sequence token by token."""
    engine, cache = model.engine, model.engine.new_cache()
    step = engine.prefill(sequence[:prompt], cache)
    rows = [engine.logits(step)[0].copy()]
    for position, token in enumerate(sequence[prompt:-1], start=prompt):
        step = engine.decode([DecodeRow(0, token, position)], cache)
        rows.append(engine.logits(step)[0].copy())
    return np.stack(rows)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# --- where torch is installed -------------------------------------------------------------------------------


@pytest.fixture
def live(one_thread: Any) -> Any:
    """Return the script that writes the reference, or skip if it cannot run."""
    return SCRIPT


@pytest.mark.parametrize("name", FIRST)
def test_the_reference_is_up_to_date(live: Any, name: str) -> None:
    assert live.differences(RECORDS[name]) == []
