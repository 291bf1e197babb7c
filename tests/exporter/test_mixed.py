"""Mixed parameters: their formats, their storage, and the results of portable operations with them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precast.exporter.block_formats import BLOCK_FORMATS, UNIT
from precast.exporter.block_quantise import encode, quantise
from precast.exporter.mixed import panel_rows, stored_arrays, table
from precast.exporter.models.ops import LinearCall, MixedWeight
from precast.exporter.models.parameters import Parameter
from precast.exporter.models.tensors import scale
from precast.exporter.models.xla_ops import XLA_OPS
from precast.exporter.quantize import INT4_SYMMETRIC, SOURCE
from precast.exporter.sources.base import QuantisedBlocks, Source, SourceTensor
from precast.exporter.weights import (
    formats_of,
    plan_weights,
    stored_bytes,
    widened_remark,
    with_source_formats,
    write_model_weights,
)
from precast.loaders.artifact.weights import map_weights

OUTS, INPUTS = 20, 300
NAMES = tuple(BLOCK_FORMATS)


def matrices(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, OUTS, INPUTS), dtype=np.float32)


def tensor(array: np.ndarray, kind: str | None, dtype: str = "float32") -> SourceTensor:
    """Return a source tensor; if it has a block format, reading it as floats is an error."""
    if kind is None:
        return SourceTensor(shape=array.shape, dtype=dtype, read=array.copy)
    codes, *coefficients = quantise(BLOCK_FORMATS[kind], array)

    def read() -> np.ndarray:
        raise AssertionError("the blocks should have been enough")

    blocks = QuantisedBlocks(format=kind, codes=codes, coefficients=tuple(coefficients))
    return SourceTensor(shape=array.shape, dtype=kind, read=read, block_format=kind, blocks=lambda: blocks)


def decoded(kind: str, array: np.ndarray) -> np.ndarray:
    return BLOCK_FORMATS[kind].decode(encode(BLOCK_FORMATS[kind], array), *array.shape)


def mixed_weight(kinds: Sequence[str], stack: np.ndarray) -> MixedWeight:
    records = [encode(BLOCK_FORMATS[kind], matrix) for kind, matrix in zip(kinds, stack, strict=True)]
    return MixedWeight(
        values=jnp.asarray(np.concatenate([r.reshape(-1, UNIT) for r in records])),
        table=jnp.asarray(table(kinds, *stack.shape[1:])),
        formats=tuple(kinds),
        outs=stack.shape[1],
        inputs=stack.shape[2],
    )


# --- which formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "kinds", "expected"),
    [
        (SOURCE, ("q4_k", "q6_k"), ("q4_k", "q6_k")),
        (SOURCE, ("q8_0", "q8_0"), ("q8_0", "q8_0")),
        (SOURCE, ("q4_k", None), "float32"),
        ("int4", ("q4_k", "q4_k"), ("q4_k", "q4_k")),
        ("int4", ("q4_k", "q4_0"), ("q4_k", "q4_0")),
        ("int4", ("q4_k", "q6_k"), "int4"),
        ("int4", ("iq4_xs", "q4_0"), ("iq4_xs", "q4_0")),
        ("int4", ("mxfp4", "mxfp4"), ("mxfp4", "mxfp4")),
        ("int4", ("q4_k", None), "int4"),
        ("int4", ("q4_0", "q4_0"), INT4_SYMMETRIC),
        ("int4", ("q4_0", "q4_1"), "int4"),
        ("int8", ("q4_k", "q4_k"), "int8"),
        ("bfloat16", ("q4_0", "q4_0"), "bfloat16"),
    ],
)
def test_the_sources_decide_the_format(
    tiny_source: Callable[[], Source],
    weights: str,
    kinds: tuple[str | None, ...],
    expected: str | tuple[str, ...],
) -> None:
    up = Parameter(name="up", shape=(2, OUTS, INPUTS), sources=("a", "b"))
    tensors = {
        name: tensor(matrix, kind) for name, matrix, kind in zip("ab", matrices(2), kinds, strict=True)
    }
    plan = plan_weights(dataclasses.replace(tiny_source(), tensors=tensors), [up], tied=False)
    assert with_source_formats(formats_of([up], weights), plan) == {"up": expected}


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("BF16", "BF16"), "bfloat16"),
        (("bfloat16", "float32"), "float32"),
        (("F16", "F16"), "float32"),
    ],
)
def test_floats_keep_their_values(
    tiny_source: Callable[[], Source], dtypes: tuple[str, str], expected: str
) -> None:
    up = Parameter(name="up", shape=(2, OUTS, INPUTS), sources=("a", "b"))
    norm = Parameter(name="norm.weight", shape=(1, INPUTS), sources=("norm",))
    tensors = {
        name: tensor(matrix, None, dtype)
        for name, matrix, dtype in zip("ab", matrices(2), dtypes, strict=True)
    }
    tensors["norm"] = tensor(np.ones(INPUTS, np.float32), None, "bfloat16")
    plan = plan_weights(dataclasses.replace(tiny_source(), tensors=tensors), [up, norm], tied=False)
    formats = with_source_formats(formats_of([up, norm], SOURCE), plan)
    assert formats == {"up": expected, "norm.weight": "float32"}
    assert widened_remark(formats, plan) is None


def test_a_type_that_no_format_holds_is_named(tiny_source: Callable[[], Source]) -> None:
    up = Parameter(name="up", shape=(2, OUTS, INPUTS), sources=("a", "b"))
    first, second = matrices(2)
    tensors = {"a": tensor(first, "q4_k"), "b": tensor(second, None, "IQ3_S")}
    plan = plan_weights(dataclasses.replace(tiny_source(), tensors=tensors), [up], tied=False)
    formats = with_source_formats(formats_of([up], SOURCE), plan)
    assert widened_remark(formats, plan) == (
        "storing up in float32, because no block format represents b (IQ3_S) exactly; --weights int8 takes less space"
    )


def test_a_float_matrix_among_quantised_ones_is_named(tiny_source: Callable[[], Source]) -> None:
    up = Parameter(name="up", shape=(2, OUTS, INPUTS), sources=("a", "b"))
    down = dataclasses.replace(up, name="down")
    first, second = matrices(2)
    tensors = {"a": tensor(first, "q4_0"), "b": tensor(second, None, "bfloat16")}
    plan = plan_weights(dataclasses.replace(tiny_source(), tensors=tensors), [up, down], tied=False)
    formats = with_source_formats(formats_of([up, down], SOURCE), plan)
    assert widened_remark(formats, plan) == (
        "storing up and 1 more in float32, because no block format represents b (bfloat16) exactly; --weights int8"
        " takes less space"
    )


@pytest.mark.parametrize("kind", [None, "q4_k"])
def test_a_scaled_matrix_is_stored_in_float32(tiny_source: Callable[[], Source], kind: str | None) -> None:
    """A matrix times a factor can be represented neither in bfloat16 nor in a block format."""
    up = Parameter(name="up", shape=(1, OUTS, INPUTS), sources=("a",))
    (matrix,) = matrices(1)
    scaled = scale(tensor(matrix, kind, "bfloat16"), 0.22)
    plan = plan_weights(dataclasses.replace(tiny_source(), tensors={"a": scaled}), [up], tied=False)
    formats = with_source_formats(formats_of([up], SOURCE), plan)
    assert formats == {"up": "float32"}
    remark = widened_remark(formats, plan)
    assert remark is not None
    assert f"represents a ({kind or 'bfloat16'}, scaled) exactly" in remark


# --- how they are stored ------------------------------------------------------------------------------------------


def test_matrices_are_stored_one_after_another(tiny_source: Callable[[], Source], tmp_path: Path) -> None:
    """Each matrix is at the place that the table states, whether it is read as blocks or as floats."""
    sources = tuple(f"layer {i}" for i in range(len(NAMES)))
    up = Parameter(name="up", shape=(len(NAMES), OUTS, INPUTS), sources=sources)
    stack = matrices(len(NAMES))
    tensors = {
        name: tensor(matrix, kind if i % 2 else None)
        for i, (name, matrix, kind) in enumerate(zip(sources, stack, NAMES, strict=True))
    }
    plan = plan_weights(dataclasses.replace(tiny_source(), tensors=tensors), [up], tied=False)
    written: list[int] = []
    write_model_weights(tmp_path / "w", plan, {"up": NAMES}, {}, written.append)
    found = map_weights(tmp_path / "w")
    assert {name: (a.shape, str(a.dtype)) for name, a in found.items()} == {
        "up" + a.suffix: (a.shape, a.dtype) for a in stored_arrays(NAMES, up.shape)
    }
    assert sum(written) == stored_bytes([up], {"up": NAMES}) == sum(a.nbytes for a in found.values())
    for (code, unit), kind, matrix in zip(found["up.table"], NAMES, stack, strict=True):
        stored = BLOCK_FORMATS[kind]
        assert code == stored.code
        records = found["up"][unit : unit + stored.matrix_bytes(OUTS, INPUTS) // UNIT]
        np.testing.assert_array_equal(stored.decode(records, OUTS, INPUTS), decoded(kind, matrix))


def test_codes_never_change() -> None:
    assert {kind.name: kind.code for kind in BLOCK_FORMATS.values()} == {
        "q8_0": 1,
        "q4_0": 2,
        "q4_1": 3,
        "q5_0": 4,
        "q5_1": 5,
        "q4_k": 6,
        "q5_k": 7,
        "q6_k": 8,
        "iq4_nl": 9,
        "iq4_xs": 10,
        "mxfp4": 11,
        "e4m3": 12,
    }


def test_rows_of_a_panel() -> None:
    assert panel_rows("float32", INPUTS) is None
    assert panel_rows("bfloat16", INPUTS) is None
    assert panel_rows("int8", INPUTS) == 1
    assert panel_rows("int4", INPUTS) == 1
    assert panel_rows(("q4_0",), 32) == (16 * 2 + 16 * 16) / UNIT + 0.5  # rounded up to a unit


# --- what the portable operations compute -------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [NAMES, ("q6_k", "q6_k", "q6_k"), *((kind,) for kind in NAMES)])
@pytest.mark.parametrize("rows", [1, 5])
def test_products_use_the_decoded_weights(kinds: tuple[str, ...], rows: int) -> None:
    stack = matrices(len(kinds))
    weight = mixed_weight(kinds, stack)
    x = np.random.default_rng(rows).standard_normal((rows, INPUTS), dtype=np.float32)

    @jax.jit
    def product(weight: MixedWeight, layer: jax.Array) -> jax.Array:
        call = LinearCall(weights=(weight,), outs=(OUTS,))
        return XLA_OPS.linear(jnp.asarray(x), call, layer, jnp.int32(rows))[0]

    for layer, (kind, matrix) in enumerate(zip(kinds, stack, strict=True)):
        expected = x.astype(np.float64) @ decoded(kind, matrix).T
        np.testing.assert_allclose(product(weight, jnp.int32(layer)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", NAMES)
def test_embeddings_are_the_decoded_rows(kind: str) -> None:
    (matrix,) = matrices(1)
    tokens = np.int32([0, 19, 3, 16, 3])
    found = XLA_OPS.embed(jnp.asarray(tokens), mixed_weight([kind], matrix[None]), OUTS, INPUTS)
    np.testing.assert_allclose(found, decoded(kind, matrix)[tokens], rtol=1e-6, atol=1e-6)
