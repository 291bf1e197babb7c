"""Matrices quantised to block formats: bounds on errors, extreme values, and refusals."""

import numpy as np
import pytest

from precast.exporter import block_quantise
from precast.exporter.block_formats import BLOCK_FORMATS, Scales
from precast.exporter.block_quantise import encode
from precast.loaders.artifact.errors import PrecastError

FORMATS = pytest.mark.parametrize("name", BLOCK_FORMATS)
# The maximum root mean square error for normally distributed weights, as a share of their standard deviation. GGML's
# own quantisation to its formats has 5 to 15% larger errors.
LOSSES = {
    "q8_0": 0.0049,
    "q4_0": 0.088,
    "q4_1": 0.074,
    "q5_0": 0.043,
    "q5_1": 0.037,
    "q4_k": 0.076,
    "q5_k": 0.038,
    "q6_k": 0.0185,
    "iq4_nl": 0.08,
    "iq4_xs": 0.08,
    "mxfp4": 0.12,
    "e4m3": 0.028,
}
# The relative error of constant matrices. The numbers of MXFP4 have one bit after the leading one, and scales that are
# powers of two. Small factors of IQ4_XS have few digits, because its scales have only 6 bits.
CONSTANT = {"iq4_xs": 0.07, "mxfp4": 0.2}
# The share of the error that remains when the search knows the importance of inputs. MXFP4 has few scales to choose.
REMAINING = {"mxfp4": 0.99}
# The formats whose coefficients are searched for: not e4m3, in which the largest weight decides.
SEARCHED = pytest.mark.parametrize("name", [name for name in BLOCK_FORMATS if name != "e4m3"])


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def again(name: str, matrix: np.ndarray) -> np.ndarray:
    stored = BLOCK_FORMATS[name]
    return stored.decode(encode(stored, matrix), *matrix.shape)


def loss(matrix: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(matrix - other).mean()))


@FORMATS
def test_the_error_of_normally_distributed_weights(name: str) -> None:
    matrix = normal((64, 1024))
    assert loss(matrix, again(name, matrix)) < LOSSES[name]


@FORMATS
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (17, 40), (16, 256), (20, 300), (5, 545)])
def test_any_shape(name: str, shape: tuple[int, int]) -> None:
    """If the last group or super-group is shorter, its coefficients depend only on its own weights."""
    matrix = normal(shape, shape[1]) * np.float32(0.02)
    error = loss(matrix, again(name, matrix))
    assert error < 2 * LOSSES[name] * 0.02


@FORMATS
def test_groups_of_very_different_magnitudes(name: str) -> None:
    """Groups share factors, so the smallest groups have larger errors, up to their own magnitude."""
    matrix = normal((32, 512)) * np.exp(normal((32, 16), 1)).repeat(32, axis=1)
    matrix[:, 64:96] *= np.float32(1e-4)
    matrix[:, 128:160] = 0
    found = again(name, matrix)
    assert not found[:, 128:160].any()
    assert loss(matrix[:, 64:96], found[:, 64:96]) <= 1.05 * loss(matrix[:, 64:96], 0 * found[:, 64:96])


@FORMATS
def test_weights_of_one_sign(name: str) -> None:
    """Minima of super-groups cannot be positive, so groups far above zero have coarser steps there."""
    for sign in (1, -1):
        matrix = sign * (np.abs(normal((16, 256))) + np.float32(2))
        # The numbers of e4m3 have four significant bits, so their steps grow with the weights.
        bits = 6 if name == "e4m3" else BLOCK_FORMATS[name].bits
        assert loss(matrix, again(name, matrix)) < 5 / (1 << bits)


@FORMATS
@pytest.mark.parametrize("value", [0.0, 1e-38, 3e-6, -1e-3, 1.0, -60000.0])
def test_constant_matrices(name: str, value: float) -> None:
    """The factors of small weights are subnormal numbers of float16, with fewer digits."""
    matrix = np.full((16, 96), value, np.float32)
    np.testing.assert_allclose(again(name, matrix), matrix, rtol=CONSTANT.get(name, 0.04), atol=4e-6)


@FORMATS
def test_blocks_of_rows_make_no_difference(name: str) -> None:
    matrix = normal((16 * 60, 640))
    whole = encode(BLOCK_FORMATS[name], matrix)
    np.testing.assert_array_equal(whole[40:41], encode(BLOCK_FORMATS[name], matrix[640:656]))


@SEARCHED
def test_important_inputs_lose_less(name: str) -> None:
    stored, matrix = BLOCK_FORMATS[name], normal((64, 512))
    importance = np.exp(normal((512,), 1) * 2)

    def weighted(given: np.ndarray | None) -> float:
        codes, *coefficients = block_quantise.quantise(stored, matrix, given)
        found = stored.decode(stored.pack(codes, *coefficients), *matrix.shape)
        return float((importance * np.square(found - matrix)).sum())

    assert weighted(importance) < REMAINING.get(name, 0.93) * weighted(None)


@SEARCHED
def test_the_effective_coefficients_are_those_of_the_records(name: str) -> None:
    stored, matrix = BLOCK_FORMATS[name], normal((32, 300))
    codes, *coefficients = block_quantise.quantise(stored, matrix)
    scale, minimum = block_quantise.effective(stored, tuple(coefficients))
    _, stored_scale, stored_minimum = stored.unpack(stored.pack(codes, *coefficients), 300)
    np.testing.assert_array_equal(scale, stored_scale.reshape(32, -1))
    if minimum is not None:
        np.testing.assert_array_equal(minimum, stored_minimum.reshape(32, -1))
    assert (minimum is None) == (stored.scales not in (Scales.HALF_AND_MINIMUM, Scales.SUPER))


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("q8_0", "8.31901e+06"),
        ("q4_1", "65504"),
        ("q4_k", "4.12675e+06"),
        ("q6_k", "2.66208e+08"),
        ("iq4_nl", "8.31901e+06"),
        ("iq4_xs", "2.57889e+08"),
        ("mxfp4", "2.55212e+38"),
    ],
)
def test_values_too_large_for_a_format_are_refused(name: str, largest: str) -> None:
    matrix = normal((16, 32))
    matrix[1, 2] = value = 3e38 if name == "mxfp4" else 1e9
    with pytest.raises(PrecastError) as raised:
        encode(BLOCK_FORMATS[name], matrix, "model.norm")
    assert str(raised.value) == (
        f"model.norm: contains a value of {value:g}, but {name} can represent at most {largest}; store the weights in a"
        " wider type."
    )
