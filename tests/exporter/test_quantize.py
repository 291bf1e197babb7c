"""Storage formats: the layout of each element, bounds on errors, and refusals."""

import dataclasses
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.exporter.block_formats import BLOCK_FORMATS, GROUP, PANEL
from precast.exporter.quantize import FORMATS, INT4_SYMMETRIC, StoredArray
from precast.exporter.sources.base import QuantisedBlocks
from precast.loaders.artifact.errors import PrecastError

INT8, INT4 = FORMATS["int8"], FORMATS["int4"]
INTEGERS = pytest.mark.parametrize("name", ["int8", "int4"])
HALF_MAX = 65504.0

shapes = st.tuples(st.integers(1, 40), st.integers(1, 100))


def normal(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def again(name: str, matrix: np.ndarray) -> np.ndarray:
    return FORMATS[name].decode(FORMATS[name].encode(matrix), *matrix.shape)


def errors(matrix: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the squared error of each group of inputs, ``[out, groups]``."""
    starts = np.arange(0, matrix.shape[1], GROUP)
    return np.add.reduceat((matrix.astype(np.float64) - other) ** 2, starts, axis=1)


def plain(name: str, matrix: np.ndarray) -> np.ndarray:
    """Round each group over its whole range."""
    out = np.zeros(matrix.shape)
    for start in range(0, matrix.shape[1], GROUP):
        group = matrix[:, start : start + GROUP].astype(np.float64)
        low = group.min(1, keepdims=True) if name == "int4" else np.zeros((len(group), 1))
        top = np.abs(group).max(1, keepdims=True) / 127
        step = (group.max(1, keepdims=True) - low) / 15 if name == "int4" else top
        step, low = step.astype(np.float16).astype(np.float64), low.astype(np.float16).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(step > 0, np.rint((group - low) / step), 0)
        out[:, start : start + GROUP] = (
            step * np.clip(values, *((0, 15) if name == "int4" else (-127, 127))) + low
        )
    return out


def element(name: str, arrays, o: int, k: int) -> np.float32:
    """Decode one weight as the documentation of the formats describes."""
    scale = np.float32(arrays[1][o // 16, k // 32, o % 16])
    if name == "int8":
        return scale * np.float32(arrays[0][o // 16, k // 2, o % 16, k % 2])
    byte = int(arrays[0][o // 16, k // 8, o % 16, k % 4])
    value = byte & 15 if k % 8 < 4 else byte >> 4
    if name == INT4_SYMMETRIC:
        return scale * np.float32(value - 8)
    return scale * np.float32(value) + np.float32(arrays[2][o // 16, k // 32, o % 16])


def spread(coefficients: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return a scale or minimum for every weight."""
    each = coefficients.swapaxes(1, 2).reshape(-1, coefficients.shape[1])[:rows].astype(np.float64)
    return np.repeat(each, GROUP, axis=1)[:, :columns]


# --- layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float32", [("", (3, 20, 40), "float32")]),
        ("bfloat16", [("", (3, 20, 40), "bfloat16")]),
        ("int8", [("", (3, 2, 32, 16, 2), "int8"), (".scale", (3, 2, 2, 16), "float16")]),
        (
            "int4",
            [
                ("", (3, 2, 8, 16, 4), "uint8"),
                (".scale", (3, 2, 2, 16), "float16"),
                (".minimum", (3, 2, 2, 16), "float16"),
            ],
        ),
        (INT4_SYMMETRIC, [("", (3, 2, 8, 16, 4), "uint8"), (".scale", (3, 2, 2, 16), "float16")]),
    ],
)
def test_the_arrays_of_a_stack(name, expected):
    arrays = FORMATS[name].arrays((3, 20, 40))
    assert arrays == tuple(StoredArray(*array) for array in expected)
    encoded = FORMATS[name].encode(normal((20, 40)))
    assert [(a.shape, a.dtype) for a in encoded] == [(a.shape[1:], a.numpy_dtype) for a in arrays]


@pytest.mark.parametrize(
    ("name", "shape"), [("float32", (50, 40)), ("bfloat16", (50, 40)), ("int8", (1, 4, 32, 16, 2))]
)
def test_packed_formats_store_a_matrix_as_a_stack_of_one(name, shape):
    assert FORMATS[name].arrays((50, 40))[0].shape == shape


@pytest.mark.parametrize("name", ["int8", "int4", INT4_SYMMETRIC])
@given(shape=shapes, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_every_weight_lies_where_the_kernels_look(name, shape, seed):
    matrix = normal(shape, seed)
    arrays = FORMATS[name].encode(matrix)
    found = FORMATS[name].decode(arrays, *shape)
    expected = [[element(name, arrays, o, k) for k in range(shape[1])] for o in range(shape[0])]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    # The error of a misplaced value would be as large as the value.
    assert np.abs(found - matrix).max() < 0.5


@INTEGERS
@given(shape=shapes)
@settings(deadline=None, max_examples=30)
def test_padding_is_zero(name, shape):
    """All values are far from zero, so that none is zero by chance."""
    arrays = FORMATS[name].encode(normal(shape) + 100)
    rows, columns = shape
    values, groups = arrays[0], -(-columns // GROUP)
    whole = np.zeros((PANEL * len(values), GROUP * groups), np.float32)
    for coefficients in arrays[1:]:
        flat = coefficients.swapaxes(1, 2).reshape(PANEL * len(values), groups)
        assert not flat[rows:].any()
    ones = [values, np.ones_like(arrays[1]), *(np.zeros_like(a) for a in arrays[2:])]
    whole = FORMATS[name].decode(ones, *whole.shape)
    assert not whole[rows:].any()
    assert not whole[:, columns:].any()


@INTEGERS
def test_blocks_of_rows_make_no_difference(name):
    matrix = normal((16 * 300, 96))
    encoded = FORMATS[name].encode(matrix)
    for panel in (0, 150, 299):
        alone = FORMATS[name].encode(matrix[16 * panel : 16 * panel + 16])
        for one, all_ in zip(alone, encoded, strict=True):
            np.testing.assert_array_equal(one[0], all_[panel])


@pytest.mark.parametrize("name", FORMATS)
def test_a_view_that_is_not_contiguous(name):
    matrix = normal((40, 20))
    np.testing.assert_array_equal(again(name, matrix.T), again(name, np.ascontiguousarray(matrix.T)))


@INTEGERS
def test_scratch_is_bounded(name):
    matrix = normal((512, 32768))
    tracemalloc.start()
    try:
        FORMATS[name].encode(matrix)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6


# --- errors -------------------------------------------------------------------------------------------------


@INTEGERS
@given(
    shape=shapes,
    seed=st.integers(0, 99),
    magnitude=st.floats(-9, 4),
    offset=st.sampled_from([0, 0, 1e-3, 1, 100]),
)
@settings(deadline=None, max_examples=120)
def test_no_group_is_worse_than_plain_rounding(name, shape, seed, magnitude, offset):
    matrix = ((normal(shape, seed) + np.float32(offset)) * 10**magnitude).astype(np.float32)
    matrix = np.clip(matrix, -HALF_MAX, HALF_MAX)
    found, limit = errors(matrix, again(name, matrix)), errors(matrix, plain(name, matrix))
    most = np.float64(np.abs(matrix).max()) ** 2
    assert (found <= limit * (1 + 1e-3) + GROUP * most * 1e-13).all()


@pytest.mark.parametrize(("name", "part"), [("int8", 0.93), ("int4", 0.9)])
@pytest.mark.parametrize("tails", [None, 5])
def test_the_search_beats_plain_rounding(name, part, tails):
    random = np.random.default_rng(3)
    matrix = random.standard_normal((64, 576)) if tails is None else random.standard_t(tails, (64, 576))
    matrix = matrix.astype(np.float32)
    found, limit = errors(matrix, again(name, matrix)), errors(matrix, plain(name, matrix))
    assert np.sqrt(found.sum() / limit.sum()) < part


@INTEGERS
@given(shape=shapes, seed=st.integers(0, 99), magnitude=st.floats(-8, 3))
@settings(deadline=None, max_examples=50)
def test_values_are_the_closest_under_the_scale_that_is_stored(name, shape, seed, magnitude):
    """Scales are rounded to float16 before values are rounded; otherwise, values might not be the closest."""
    matrix = normal(shape, seed) * np.float32(10**magnitude)
    stored = FORMATS[name]
    arrays = stored.encode(matrix)
    unscaled = [arrays[0], np.ones_like(arrays[1]), *(np.zeros_like(a) for a in arrays[2:])]
    values = stored.decode(unscaled, *shape).astype(np.float64)
    scale, minimum = (spread(a, *shape) for a in (*arrays[1:], np.zeros_like(arrays[1]))[:2])
    error = np.abs(matrix - (scale * values + minimum))
    slack = np.abs(matrix).max() * 1e-6  # of float32
    for step in (-1, 1):
        other = np.clip(values + step, *((0, 15) if name == "int4" else (-127, 127)))
        assert (error <= np.abs(matrix - (scale * other + minimum)) + slack).all()


@given(rows=st.integers(1, 20), groups=st.integers(1, 3), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=50)
def test_values_on_a_grid_are_exact(rows, groups, seed):
    """Every group reaches both ends of its grid."""
    random = np.random.default_rng(seed)
    scale = random.uniform(1e-3, 1, (rows, groups, 1)).astype(np.float16).astype(np.float32)
    values = random.integers(-127, 128, (rows, groups, GROUP)).astype(np.float32)
    values[..., 7] = 127
    m = (scale * values).reshape(rows, -1)
    np.testing.assert_array_equal(again("int8", m), m)
    minimum = (-8 * scale + random.uniform(-1, 1, scale.shape) * scale).astype(np.float16).astype(np.float32)
    values = random.integers(0, 16, (rows, groups, GROUP)).astype(np.float32)
    values[..., 3], values[..., 30] = 0, 15
    m = (scale * values + minimum).reshape(rows, -1)
    np.testing.assert_array_equal(again("int4", m), m)


@pytest.mark.parametrize("most", [1, 7])
def test_weights_rounded_to_few_symmetric_steps_are_exact(most):
    """Such weights result from training with ternary weights, or with 4-bit weights without a minimum."""
    values = np.random.default_rng(1).integers(-most, most + 1, (40, 64))
    values[:, ::32], values[:, 1::32] = -most, most
    matrix = values.astype(np.float32) * np.float32(0.0123)
    for name in ("int8", "int4"):
        np.testing.assert_allclose(again(name, matrix), matrix, rtol=0, atol=0.0123 * most * 2**-10)


def test_bfloat16_rounds_to_nearest_even():
    matrix = np.array([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.0, 1e-40]], np.float32)
    (stored,) = FORMATS["bfloat16"].encode(matrix)
    assert stored.dtype == ml_dtypes.bfloat16
    assert stored.astype(np.float64)[0, :4].tolist() == [1, 1 + 2**-6, 1 + 2**-7, 0]
    np.testing.assert_array_equal(again("bfloat16", again("bfloat16", matrix)), again("bfloat16", matrix))


def test_float32_is_unchanged():
    matrix = normal((5, 7))
    np.testing.assert_array_equal(again("float32", matrix), matrix)


# --- extremes -----------------------------------------------------------------------------------------------


@INTEGERS
def test_zeros_have_no_scale(name):
    for array in FORMATS[name].encode(np.zeros((20, 70), np.float32)):
        assert not array.any()


@INTEGERS
def test_a_group_of_zeros_among_others(name):
    matrix = normal((3, 96))
    matrix[1, 32:64] = 0
    found = again(name, matrix)
    assert not found[1, 32:64].any()
    assert found[1, :32].any()


@pytest.mark.parametrize("constant", [1.0, -0.375, 1000.0, -(2.0**-14), 65504.0, -65504.0])
def test_a_constant_of_float16_is_exact_in_int4(constant):
    matrix = np.full((5, 50), constant, np.float32)
    np.testing.assert_array_equal(again("int4", matrix), matrix)


def test_a_narrow_group_far_from_zero():
    """Far from zero the steps of float16 are 0.5, and one of them lies within the group."""
    matrix = np.linspace(1000.4, 1000.6, 64, dtype=np.float32).reshape(32, 2).T
    assert np.abs(again("int4", matrix) - matrix).max() < 0.6 / 15


@given(constant=st.floats(0.01, 60000), sign=st.sampled_from([-1, 1]))
@settings(deadline=None, max_examples=60)
def test_any_constant_is_nearly_exact_in_int4(constant, sign):
    matrix = np.full((2, 40), sign * constant, np.float32)
    # The error is 15 times that of the scale, which is stored in float16 with steps of at least 2⁻²⁴.
    np.testing.assert_allclose(again("int4", matrix), matrix, rtol=2**-18, atol=2**-20)


@INTEGERS
@pytest.mark.parametrize("magnitude", [1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-20, 1e-38, 1e-44])
def test_magnitudes_below_normal_float16_lose_one_step_at_most(name, magnitude):
    """Below its normal range float16 has steps of 2⁻²⁴."""
    matrix = np.clip(normal((20, 70)), -3, 3) * np.float32(magnitude)
    found = again(name, matrix)
    step = 3 * magnitude * (2 / 15 if name == "int4" else 1 / 127) + 2**-24
    assert np.isfinite(found).all()
    assert np.abs(found - matrix).max() <= step
    assert (errors(matrix, found) <= errors(matrix, np.zeros_like(matrix)) * (1 + 1e-6)).all()


@pytest.mark.parametrize(("name", "most"), [("int8", 127 * HALF_MAX), ("int4", HALF_MAX)])
def test_the_largest_values_that_fit(name, most):
    matrix = np.clip(normal((20, 70)) * np.float32(most), -most, most).astype(np.float32)
    found = again(name, matrix)
    assert np.isfinite(found).all()
    assert np.abs(found - matrix).max() <= most * (2 / 15 if name == "int4" else 1 / 127)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "int8",
            1e7,
            "up: contains a value of 1e+07, but int8 can represent at most 8.31901e+06; store the weights",
        ),
        ("int8", -3e38, "up: contains a value of 3e+38, but int8 can represent at most 8.31901e+06"),
        (
            "int4",
            65536,
            "up: contains a value of 65536, but int4 can represent at most 65504; store the weights",
        ),
        ("int4", -1e5, "up: contains a value of 100000, but int4 can represent at most 65504"),
        (
            "bfloat16",
            3.4e38,
            "up: contains a value of 3.4e+38, but bfloat16 can represent at most 3.38953e+38",
        ),
    ],
)
def test_values_too_large_for_the_format_are_refused(name, value, text):
    matrix = normal((4, 40))
    matrix[3, 39] = value
    with pytest.raises(PrecastError) as raised:
        FORMATS[name].encode(matrix, "up")
    assert str(raised.value).startswith(text)
    assert str(raised.value).endswith("store the weights in a wider type.")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name, value):
    matrix = normal((4, 40))
    matrix[2, 3] = value
    with pytest.raises(PrecastError, match=r"^gate: contains a value of (nan|inf), but"):
        FORMATS[name].encode(matrix, "gate")


# --- blocks -------------------------------------------------------------------------------------------------


def blocks(kind: str, low: int = -127, *, groups: int = 3) -> QuantisedBlocks:
    """Return blocks with every code of a format; q8_0 begins at `low`."""
    random, form = np.random.default_rng(5), BLOCK_FORMATS[kind]
    low, high = (low, 127) if form.bits == 8 else (0, (1 << form.bits) - 1)
    codes = random.integers(low, high + 1, (20, GROUP * groups)).astype(np.int8 if low < 0 else np.uint8)
    codes[0, :2] = low, high
    coefficients = [random.uniform(-1, 1, (20, n)) for n, _ in form.coefficient_shapes(GROUP * groups)]
    return QuantisedBlocks(
        format=kind, codes=codes, coefficients=tuple(each.astype(np.float16) for each in coefficients)
    )


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("int8", blocks("q8_0")),
        ("int8", blocks("q5_0")),
        ("int8", blocks("q4_0")),
        ("int8", blocks("iq4_nl")),
        ("int4", blocks("q4_0")),
        ("int4", blocks("q4_1")),
        (INT4_SYMMETRIC, blocks("q4_0")),
    ],
)
def test_blocks_are_stored_exactly(decode_blocks, name, given):
    arrays = FORMATS[name].repack(given)
    expected = decode_blocks(given)
    np.testing.assert_array_equal(FORMATS[name].decode(arrays, *expected.shape), expected)
    stored = FORMATS[name].arrays((1, *expected.shape))
    assert [(a.shape, a.dtype) for a in arrays] == [(a.shape[1:], a.numpy_dtype) for a in stored]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("int8", blocks("q8_0", -128)),
        ("int8", blocks("q4_1")),
        ("int8", blocks("iq4_xs")),
        ("int4", blocks("q8_0")),
        ("int4", blocks("q5_0")),
        ("int4", blocks("q5_1")),
        (INT4_SYMMETRIC, blocks("q5_0")),
        (INT4_SYMMETRIC, blocks("q4_1")),
        ("float32", blocks("q4_0")),
        ("bfloat16", blocks("q4_0")),
    ],
)
def test_blocks_that_a_format_cannot_hold_are_left(name, given):
    assert FORMATS[name].repack(given) is None


def narrow(span: int, inputs: int) -> QuantisedBlocks:
    """Return q5_0 blocks in which the codes of each group span `span`, beginning anywhere."""
    random, groups = np.random.default_rng(6), -(-inputs // GROUP)
    least = random.integers(0, 32 - span, (20, groups))
    codes = np.repeat(least, GROUP, axis=1)[:, :inputs] + random.integers(0, span + 1, (20, inputs))
    codes[:, ::GROUP], codes[:, 1::GROUP] = least, least + span
    scale = random.uniform(-1, 1, (20, groups)).astype(np.float16)
    return QuantisedBlocks(format="q5_0", codes=codes.astype(np.uint8), coefficients=(scale,))


@pytest.mark.parametrize("inputs", [96, 72])
def test_four_bits_with_zero_points_keep_integers_and_scales(decode_blocks, inputs):
    """Only the minimum is rounded, to 11 significant bits."""
    given = narrow(15, inputs)
    arrays, expected = INT4.repack(given), decode_blocks(given)
    found = INT4.decode(arrays, *expected.shape)
    np.testing.assert_array_equal(np.diff(given.codes.astype(int), axis=1)[:, :31], steps(arrays, inputs))
    least = given.codes.reshape(20, -1)[:, ::GROUP].astype(np.float64) - 16
    limit = np.abs(least * given.coefficients[0]) * 2.0**-11
    assert (np.abs(found - expected) <= np.repeat(limit, GROUP, axis=1)[:, :inputs] + 1e-7).all()


def steps(arrays: tuple[np.ndarray, ...], inputs: int) -> np.ndarray:
    """Return the differences between neighbouring values in the first group."""
    one, zero = np.ones_like(arrays[1]), np.zeros_like(arrays[2])
    return np.diff(INT4.decode((arrays[0], one, zero), 20, inputs), axis=1)[:, :31]


def test_five_bits_do_not_fit_int4():
    assert INT4.repack(narrow(16, 96)) is None


@pytest.mark.parametrize(
    ("scale", "fits"), [(8188.0, True), (8192.0, False), (-8192.0, False), (2.0**-24, True)]
)
def test_a_minimum_of_eight_scales_must_fit(decode_blocks, scale, fits):
    given = dataclasses.replace(blocks("q4_0", groups=1), coefficients=(np.full((20, 1), scale, np.float16),))
    arrays = INT4.repack(given)
    assert (arrays is not None) == fits
    if fits:
        np.testing.assert_array_equal(INT4.decode(arrays, 20, 32), decode_blocks(given))
