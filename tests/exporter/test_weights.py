"""From a checkpoint's tensors to the weight file: every tensor used or knowingly left out, every value a number."""

import dataclasses
import weakref

import numpy as np
import pytest

from precast.exporter.models.parameters import Parameter
from precast.exporter.sources.base import SourceTensor
from precast.exporter.weights import plan_weights, write_model_weights
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import map_weights

PARAMETERS = (
    Parameter(name="model.embed_tokens.weight", shape=(6, 4), sources=("model.embed_tokens.weight",)),
    Parameter(name="model.norm.weight", shape=(1, 4), sources=("model.norm.weight",)),
    Parameter(
        name="model.layers.mlp.up_proj.weight",
        shape=(2, 3, 4),
        sources=("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    ),
)
UP = "model.layers.1.mlp.up_proj.weight"


def tensor(array, read=None) -> SourceTensor:
    return SourceTensor(shape=array.shape, dtype="float32", read=read or array.copy)


@pytest.fixture
def source(tiny_source):
    """A source of exactly these parameters' tensors, with other tensors or without some."""
    random = np.random.default_rng(0)
    arrays = {
        name: random.standard_normal(p.source_shape, np.float32) for p in PARAMETERS for name in p.sources
    }

    def make(**changes):
        named = {key.replace("__", "."): value for key, value in changes.items()}
        tensors = {name: tensor(array) for name, array in arrays.items()} | named
        return dataclasses.replace(tiny_source(), tensors={n: t for n, t in tensors.items() if t is not None})

    make.arrays = arrays
    return make


def refusal(source, *, tied=True) -> str:
    with pytest.raises(PrecastError) as raised:
        plan_weights(source, PARAMETERS, tied=tied)
    return str(raised.value)


def write(path, source, tables=None, report=lambda _: None) -> dict[str, np.ndarray]:
    write_model_weights(path, plan_weights(source, PARAMETERS, tied=True), tables or {}, report)
    return map_weights(path)


def test_layers_are_stacked_in_order_and_the_rest_is_as_it_was(source, tmp_path):
    tables = {"rope.cos": np.ones((5, 2), np.float32)}
    found = write(tmp_path / "w", source(), tables)
    assert found.keys() == {p.name for p in PARAMETERS} | tables.keys()
    for parameter in PARAMETERS:
        expected = np.stack([source.arrays[name] for name in parameter.sources])
        np.testing.assert_array_equal(found[parameter.name], expected.reshape(parameter.shape))
    np.testing.assert_array_equal(found["rope.cos"], tables["rope.cos"])


def test_tensors_are_read_once_each_and_one_after_another(source, tmp_path):
    alive, most, reads = set(), 0, []

    def reading(name):
        def read():
            nonlocal most
            array = source.arrays[name].copy()
            weakref.finalize(array, alive.discard, name)
            alive.add(name)
            most = max(most, len(alive))
            reads.append(name)
            return array

        return read

    changes = {n.replace(".", "__"): tensor(a, reading(n)) for n, a in source.arrays.items()}
    reported = []
    write(tmp_path / "w", source(**changes), report=reported.append)
    assert sorted(reads) == sorted(source.arrays)
    assert sum(reported) == sum(a.nbytes for a in source.arrays.values())
    # The one being read, and the one before it, which is let go when the new one is there.
    assert most <= 2 < len(reads)


def test_a_missing_tensor_is_named(source):
    assert refusal(source(**{UP.replace(".", "__"): None})) == (
        f"tiny: tensor {UP!r} is missing; the config and the weights do not fit."
    )


def test_a_tensor_of_another_shape_is_named(source):
    wrong = tensor(np.zeros((4, 3), np.float32))
    assert refusal(source(**{UP.replace(".", "__"): wrong})) == (
        f"tiny: tensor {UP!r} has shape [4, 3], expected [3, 4] by the config."
    )


def test_tensors_that_belong_nowhere_are_named(source):
    extra = tensor(np.zeros(3, np.float32))
    text = refusal(source(model__layers__2__mlp__up_proj__weight=extra))
    assert text == (
        "tiny: tensor 'model.layers.2.mlp.up_proj.weight' belongs to no parameter of the model; config and weights"
        " do not fit."
    )
    assert "'a' belongs to no parameter of the model (nor do 2 more);" in refusal(
        source(a=extra, b=extra, c=extra)
    )


def test_what_is_left_out_is_left_out_knowingly(source):
    extra = tensor(np.zeros(3, np.float32))
    left_out = {
        "model__layers__0__self_attn__rotary_emb__inv_freq": extra,
        "lm_head__weight": tensor(source.arrays["model.embed_tokens.weight"]),
    }
    plan = plan_weights(source(**left_out), PARAMETERS, tied=True)
    assert sorted(plan.ignored) == ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "'lm_head.weight' belongs to no parameter" in refusal(source(lm_head__weight=extra), tied=False)


def test_what_is_left_out_is_named(source):
    extra = tensor(np.zeros(3, np.float32))
    buffers = {f"model__layers__{i}__self_attn__rotary_emb__inv_freq": extra for i in range(4)}
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]

    def told(**changes):
        return plan_weights(source(**changes), PARAMETERS, tied=True).left_out()

    assert told() is None
    assert told(**dict(list(buffers.items())[:1])) == f"leaving out {names[0]}"
    assert told(**buffers) == f"leaving out {names[0]}, {names[1]}, … (2 more)"


def test_a_head_that_is_not_the_embedding_it_is_said_to_be_is_refused(source):
    other = source.arrays["model.embed_tokens.weight"].copy()
    other[5, 3] += 1
    text = refusal(source(lm_head__weight=tensor(other)))
    assert "tie_word_embeddings is true, but lm_head.weight differs from the embedding" in text
    assert "set it to false in config.json to use both" in text


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.nan, np.inf, 1]])
def test_values_that_are_no_numbers_are_refused(source, tmp_path, values):
    array = source.arrays[UP].copy()
    array.reshape(-1)[-len(values) :] = values
    with pytest.raises(PrecastError, match=f"^{UP}: the tensor holds values that are not finite numbers"):
        write(tmp_path / "w", source(**{UP.replace(".", "__"): tensor(array)}))


def test_the_largest_numbers_are_still_numbers(source, tmp_path):
    array = np.full((3, 4), np.finfo(np.float32).max, np.float32)
    found = write(tmp_path / "w", source(**{UP.replace(".", "__"): tensor(array)}))
    np.testing.assert_array_equal(found["model.layers.mlp.up_proj.weight"][1], array)


def test_a_reader_that_gives_another_shape_than_it_said_is_caught(source, tmp_path):
    """Of the same size, it would be written, transposed, without a word."""
    lying = tensor(source.arrays[UP], lambda: source.arrays[UP].T.copy())
    with pytest.raises(PrecastError, match=r"expected shape \[3, 4\], found \[4, 3\] when reading it"):
        write(tmp_path / "w", source(**{UP.replace(".", "__"): lying}))
