"""Tensor names of checkpoints saved without their head, tied or wrapped, in every architecture."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.exporter.models.parameters import abstract_model
from precast.exporter.models.registry import ARCHITECTURES, read_model
from precast.exporter.sources.base import SourceTensor
from precast.exporter.weights import plan_weights
from precast.loaders.artifact.errors import PrecastError

Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def script():
    """Import the script that makes tiny checkpoints of every architecture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "reference"))
        return importlib.import_module("make_architectures")


def body(model_type: str) -> str:
    return "transformer." if model_type == "gpt2" else "model."


def whole(script, model_type: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the config of a checkpoint, and its tensors by their full names."""
    record = script.subject(model_type)
    arrays = script.make_tensors(record)
    prefix = body(model_type)
    if not any(name.startswith(prefix) for name in arrays):
        arrays = {name if name == "lm_head.weight" else prefix + name: a for name, a in arrays.items()}
    return dict(record["config"]), arrays


@pytest.fixture
def planned(tiny_source):
    """Return a function that plans a checkpoint's weights, and returns the source tensors by name."""

    def plan(config: Mapping[str, Any], arrays: Arrays) -> dict[str, np.ndarray]:
        spec = read_model(config, "config.json")
        tensors = {
            name: SourceTensor(shape=array.shape, dtype="float32", read=array.copy)
            for name, array in arrays.items()
        }
        source = spec.adapt(tiny_source(fields={"name": "m", "config": config, "tensors": tensors}))
        found = plan_weights(source, abstract_model(spec).parameters, tied=spec.config.tied_embeddings)
        return {name: found.tensors[name].read() for p in found.parameters for name in p.sources}

    return plan


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def untied(config: dict[str, Any], arrays: dict[str, np.ndarray], embedding: str) -> None:
    config["tie_word_embeddings"] = False
    arrays["lm_head.weight"] = arrays[embedding][::-1].copy()


def embedding(model_type: str) -> str:
    return body(model_type) + ("wte.weight" if model_type == "gpt2" else "embed_tokens.weight")


architectures = pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))


@architectures
def test_names_without_the_body(script, planned, model_type):
    """If a model with a tied head was saved without the head, the names of its tensors lack the body's prefix."""
    config, arrays = whole(script, model_type)
    config["tie_word_embeddings"] = True
    arrays.pop("lm_head.weight", None)
    bare = {name.removeprefix(body(model_type)): array for name, array in arrays.items()}
    assert not bare.keys() & arrays.keys()
    assert_same(planned(config, bare), planned(config, arrays))


@architectures
def test_names_without_the_body_beside_a_head(script, planned, model_type):
    config, arrays = whole(script, model_type)
    untied(config, arrays, embedding(model_type))
    bare = {name.removeprefix(body(model_type)): array for name, array in arrays.items()}
    found = planned(config, bare)
    assert_same(found, planned(config, arrays))
    np.testing.assert_array_equal(found["lm_head.weight"], arrays["lm_head.weight"])


@architectures
def test_a_tied_head_without_the_embedding(script, planned, model_type):
    """safetensors stores a shared tensor once, and here under the head's name."""
    config, arrays = whole(script, model_type)
    config["tie_word_embeddings"] = True
    arrays.pop("lm_head.weight", None)
    kept = {
        "lm_head.weight" if name == embedding(model_type) else name: array for name, array in arrays.items()
    }
    assert_same(planned(config, kept), planned(config, arrays))


@architectures
def test_a_head_that_is_missing(script, planned, model_type):
    config, arrays = whole(script, model_type)
    config["tie_word_embeddings"] = False
    arrays.pop("lm_head.weight", None)
    with pytest.raises(PrecastError) as caught:
        planned(config, arrays)
    assert str(caught.value) == (
        "m: lm_head.weight is missing, and config.json does not tie the output head to the embedding; if they are tied,"
        ' set "tie_word_embeddings" to true in config.json; if this is a text-embedding checkpoint without a head,'
        " export the checkpoint that it was made from."
    )


@pytest.mark.parametrize(
    ("wrapper", "owner"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DataParallel or DeepSpeed"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("base_model.model.", "peft"),
    ],
)
def test_names_with_the_prefix_of_a_wrapper(script, planned, wrapper, owner):
    config, arrays = whole(script, "llama")
    with pytest.raises(PrecastError) as caught:
        planned(config, {wrapper + name: array for name, array in arrays.items()})
    assert str(caught.value) == (
        f"m: every tensor's name begins with '{wrapper}', a prefix that {owner} adds when it saves a model;"
        " use transformers to load the model without the wrapper, and save it with save_pretrained."
    )


def test_an_embedding_is_not_taken_from_a_head_that_is_not_tied(script, planned):
    config, arrays = whole(script, "llama")
    untied(config, arrays, embedding("llama"))
    arrays.pop(embedding("llama"))
    with pytest.raises(PrecastError, match=r"'model\.embed_tokens\.weight' is missing"):
        planned(config, arrays)
