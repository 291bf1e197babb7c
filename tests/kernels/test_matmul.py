"""precast.matmul against NumPy in float64."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

Matmul = Callable[..., list[np.ndarray]]

UNIT = 2.0**-24  # half an ulp of one: the relative error of one float32 operation
SMALLEST = 2.0**-126  # below it XLA's threads count as zero
# (rows, in, outs): each a size beside a multiple of a vector, of a register block, of the 768 columns that many
# rows are summed in at a time, or of the rows of weights of a task.
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
    (1, 2, (1537,)),
)
LAYERS = st.integers(1, 4).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(0, layers - 1)))


def tolerance(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What summing in lanes of four at least, and across them, may lose in float32."""
    terms = x.shape[1]
    return (terms / 4 + 8) * UNIT * (np.abs(x) @ np.abs(w).T) + terms * SMALLEST


def assert_product(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    x, w = x.astype(np.float64), w.astype(np.float64)
    assert y.dtype == np.float32
    assert y.shape == (x.shape[0], w.shape[0])
    error = np.abs(y - x @ w.T) / tolerance(x, w)
    assert error.max(initial=0.0) <= 1.0


@pytest.mark.parametrize(("rows", "size", "outs"), SHAPES)
def test_agrees_with_numpy(isa: str, matmul: Matmul, rows: int, size: int, outs: tuple[int, ...]) -> None:
    rng = np.random.default_rng(rows + size)
    x = rng.standard_normal((rows, size), dtype=np.float32)
    weights = [rng.standard_normal((3, out, size), dtype=np.float32) for out in outs]
    for layer in range(3):
        for y, w in zip(matmul(x, layer, weights), weights, strict=True):
            assert_product(y, x, w[layer])


@pytest.mark.parametrize("used", [0, 1, 5, 8, 13])
def test_padding_is_not_computed_and_is_zero(isa: str, matmul: Matmul, used: int) -> None:
    rng = np.random.default_rng(used)
    x = rng.standard_normal((13, 70), dtype=np.float32)
    x[used:] = np.nan
    weights = [rng.standard_normal((2, out, 70), dtype=np.float32) for out in (33, 9)]
    for y, w in zip(matmul(x, 1, weights, used), weights, strict=True):
        assert_product(y[:used], x[:used], w[1])
        assert np.all(y[used:] == 0.0)


# The fixture is the same for every example: it says which kernels run.
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 41),
    size=st.integers(1, 90),
    outs=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    layers=LAYERS,
)
@example(rows=41, size=769, outs=[70, 1, 1, 9], layers=(2, 1))
def test_small_whole_numbers_are_summed_exactly(
    isa: str, matmul: Matmul, rows: int, size: int, outs: list[int], layers: tuple[int, int]
) -> None:
    """Every element once and in its place: sums of small whole numbers leave no room for a tolerance."""
    count, layer = layers
    rng = np.random.default_rng(size)
    x = rng.integers(-9, 10, (rows, size)).astype(np.float32)
    weights = [rng.integers(-9, 10, (count, out, size)).astype(np.float32) for out in outs]
    for other in set(range(count)) - {layer}:
        for w in weights:
            w[other] = np.nan  # one element of another layer would show
    for y, w in zip(matmul(x, layer, weights), weights, strict=True):
        np.testing.assert_array_equal(y, x @ w[layer].T)


@pytest.mark.parametrize(("rows", "size", "outs"), [(1, 17, 33), (7, 9, 15), (13, 800, 7)])
@pytest.mark.parametrize("seed", range(4))
def test_nan_and_infinity_land_where_numpy_puts_them(
    isa: str, matmul: Matmul, rows: int, size: int, outs: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (rows, size)).astype(np.float32)
    w = rng.integers(-2, 3, (2, outs, size)).astype(np.float32)
    for array in (x, w[1]):
        places = (rng.integers(0, array.shape[0], 3), rng.integers(0, array.shape[1], 3))
        array[places] = rng.permutation(np.float32([np.nan, np.inf, -np.inf]))
    x[0, -1] = np.inf  # the last column lies in a vector that is filled up with zeros
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ w[1].astype(np.float64).T
    np.testing.assert_array_equal(matmul(x, 1, [w])[0], expected)


def test_the_zeros_behind_a_partial_vector_meet_no_infinity(isa: str, matmul: Matmul) -> None:
    """Infinity times a padding zero would be NaN: all of these are plus infinity."""
    x, w = np.full((7, 19), np.inf, np.float32), np.ones((1, 9, 19), np.float32)
    assert np.all(matmul(x, 0, [w])[0] == np.inf)


@pytest.mark.parametrize(("x_scale", "w_scale"), [(1e30, 1e-30), (1e-30, 1e30), (1e30, 1e7), (1e-30, 1e-7)])
def test_extreme_scales(isa: str, matmul: Matmul, x_scale: float, w_scale: float) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((7, 65)) * x_scale).astype(np.float32)
    w = (rng.standard_normal((2, 33, 65)) * w_scale).astype(np.float32)
    assert_product(matmul(x, 1, [w])[0], x, w[1])


def test_overflow_is_infinite_and_underflow_zero(isa: str, matmul: Matmul) -> None:
    big, small = np.full((3, 17), 1e30, np.float32), np.full((3, 17), 1e-30, np.float32)
    assert np.all(matmul(big, 0, [big[None]])[0] == np.inf)
    assert np.all(matmul(big, 0, [-big[None]])[0] == -np.inf)
    assert np.all(matmul(small, 0, [small[None]])[0] == 0.0)


@pytest.mark.parametrize(
    ("rows", "size", "outs"), [(0, 5, (3,)), (3, 5, (0,)), (2, 5, (3, 0, 4)), (3, 0, (4,)), (9, 0, (4,))]
)
def test_empty_sizes(isa: str, matmul: Matmul, rows: int, size: int, outs: tuple[int, ...]) -> None:
    x, weights = np.ones((rows, size), np.float32), [np.ones((2, out, size), np.float32) for out in outs]
    for y, out in zip(matmul(x, 1, weights), outs, strict=True):
        np.testing.assert_array_equal(y, np.full((rows, out), size, np.float32))
