"""Writing the weight file: every tensor is used or deliberately ignored, and every value is finite."""

import dataclasses
import weakref

import numpy as np
import pytest

from precast.exporter.block_formats import BLOCK_FORMATS
from precast.exporter.models.parameters import Parameter
from precast.exporter.quantize import FORMATS, INT4_SYMMETRIC, SOURCE, WEIGHTS
from precast.exporter.sources.base import QuantisedBlocks, SourceTensor
from precast.exporter.weights import (
    formats_of,
    plan_weights,
    repack_records,
    stored_bytes,
    with_source_formats,
    write_model_weights,
)
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
    """Return a function that makes a source with the tensors of the parameters, some replaced or removed."""
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


def write(path, source, tables=None, count=lambda _: None, weights="float32") -> dict[str, np.ndarray]:
    plan = plan_weights(source, PARAMETERS, tied=True)
    write_model_weights(path, plan, formats_of(PARAMETERS, weights), tables or {}, count)
    return map_weights(path)


def stored(found, name) -> list[np.ndarray]:
    """Return a parameter's arrays, in the order of its format."""
    return [found[name + suffix] for suffix in ("", ".scale", ".minimum") if name + suffix in found]


def test_layers_are_stacked_in_order_and_other_tensors_unchanged(source, tmp_path):
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
    write(tmp_path / "w", source(**changes), count=reported.append)
    assert sorted(reads) == sorted(source.arrays)
    assert sum(reported) == sum(a.nbytes for a in source.arrays.values())
    # The tensor that is being read and the previous one are in memory: the latter is freed only after the read.
    assert most <= 2 < len(reads)


def test_a_missing_tensor_is_named(source):
    assert refusal(source(**{UP.replace(".", "__"): None})) == (
        f"tiny: tensor {UP!r} is missing; use the config and the weights of the same model."
    )


def test_a_tensor_of_another_shape_is_named(source):
    wrong = tensor(np.zeros((4, 3), np.float32))
    assert refusal(source(**{UP.replace(".", "__"): wrong})) == (
        f"tiny: tensor {UP!r} has shape [4, 3], but the config requires [3, 4]; use the config and the weights"
        " of the same model."
    )


def test_tensors_without_a_parameter_are_named(source):
    extra = tensor(np.zeros(3, np.float32))
    text = refusal(source(model__layers__2__mlp__up_proj__weight=extra))
    assert text == (
        "tiny: tensor 'model.layers.2.mlp.up_proj.weight' belongs to no parameter of the model; use the config and"
        " the weights of the same model."
    )
    assert "'a' (and 2 more) belongs to no parameter of the model;" in refusal(
        source(a=extra, b=extra, c=extra)
    )


def test_known_buffers_and_tied_heads_are_ignored(source):
    extra = tensor(np.zeros(3, np.float32))
    left_out = {
        "model__layers__0__self_attn__rotary_emb__inv_freq": extra,
        "lm_head__weight": tensor(source.arrays["model.embed_tokens.weight"]),
    }
    plan = plan_weights(source(**left_out), PARAMETERS, tied=True)
    assert sorted(plan.ignored) == ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "'lm_head.weight' belongs to no parameter" in refusal(source(lm_head__weight=extra), tied=False)


def test_only_biases_of_zeros_are_ignored(source):
    """Adding zeros changes nothing; any other number would."""
    name, zeros = "model__layers__0__mlp__up_proj__bias", np.zeros(3, np.float32)
    plan = plan_weights(source(**{name: tensor(zeros)}), PARAMETERS, tied=True)
    assert plan.ignored == ["model.layers.0.mlp.up_proj.bias"]
    for value in (1e-30, np.nan):
        zeros[1] = value
        assert "'model.layers.0.mlp.up_proj.bias' belongs to no parameter" in refusal(
            source(**{name: tensor(zeros.copy())})
        )


def test_ignored_tensors_are_named(source):
    extra = tensor(np.zeros(3, np.float32))
    buffers = {f"model__layers__{i}__self_attn__rotary_emb__inv_freq": extra for i in range(4)}
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]

    def told(**changes):
        return plan_weights(source(**changes), PARAMETERS, tied=True).remark()

    assert told() is None
    assert told(**dict(list(buffers.items())[:1])) == f"leaving out {names[0]}"
    assert told(**buffers) == f"leaving out {names[0]}, {names[1]}, … (2 more)"


def test_a_tied_head_that_differs_from_the_embedding_is_refused(source):
    other = source.arrays["model.embed_tokens.weight"].copy()
    other[5, 3] += 1
    text = refusal(source(lm_head__weight=tensor(other)))
    assert "tie_word_embeddings is true, but lm_head.weight differs from the embedding" in text
    assert "set tie_word_embeddings to false in config.json to use both tensors" in text


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.nan, np.inf, 1]])
def test_values_that_are_not_finite_are_refused(source, tmp_path, values):
    array = source.arrays[UP].copy()
    array.reshape(-1)[-len(values) :] = values
    with pytest.raises(PrecastError, match=f"^{UP}: the tensor contains values that are not finite numbers"):
        write(tmp_path / "w", source(**{UP.replace(".", "__"): tensor(array)}))


def test_the_largest_finite_values_are_accepted(source, tmp_path):
    array = np.full((3, 4), np.finfo(np.float32).max, np.float32)
    found = write(tmp_path / "w", source(**{UP.replace(".", "__"): tensor(array)}))
    np.testing.assert_array_equal(found["model.layers.mlp.up_proj.weight"][1], array)


def test_a_reader_that_returns_another_shape_is_caught(source, tmp_path):
    """A tensor of the same size but another shape would be written in the wrong order."""
    lying = tensor(source.arrays[UP], lambda: source.arrays[UP].T.copy())
    with pytest.raises(
        PrecastError, match=r"the source declares shape \[3, 4\], but the tensor has shape \[4, 3\];"
    ):
        write(tmp_path / "w", source(**{UP.replace(".", "__"): lying}))


# --- formats ------------------------------------------------------------------------------------------------


def test_the_format_of_each_parameter():
    """The number of axes identifies norms and biases; the name identifies the embedding and the output head."""
    shapes = {
        "model.embed_tokens.weight": (6, 4),
        "lm_head.weight": (1, 6, 4),
        "model.norm.weight": (1, 4),
        "model.layers.q_norm.anything": (2, 4),
        "model.layers.self_attn.q_proj.bias": (2, 4),
        "model.layers.mlp.up_proj.weight": (2, 3, 4),
    }
    parameters = [Parameter(name=name, shape=shape, sources=(name,)) for name, shape in shapes.items()]
    for weights in WEIGHTS:
        vocabulary = "int8" if weights == "int4" else weights
        expected = [vocabulary, vocabulary, "float32", "float32", "float32", weights]
        assert formats_of(parameters, weights) == dict(zip(shapes, expected, strict=True))


def test_an_unknown_format_is_refused():
    with pytest.raises(PrecastError) as raised:
        formats_of(PARAMETERS, "int2")
    assert str(raised.value) == (
        "--weights: expected one of float32, bfloat16, int8, int4, source, found 'int2'."
    )


@pytest.mark.parametrize("weights", [weights for weights in WEIGHTS if weights != SOURCE])
def test_every_format_is_read_back(source, tmp_path, weights):
    tables, reported = {"rope.cos": np.ones((5, 2), np.float32)}, []
    found = write(tmp_path / "w", source(), tables, reported.append, weights)
    formats = formats_of(PARAMETERS, weights)
    names = [p.name + a.suffix for p in PARAMETERS for a in FORMATS[formats[p.name]].arrays(p.shape)]
    assert found.keys() == {*names, *tables}
    for parameter in PARAMETERS:
        kept = FORMATS[formats[parameter.name]]
        arrays = stored(found, parameter.name)
        expected = kept.arrays(parameter.shape)
        assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.numpy_dtype) for a in expected]
        for layer, name in enumerate(parameter.sources):
            wanted = kept.encode(source.arrays[name])
            # An embedding has no axis of layers, unless it is packed.
            ours = [
                a.reshape(len(parameter.sources), *w.shape)[layer]
                for a, w in zip(arrays, wanted, strict=True)
            ]
            for one, other in zip(ours, wanted, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=name)
    assert sum(reported) == stored_bytes(PARAMETERS, formats) == sum(found[name].nbytes for name in names)
    assert len(reported) == sum(len(p.sources) for p in PARAMETERS)


def test_the_file_is_reproducible(source, tmp_path):
    for path in ("a", "b"):
        write(tmp_path / path, source(), weights="int4")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_value_too_large_for_a_format_is_named(source, tmp_path):
    array = source.arrays[UP].copy()
    array[1, 1] = 1e6
    with pytest.raises(
        PrecastError, match=f"^{UP}: contains a value of 1e\\+06, but int4 can represent at most 65504"
    ):
        write(tmp_path / "w", source(**{UP.replace(".", "__"): tensor(array)}), weights="int4")


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_in_every_format(source, tmp_path, weights, value):
    array = source.arrays[UP].copy()
    array[1, 1] = value
    with pytest.raises(PrecastError, match=f"^{UP}: the tensor contains values that are not finite numbers"):
        write(tmp_path / "w", source(**{UP.replace(".", "__"): tensor(array)}), weights=weights)


# --- blocks -------------------------------------------------------------------------------------------------

BLOCKY = (Parameter(name="up", shape=(1, 3, 32), sources=("up",)),)


def blocky(tiny_source, blocks, array=None):
    def read():
        assert array is not None, "the blocks should have been enough"
        return array

    up = SourceTensor(
        shape=(3, 32), dtype="Q8_0", read=read, block_format=blocks.format, blocks=lambda: blocks
    )
    return dataclasses.replace(tiny_source(), tensors={"up": up})


def blocks_of(kind, low=0, *, shape=(3, 32)):
    codes = np.random.default_rng(0).integers(low, 8, shape).astype(np.int8 if low else np.uint8)
    codes[0, 0] = low
    scale = np.full((shape[0], shape[1] // 32), 0.5, np.float16)
    return QuantisedBlocks(
        format=kind, codes=codes, coefficients=(scale, -scale) if kind == "q4_1" else (scale,)
    )


def write_blocks(path, source, weights):
    plan = plan_weights(source, BLOCKY, tied=False)
    write_model_weights(path, plan, formats_of(BLOCKY, weights), {}, lambda _: None)
    return FORMATS[weights].decode([a[0] for a in stored(map_weights(path), "up")], 3, 32)


@pytest.mark.parametrize(
    ("weights", "blocks"),
    [("int8", blocks_of("q8_0", -127)), ("int8", blocks_of("q4_0")), ("int4", blocks_of("q4_0"))],
)
def test_blocks_are_not_rounded_again(tiny_source, decode_blocks, tmp_path, weights, blocks):
    found = write_blocks(tmp_path / "w", blocky(tiny_source, blocks), weights)
    np.testing.assert_array_equal(found, decode_blocks(blocks))


@pytest.mark.parametrize(
    ("weights", "blocks"),
    [
        ("int8", blocks_of("q8_0", -128)),
        ("int4", blocks_of("q8_0", -127)),
        ("bfloat16", blocks_of("q4_0")),
        ("float32", blocks_of("q4_0")),
    ],
)
def test_blocks_that_do_not_fit_are_dequantised(tiny_source, decode_blocks, tmp_path, weights, blocks):
    array = decode_blocks(blocks)
    found = write_blocks(tmp_path / "w", blocky(tiny_source, blocks, array), weights)
    np.testing.assert_array_equal(found, FORMATS[weights].decode(FORMATS[weights].encode(array), 3, 32))


@pytest.mark.parametrize(
    ("weights", "kind", "expected"),
    [
        ("int4", "q4_0", INT4_SYMMETRIC),
        ("int4", "q4_1", "int4"),
        ("int4", None, "int4"),
        ("int8", "q4_0", "int8"),
    ],
)
def test_symmetric_blocks_are_stored_with_source_formats(tiny_source, weights, kind, expected):
    source = blocky(tiny_source, blocks_of("q4_0"))
    up = dataclasses.replace(source.tensors["up"], block_format=kind)
    plan = plan_weights(dataclasses.replace(source, tensors={"up": up}), BLOCKY, tied=False)
    assert with_source_formats(formats_of(BLOCKY, weights), plan) == {"up": expected}


def test_one_tensor_with_minima_decides_for_the_stack(tiny_source):
    up = blocky(tiny_source, blocks_of("q4_0")).tensors["up"]
    stack = (Parameter(name="up", shape=(2, 3, 32), sources=("up", "other")),)
    tensors = {"up": up, "other": dataclasses.replace(up, block_format="q4_1")}
    plan = plan_weights(dataclasses.replace(tiny_source(), tensors=tensors), stack, tied=False)
    assert with_source_formats(formats_of(stack, "int4"), plan) == {"up": "int4"}


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_blocks_with_scales_that_are_not_finite_are_refused(tiny_source, tmp_path, scale, part):
    broken = np.array([[1], [scale], [1]], np.float16)
    blocks = blocks_of("q4_1")
    coefficients = list(blocks.coefficients)
    coefficients[part] = broken
    blocks = dataclasses.replace(blocks, coefficients=tuple(coefficients))
    with pytest.raises(PrecastError, match=r"^up: the tensor contains values that are not finite numbers"):
        write_blocks(tmp_path / "w", blocky(tiny_source, blocks), "int4")


@pytest.mark.parametrize(("kind", "coefficient"), [("mxfp4", np.uint8(253)), ("e4m3", np.float32(1e36))])
def test_blocks_whose_products_overflow_are_refused(kind, coefficient):
    codes = np.zeros((3, 32), np.int8 if kind == "e4m3" else np.uint8)
    blocks = QuantisedBlocks(format=kind, codes=codes, coefficients=(np.full((3, 1), coefficient),))
    tensor = SourceTensor(
        shape=(3, 32),
        dtype=kind,
        read=lambda: pytest.fail("the blocks were dequantised"),
        block_format=kind,
        blocks=lambda: blocks,
    )
    with pytest.raises(PrecastError, match=r"^up: the tensor contains values that are not finite numbers"):
        repack_records("up", tensor, BLOCK_FORMATS[kind], (3, 32))
    blocks.coefficients[0][:] = coefficient - 1 if kind == "mxfp4" else coefficient / 10
    assert repack_records("up", tensor, BLOCK_FORMATS[kind], (3, 32)) is not None


def test_blocks_of_another_shape_are_caught(tiny_source, tmp_path):
    with pytest.raises(
        PrecastError, match=r"^up: the source declares shape \[3, 32\], but the tensor has shape \[1, 96\];"
    ):
        write_blocks(tmp_path / "w", blocky(tiny_source, blocks_of("q4_0", shape=(1, 96))), "int4")
