"""precast.argmax against NumPy: the first of equal numbers wins, and NaN wins over any number."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

Argmax = Callable[..., np.ndarray]
# XLA's threads flush subnormal numbers to zero.
NUMBERS = st.floats(width=32, allow_subnormal=False) | st.sampled_from(
    [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan")]
)


@given(x=arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 700)), elements=NUMBERS))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_row(isa: str, argmax: Argmax, x: np.ndarray) -> None:
    np.testing.assert_array_equal(argmax(x), x.argmax(axis=1))


@pytest.mark.parametrize("width", [1, 7, 255, 256, 257, 511, 512, 513, 1024, 49152, 151_936])
def test_the_largest_anywhere(isa: str, argmax: Argmax, width: int) -> None:
    random = np.random.default_rng(width)
    places = {0, width - 1, *random.integers(0, width, 30).tolist()}
    x = np.tile(random.standard_normal(width).astype(np.float32), (len(places), 1))
    for row, place in zip(x, places, strict=True):
        row[place] = 9
    np.testing.assert_array_equal(argmax(x), list(places))


@pytest.mark.parametrize("value", [np.nan, np.inf, 5.0])
def test_of_equals_the_first(isa: str, argmax: Argmax, value: float) -> None:
    x = np.zeros((1, 5000), np.float32)
    for place in (4999, 4000, 513, 512, 300, 31, 0):
        x[0, place] = value
        assert argmax(x).tolist() == [place]


def test_nan_goes_before_infinity(isa: str, argmax: Argmax) -> None:
    x = np.full((1, 3000), -np.inf, np.float32)
    assert argmax(x).tolist() == [0]
    x[0, 100] = np.inf
    x[0, 2000] = np.nan
    assert argmax(x).tolist() == [2000]


def test_no_rows(argmax: Argmax) -> None:
    assert argmax(np.zeros((0, 8), np.float32)).shape == (0,)


@pytest.mark.parametrize("used", [0, 1, 3, 5])
def test_padding_is_not_compared(isa: str, argmax: Argmax, used: int) -> None:
    x = np.random.default_rng(used).standard_normal((5, 600)).astype(np.float32)
    assert argmax(x, used).tolist() == [*x[:used].argmax(1), *[0] * (5 - used)]


def test_version_1_compares_all_rows(isa: str, argmax: Argmax) -> None:
    x = np.random.default_rng(0).standard_normal((5, 600)).astype(np.float32)
    assert argmax(x, version=1).tolist() == x.argmax(1).tolist()
