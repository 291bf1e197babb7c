"""The float32 reference as a scorer, and the figures of fidelity in the manifest."""

import dataclasses
import json

import numpy as np
import pytest

from precast.exporter import model_card
from precast.exporter.models.registry import read_model
from precast.exporter.reference import fidelity
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.json_records import to_json
from precast.loaders.artifact.manifest import Fidelity
from precast.loaders.artifact.manifest_parser import parse_manifest
from precast.loaders.console import inspect
from precast.loaders.load import load

FIGURES = {
    "text": "persuasion.txt",
    "tokens": 512,
    "perplexity": 12.34567,
    "reference_perplexity": 12.25,
    "kl_mean": 0.00123456,
    "kl_p99": 0.0204,
    "top1": 0.98765,
}


def ids(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, length]).integers(0, 320, length).tolist())


@pytest.fixture(scope="module")
def source(tiny_source):
    return tiny_source()


@pytest.fixture(scope="module")
def spec(source):
    return read_model(source.config, source.name)


@pytest.fixture
def scorer(source, spec, tiny_model):
    return fidelity.Reference(
        name="tiny",
        spec=spec,
        weights=fidelity.read_weights(source, spec),
        tokenizer=tiny_model.tokenizer,
        context=128,
    )


@pytest.mark.parametrize("lengths", [[64, 20, 9], [9, 20, 64]])
def test_its_logits_equal_the_forward_pass_s(scorer, reference, lengths):
    """The scorer pads a window that is shorter than an earlier window, and does not cut a longer one."""
    for length in lengths:
        window, first = ids(length), length // 2 - 1
        rows = list(scorer.logits(window, first))
        np.testing.assert_allclose(rows, reference(window)[first:-1], rtol=1e-5, atol=1e-5)


def test_weights_are_read_once_each_and_aligned_for_jax(spec, tiny_source):
    original = tiny_source()
    read = []

    def counted(name, tensor):
        def values():
            read.append(name)
            return tensor.read()

        return type(tensor)(shape=tensor.shape, dtype=tensor.dtype, read=values)

    tensors = {name: counted(name, tensor) for name, tensor in original.tensors.items()}
    arrays = fidelity.read_weights(tiny_source(fields={"tensors": tensors}), spec)
    assert sorted(read) == sorted(original.tensors)
    assert all(array.dtype == np.float32 and array.ctypes.data % 64 == 0 for array in arrays.values())
    np.testing.assert_array_equal(
        arrays["model.layers.mlp.down_proj.weight"],
        np.stack([original.tensors[f"model.layers.{i}.mlp.down_proj.weight"].read() for i in range(3)]),
    )


def test_weights_that_do_not_fit_are_refused(spec, tiny_source):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(PrecastError, match=f"tensor '{name}' is missing"):
        fidelity.read_weights(tiny_source(tensors={name: None}), spec)


def test_a_checkpoint_is_a_reference(tiny_checkpoint, reference):
    opened = fidelity.open_reference(str(tiny_checkpoint()))
    assert (opened.vocab, opened.context, opened.name) == (320, 128, "checkpoint")
    np.testing.assert_allclose(
        list(opened.logits(ids(20), 9)), reference(ids(20))[9:-1], rtol=1e-5, atol=1e-5
    )


# --- measuring ----------------------------------------------------------------------------------------------


def test_a_float32_artifact_differs_from_its_source_by_rounding(tiny_model, spec, source):
    seen = []
    found = fidelity.measure(
        tiny_model, spec, source, progress=lambda step: seen.append((step.done, step.total))
    )
    assert (found.text, found.tokens) == ("persuasion.txt", 512)  # 16 windows of 64, half of each
    assert (seen[0], seen[-1]) == ((0, 512), (512, 512))
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)
    assert 1 < found.perplexity < 1e5
    assert 0 <= found.kl_mean <= found.kl_p99 < 1e-6
    assert found.top1 == 1


def test_another_source_scores_worse(tiny_model, spec, tiny_source):
    rng = np.random.default_rng(9)
    noise = 0.3 * rng.standard_normal((320, 48), np.float32)
    original = tiny_source().tensors["lm_head.weight"].read()
    other = tiny_source(tensors={"lm_head.weight": original + noise})
    found = fidelity.measure(tiny_model, spec, other)
    assert found.kl_mean > 0.01
    assert found.top1 < 1
    assert found.perplexity == pytest.approx(
        fidelity.measure(tiny_model, spec, tiny_source()).perplexity, rel=1e-12
    )


def test_given_weights_are_not_read_again(tiny_model, spec, source, tiny_source):
    weights = fidelity.read_weights(source, spec)
    empty = tiny_source(fields={"tensors": {}})
    at_hand = dataclasses.astuple(fidelity.measure(tiny_model, spec, empty, weights=weights))
    layerwise = dataclasses.astuple(fidelity.measure(tiny_model, spec, source))
    assert at_hand[0] == layerwise[0]  # the text's name
    # The results of one program for all layers and of a program per layer differ in the last digits.
    assert at_hand[1:] == pytest.approx(layerwise[1:], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(("context", "tokens"), [pytest.param(8, 512, marks=pytest.mark.long), (100, 500)])
def test_every_context_with_room_for_a_window_is_measured(export_tiny, source, spec, context, tokens):
    # 1,024 tokens are 128 windows of 8, or 10 windows of 100 without the last 24 tokens.
    model = load(export_tiny(buckets=(4,), context=context, slots=2, targets=("cpu",)))
    found = fidelity.measure(model, spec, source)
    assert found.tokens == tokens
    assert found.top1 == 1


def test_a_large_model_is_measured_on_fewer_tokens(tiny_model, spec, source, monkeypatch):
    monkeypatch.setattr(fidelity, "_LARGE", 1000)
    assert fidelity.measure(tiny_model, spec, source).tokens == 256


def test_a_context_without_room_is_not_measured(export_tiny, source, spec):
    model = load(export_tiny(buckets=(4,), context=7, targets=("cpu",)))
    assert fidelity.measure(model, spec, source) is None


def test_the_reference_computes_in_float32_despite_jax_s_settings(scorer, reference):
    import jax

    with jax.default_matmul_precision("bfloat16"):
        rows = list(scorer.logits(ids(20), 9))
    np.testing.assert_allclose(rows, reference(ids(20))[9:-1], rtol=1e-5, atol=1e-5)


# --- showing the figures ------------------------------------------------------------------------------------


@pytest.fixture
def measured(artifact_copy, edit_manifest):
    edit_manifest(artifact_copy, lambda manifest: manifest.update(fidelity=FIGURES))
    return artifact_copy


def test_the_manifest_contains_them(measured):
    manifest = parse_manifest((measured / "manifest.json").read_bytes(), "m.json")
    assert manifest.fidelity == Fidelity(**FIGURES)
    assert parse_manifest(to_json(manifest).encode(), "m.json") == manifest


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"top1": None}, "m.json: fidelity.top1: expected a number, found None; export the model again."),
        (
            {"tokens": 1.5},
            "m.json: fidelity.tokens: expected a whole number, found 1.5; export the model again.",
        ),
        ({"kl": 1}, "m.json: fidelity: key 'kl' is not known"),
    ],
)
def test_invalid_figures_are_refused(artifact_copy, change, text):
    value = json.loads((artifact_copy / "manifest.json").read_text()) | {"fidelity": FIGURES | change}
    with pytest.raises(PrecastError) as raised:
        parse_manifest(json.dumps(value).encode(), "m.json")
    assert str(raised.value).startswith(text)


def test_inspect_shows_them(measured, tiny_artifact):
    assert json.loads(inspect.render(measured, as_json=True))["fidelity"] == FIGURES
    text = inspect.render(measured, as_json=False)
    assert (
        "  fidelity perplexity 12.3457, of the source in float32 12.2500; KL divergence 0.00123 nats per token,"
        " 99th percentile 0.0204; same top token 98.77%\n"
        "           (512 predictions on persuasion.txt)\n"
    ) in text


def test_the_model_card_shows_them(measured):
    manifest = parse_manifest((measured / "manifest.json").read_bytes(), "m.json")
    card = model_card.render(manifest)
    assert "Compared with the source in float32, on 512 predicted tokens of persuasion.txt:\n" in card
    for row in (
        "| perplexity | 12.3457 (float32: 12.2500) |",
        "| KL divergence | 0.00123 nats per token on average, 99th percentile 0.0204 |",
        "| same most likely token | 98.77% |",
    ):
        assert f"\n{row}\n" in card
    assert "\n\n\n" not in card


def test_missing_figures_are_not_shown(artifact_copy, edit_manifest):
    edit_manifest(artifact_copy, lambda manifest: manifest.update(fidelity=None))
    manifest = parse_manifest((artifact_copy / "manifest.json").read_bytes(), "m.json")
    assert "Measured" not in model_card.render(manifest)
    assert "\n\n\n" not in model_card.render(manifest)
    assert "fidelity" not in inspect.render(artifact_copy, as_json=False)
    assert json.loads(inspect.render(artifact_copy, as_json=True))["fidelity"] is None


def test_an_infinite_perplexity_is_shown_in_words(artifact_copy, edit_manifest):
    edit_manifest(artifact_copy, lambda m: m.update(fidelity=FIGURES | {"perplexity": None}))
    manifest = parse_manifest((artifact_copy / "manifest.json").read_bytes(), "m.json")
    assert "| perplexity | beyond the range of a float (float32: 12.2500) |" in model_card.render(manifest)
    assert "perplexity beyond the range of a float, of the" in inspect.render(artifact_copy, as_json=False)
