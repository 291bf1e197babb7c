"""precast.linear and precast.embed against NumPy in float64, for every format of weights."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from packed import NAMES, NARROW, WIDE, mixed, pack, pack_mixed, whole_numbers

from precast.exporter.block_formats import BLOCK_FORMATS
from precast.exporter.quantize import FORMATS

Linear = Callable[..., list[np.ndarray]]

UNIT = 2.0**-24  # half an ulp of one: the relative error of one float32 operation
SMALLEST = 2.0**-126  # XLA's threads flush smaller numbers to zero
ACTIVATION = 127 * 256  # the largest magnitude of an activation in 16 bits
GROUP, BYTE = 32, 127  # activations of int4 weights take 8 bits, with one scale per group
PACKED = (*WIDE, *NARROW)
# (rows, in, outs): sizes next to a multiple of a vector, a register block, a panel, a group, a pass of inputs, or the
# outputs of a task.
SHAPES = (
    (1, 1, (1,)),
    (1, 577, (65,)),
    (1, 800, (1, 33)),
    (2, 3, (7, 1, 15)),
    (3, 17, (31,)),
    (4, 8, (9, 63)),
    (5, 63, (2,)),
    (6, 15, (17,)),
    (7, 1537, (8, 31)),
    (8, 65, (33,)),
    (9, 577, (15,)),
    (13, 1537, (7,)),
    (40, 9, (577,)),
    (130, 800, (65, 3)),
    (25, 2081, (17,)),
    (1, 2, (1537,)),
)
LAYERS = st.integers(1, 4).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(0, layers - 1)))


def tolerance(x: np.ndarray, w: np.ndarray, name: str) -> np.ndarray:
    """Return the error allowed for float32 sums in at least four lanes and for rounded activations."""
    terms = x.shape[1]
    lost = (terms / 4 + 8) * UNIT * (np.abs(x) @ np.abs(w).T) + terms * SMALLEST
    if name not in PACKED:
        return lost
    top = np.abs(x).max(axis=1, initial=0.0, keepdims=True)
    # Formats with minima sum scale times value and minimum separately.
    magnitude = np.abs(w).sum(axis=1) + (
        8 * np.abs(w).max(axis=1, initial=0.0) * terms if name in NARROW else 0.0
    )
    if name in NARROW:
        starts = range(0, terms, GROUP)
        groups = [(np.abs(x[:, k : k + GROUP]), np.abs(w[:, k : k + GROUP]).sum(axis=1)) for k in starts]
        rounding = 0.5001 / BYTE * sum(a.max(axis=1, keepdims=True) * b for a, b in groups)
    else:
        rounding = top * 0.5001 / ACTIVATION * np.abs(w).sum(axis=1)
    return 2 * lost + rounding + top * 40 * UNIT * magnitude + 1e-29


def assert_product(y: np.ndarray, x: np.ndarray, w: np.ndarray, name: str = "float32") -> None:
    x, w = x.astype(np.float64), w.astype(np.float64)
    assert y.dtype == np.float32
    assert y.shape == (x.shape[0], w.shape[0])
    error = np.abs(y - x @ w.T) / tolerance(x, w, name)
    assert error.max(initial=0.0) <= 1.0


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("rows", "size", "outs"), SHAPES)
def test_agrees_with_numpy(
    isa: str, name: str, linear: Linear, rows: int, size: int, outs: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(rows + size)
    x = rng.standard_normal((rows, size), dtype=np.float32)
    packed = [pack(name, rng.standard_normal((2, out, size), dtype=np.float32)) for out in outs]
    for layer in range(2):
        results = linear(x, layer, [arrays for arrays, _ in packed], outs)
        for y, (_, w) in zip(results, packed, strict=True):
            assert_product(y, x, w[layer], name)


@pytest.mark.parametrize("used", [0, 1, 5, 8, 13])
def test_padding_is_not_computed(isa: str, name: str, linear: Linear, used: int) -> None:
    rng = np.random.default_rng(used)
    x = rng.standard_normal((13, 70), dtype=np.float32)
    x[used:] = np.nan
    packed = [pack(name, rng.standard_normal((2, out, 70), dtype=np.float32)) for out in (33, 9)]
    results = linear(x, 1, [arrays for arrays, _ in packed], (33, 9), used=used)
    for y, (_, w) in zip(results, packed, strict=True):
        assert_product(y[:used], x[:used], w[1], name)


@pytest.mark.parametrize(("rows", "size", "outs"), SHAPES)
def test_symmetric_weights_and_stored_minima_agree(
    isa: str, linear: Linear, rows: int, size: int, outs: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(rows + size)
    x = rng.standard_normal((rows, size), dtype=np.float32)
    symmetric = [
        pack("int4-symmetric", rng.standard_normal((1, out, size), dtype=np.float32))[0] for out in outs
    ]
    stored = [[values, scale, (-8 * scale).astype(np.float16)] for values, scale in symmetric]
    for one, other in zip(linear(x, 0, symmetric, outs), linear(x, 0, stored, outs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=4e-6 + 1e-7 * size)


# The fixtures are the same for every example: they select kernels and format.
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 41),
    size=st.integers(1, 90),
    outs=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    layers=LAYERS,
)
@example(rows=41, size=769, outs=[70, 1, 1, 9], layers=(2, 1))
@example(rows=5, size=2049, outs=[17], layers=(1, 0))
@example(rows=3, size=64, outs=[700], layers=(1, 0))
def test_small_whole_numbers_are_summed_exactly(
    isa: str, name: str, linear: Linear, rows: int, size: int, outs: list[int], layers: tuple[int, int]
) -> None:
    """Every element counts once and in its place: sums of small whole numbers are exact."""
    count, layer = layers
    rng = np.random.default_rng(size)
    x = rng.integers(-9, 10, (rows, size)).astype(np.float32)
    if name in PACKED:
        # Make the scales of activations 1.
        if name in NARROW:
            x[:, ::GROUP] = BYTE
        else:
            x[:, 0] = ACTIVATION
    weights = []
    for out in outs:
        # An element of another layer would make the sum NaN.
        arrays, values = whole_numbers(name, rng, (count, out, size), layer=layer)
        weights.append((arrays, values[layer].astype(np.float64)))
    for y, (_, w) in zip(linear(x, layer, [a for a, _ in weights], outs), weights, strict=True):
        np.testing.assert_array_equal(y, (x.astype(np.float64) @ w.T).astype(np.float32))


@pytest.mark.parametrize(("rows", "size", "outs"), [(1, 17, 33), (7, 9, 15), (13, 800, 7)])
@pytest.mark.parametrize("seed", range(4))
def test_nan_and_infinity_land_where_numpy_puts_them(
    isa: str, linear: Linear, rows: int, size: int, outs: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (rows, size)).astype(np.float32)
    w = rng.integers(-2, 3, (2, outs, size)).astype(np.float32)
    for array in (x, w[1]):
        places = (rng.integers(0, array.shape[0], 3), rng.integers(0, array.shape[1], 3))
        array[places] = rng.permutation(np.float32([np.nan, np.inf, -np.inf]))
    x[0, -1] = np.inf  # the last column is in a vector padded with zeros
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ w[1].astype(np.float64).T
    for dtype in (np.float32, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(linear(x, 1, [[w.astype(dtype)]], [outs])[0], expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 37, 39])
@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("name", PACKED)
def test_a_row_that_is_not_finite_has_no_answer(
    isa: str, name: str, linear: Linear, rows: int, place: int, bad: float
) -> None:
    """With packed weights the answers of that row are NaN and those of other rows are not."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 40), dtype=np.float32)
    arrays, w = pack(name, rng.standard_normal((1, 33, 40), dtype=np.float32))
    good = linear(x, 0, [arrays], [33])[0]
    assert_product(good, x, w[0], name)
    x[1, place] = bad
    found = linear(x, 0, [arrays], [33])[0]
    assert np.all(np.isnan(found[1]))
    np.testing.assert_array_equal(np.delete(found, 1, 0), np.delete(good, 1, 0))


def test_the_zeros_behind_a_partial_vector_meet_no_infinity(isa: str, linear: Linear) -> None:
    """Infinity times a padding zero would be NaN; every answer here is plus infinity."""
    x, w = np.full((7, 19), np.inf, np.float32), np.ones((1, 9, 19), np.float32)
    assert np.all(linear(x, 0, [[w]], [9])[0] == np.inf)


@pytest.mark.parametrize(("x_scale", "w_scale"), [(1e30, 1e-30), (1e-30, 1e30), (1e30, 1e7), (1e-30, 1e-7)])
def test_extreme_scales(isa: str, linear: Linear, x_scale: float, w_scale: float) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((7, 65)) * x_scale).astype(np.float32)
    w = (rng.standard_normal((2, 33, 65)) * w_scale).astype(np.float32)
    assert_product(linear(x, 1, [[w]], [33])[0], x, w[1])


@pytest.mark.parametrize("x_scale", [1e-42, 1e-31, 1e-25, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 65), (2, 2081), (7, 65)])
def test_extreme_activations(
    isa: str, name: str, linear: Linear, rows: int, inputs: int, x_scale: float
) -> None:
    rng = np.random.default_rng(1)
    x = (rng.uniform(-1, 1, (rows, inputs)) * x_scale).astype(np.float32)
    arrays, w = pack(name, rng.uniform(-1e-3, 1e-3, (1, 33, inputs)).astype(np.float32))
    assert_product(linear(x, 0, [arrays], [33])[0], x, w[0], name)


def test_overflow_is_infinite_and_underflow_zero(isa: str, linear: Linear) -> None:
    big, small = np.full((3, 17), 1e30, np.float32), np.full((3, 17), 1e-30, np.float32)
    assert np.all(linear(big, 0, [[big[None]]], [3])[0] == np.inf)
    assert np.all(linear(big, 0, [[-big[None]]], [3])[0] == -np.inf)
    assert np.all(linear(small, 0, [[small[None]]], [3])[0] == 0.0)


@pytest.mark.parametrize(
    ("rows", "size", "outs"), [(0, 5, (3,)), (3, 5, (0,)), (2, 5, (3, 0, 4)), (3, 0, (4,)), (9, 0, (4,))]
)
def test_empty_sizes(isa: str, linear: Linear, rows: int, size: int, outs: tuple[int, ...]) -> None:
    x, weights = np.ones((rows, size), np.float32), [[np.ones((2, out, size), np.float32)] for out in outs]
    for y, out in zip(linear(x, 1, weights, outs), outs, strict=True):
        np.testing.assert_array_equal(y, np.full((rows, out), size, np.float32))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("name", [name for name in PACKED if name in FORMATS])
def test_nothing_to_sum(isa: str, name: str, linear: Linear, rows: int) -> None:
    stored = [np.zeros(a.shape, a.numpy_dtype) for a in FORMATS[name].arrays((1, 20, 0))]
    assert np.all(linear(np.ones((rows, 0), np.float32), 0, [stored], [20])[0] == 0.0)


def reference_gate(name: str, x: np.ndarray) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("rows", "size", "outs"), [(1, 70, 40), (3, 33, 17), (19, 96, 129), (300, 40, 33)])
def test_norm_bias_and_residual(isa: str, name: str, linear: Linear, rows: int, size: int, outs: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, size), dtype=np.float32)
    norm, bias = (rng.standard_normal((2, n), dtype=np.float32) for n in (size, outs))
    residual = rng.standard_normal((rows, outs), dtype=np.float32)
    arrays, w = pack(name, rng.standard_normal((2, outs, size), dtype=np.float32))
    found = linear(x, 1, [arrays], [outs], norm=norm, eps=1e-5, biases=[bias], residual=residual)[0]
    normed = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-5) * norm[1]
    product, lost = normed @ w[1].T, 2 * tolerance(normed, w[1], name) + 1e-5
    assert np.all(np.abs(found - (product + bias[1] + residual)) <= lost)
    plain = linear(x, 1, [arrays], [outs], norm=norm, eps=1e-5)[0]
    assert np.all(np.abs(plain - product) <= lost)


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "size", "outs"), [(1, 70, 40), (3, 33, 17), (19, 96, 129), (300, 40, 33)])
def test_gates(
    isa: str, name: str, linear: Linear, rows: int, size: int, outs: int, gate: str, biased: bool
) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, size), dtype=np.float32) * 0.3
    packed = [pack(name, rng.standard_normal((1, outs, size), dtype=np.float32)) for _ in range(2)]
    biases = [rng.standard_normal((1, outs), dtype=np.float32) for _ in range(2)] if biased else []
    found = linear(x, 0, [a for a, _ in packed], [outs, outs], biases=biases, gate=gate)
    first, second = (
        x.astype(np.float64) @ w[0].T + (biases[i][0] if biased else 0) for i, (_, w) in enumerate(packed)
    )
    assert len(found) == 1
    expected = reference_gate(gate, first) * second
    # Neither gate is steeper than 1.13.
    lost = [tolerance(x, w[0], name) for _, w in packed]
    lost_together = 1.13 * lost[0] * (np.abs(second) + lost[1]) + np.abs(first) * lost[1]
    assert np.all(np.abs(found[0] - expected) <= lost_together + 1e-5 * np.abs(expected) + 1e-5)


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize(("rows", "size", "outs"), [(1, 70, 40), (19, 96, 129)])
def test_gate_of_one(
    isa: str, name: str, linear: Linear, rows: int, size: int, outs: int, gate: str, around: bool
) -> None:
    """A gate without a second product; the bias comes before it, the residual after it."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, size), dtype=np.float32) * 0.3
    arrays, w = pack(name, rng.standard_normal((2, outs, size), dtype=np.float32))
    bias, residual = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, outs), (rows, outs)))
    given = {"biases": [bias], "residual": residual} if around else {}
    (found,) = linear(x, 1, [arrays], [outs], gate=gate, **given)
    product = x.astype(np.float64) @ w[1].T + (bias[1] if around else 0)
    expected = reference_gate(gate, product) + (residual if around else 0)
    lost = 1.13 * tolerance(x, w[1], name) + 1e-5 * np.abs(expected) + 1e-5
    assert np.all(np.abs(found - expected) <= lost)


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gates_far_out(isa: str, linear: Linear, gate: str) -> None:
    """Inputs whose exponential would overflow, NaN and infinities."""
    values = np.float32([-np.inf, -1e30, -200, -90, -1e-30, 0, 1e-30, 90, 200, 1e30, np.inf, np.nan, -20])
    x = values[:, None]
    one, two = np.ones((1, 1, 1), np.float32), np.ones((1, 1, 1), np.float32)
    found = linear(x, 0, [[one], [two]], [1, 1], gate=gate)[0][:, 0]
    with np.errstate(all="ignore"):
        expected = (
            np.float32([0.0 if v < -80 else reference_gate(gate, np.float64(v)) for v in values]) * values
        )
    finite = np.isfinite(values)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=1e-5, atol=1e-25)
    assert np.isnan(found[11])
    assert found[10] == np.inf or np.isnan(found[10])


def test_formats_of_a_call_may_differ(isa: str, linear: Linear) -> None:
    rng = np.random.default_rng(3)
    for rows in (1, 4, 21):
        x = rng.standard_normal((rows, 70), dtype=np.float32)
        packed = {n: pack(n, rng.standard_normal((2, 33, 70), dtype=np.float32)) for n in NAMES}
        results = linear(x, 1, [a for a, _ in packed.values()], [33] * len(packed))
        for y, (n, (_, w)) in zip(results, packed.items(), strict=True):
            assert_product(y, x, w[1], n)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("code", ["least", "most"])
def test_the_largest_products_do_not_overflow(isa: str, linear: Linear, name: str, code: str) -> None:
    """16-bit sums hold the products of the largest codes with the largest activations."""
    kind, size = BLOCK_FORMATS[name], 2100
    lowest, highest = (-128, 127) if kind.bits == 8 else (0, 2**kind.bits - 1)
    dtype = np.int8 if kind.bits == 8 else np.uint8
    codes = np.full((17, size), lowest if code == "least" else highest, dtype)
    coefficients = [np.ones((17, n), dtype) for n, dtype in kind.coefficient_shapes(size)]
    records = kind.pack(codes, *coefficients)
    signs = np.where(np.arange(size) % 2, 1.0, -1.0)
    x = np.stack([np.ones(size), -np.ones(size), signs, -signs]).astype(np.float32)
    y = linear(x, 0, [mixed([name], [records])], [17])[0]
    assert_product(y, x, kind.decode(records, 17, size), name)


@pytest.mark.parametrize(("rows", "size", "out"), [(1, 70, 33), (21, 577, 17), (3, 2081, 50)])
def test_layers_of_a_stack_may_differ(isa: str, linear: Linear, rows: int, size: int, out: int) -> None:
    rng = np.random.default_rng(size)
    x = rng.standard_normal((rows, size), dtype=np.float32)
    names = [*BLOCK_FORMATS, "q4_0"]
    arrays, w = pack_mixed(names, rng.standard_normal((len(names), out, size), dtype=np.float32))
    for layer, name in enumerate(names):
        assert_product(linear(x, layer, [arrays], [out])[0], x, w[layer], name)


@pytest.mark.parametrize(("vocab", "width"), [(1, 1), (40, 17), (100, 64), (33, 576)])
def test_embed(name: str, embed: Callable[..., Any], vocab: int, width: int) -> None:
    rng = np.random.default_rng(vocab)
    arrays, table = pack(name, rng.standard_normal((1, vocab, width), dtype=np.float32))
    tokens = np.int32([0, vocab - 1, *rng.integers(0, vocab, 30)])
    np.testing.assert_array_equal(embed(tokens, arrays, vocab, width), table[0][tokens].astype(np.float32))
    assert embed(tokens[:0], arrays, vocab, width).shape == (0, width)


def test_every_exponent_of_mxfp4(isa: str, embed: Callable[..., Any], linear: Linear) -> None:
    """Exponents from 253 on overflow float32; products with 0 and 1 are subnormal, and count as zero."""
    kind, exponents = BLOCK_FORMATS["mxfp4"], np.arange(2, 253)
    codes = np.tile(np.arange(32) % 16, (len(exponents), 1)).astype(np.uint8)
    records = kind.pack(codes, exponents[:, None].astype(np.uint8))
    expected = kind.decode(records, len(exponents), 32)
    arrays = mixed(["mxfp4"], [records])
    tokens = np.arange(len(exponents), dtype=np.int32)
    np.testing.assert_array_equal(embed(tokens, arrays, len(exponents), 32), expected)
    x = np.zeros((1, 32), np.float32)
    x[0, 7] = 127  # the largest activation stands for itself
    found = linear(x, 0, [arrays], [len(exponents)])[0][0]
    # 127 times the largest of these weights overflows float32.
    np.testing.assert_allclose(found[:-16], 127 * expected[:-16, 7], rtol=1e-6)
