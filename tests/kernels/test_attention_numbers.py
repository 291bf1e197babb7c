"""precast.attention with rounding into the cache, infinities and NaN, for one sequence without rotation."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest

Attention = Callable[..., tuple[np.ndarray, list[np.ndarray]]]

KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


@dataclass(frozen=True, kw_only=True)
class Call:
    """T tokens after `start` filled positions."""

    q: np.ndarray  # [T, N, H]
    k: np.ndarray  # [T, K, H]
    v: np.ndarray
    keys: np.ndarray  # [K, start, H]
    values: np.ndarray


def make(start: int, tokens: int, *, K: int = 2, G: int = 3, H: int = 16) -> Call:
    rng = np.random.default_rng(start)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    fresh = normal(tokens, K, H), normal(tokens, K, H)
    q = normal(tokens, K * G, H)
    return Call(q=q, k=fresh[0], v=fresh[1], keys=normal(K, start, H), values=normal(K, start, H))


def run(attention: Attention, call: Call, kind: str = "float32") -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the answers ``[T, N, H]``, the stored keys and values ``[K, S, H]``, and for int8 their scales."""
    tokens, (K, start, H) = len(call.q), call.keys.shape
    caches = [np.zeros((1, 1, K, start + tokens, H), KINDS[kind]) for _ in range(2)]
    for cache, rows in zip(caches, (call.keys, call.values), strict=True):
        cache[0, 0, :, :start] = rows
    if kind == "int8":
        caches += [np.ones((1, 1, K, start + tokens), np.float32) for _ in range(2)]
    angles = np.zeros((1, tokens, 0), np.float32)
    fresh = (a[None] for a in (call.q, call.k, call.v))
    out, after = attention(*fresh, angles, angles, caches, 0, [0], [start], [tokens], scale=H**-0.5)
    return out[0], [a[0, 0] for a in after]


def expected(call: Call) -> np.ndarray:
    """Return NumPy's answers in float64, with its NaN and infinities."""
    K, start, H = call.keys.shape
    keys = np.concatenate([call.keys, call.k.swapaxes(0, 1)], axis=1).astype(np.float64)
    values = np.concatenate([call.values, call.v.swapaxes(0, 1)], axis=1).astype(np.float64)
    out = np.empty(call.q.shape)
    for t, n in np.ndindex(call.q.shape[:2]):
        head, seen = n // (call.q.shape[1] // K), start + t + 1
        with np.errstate(all="ignore"):
            scores = keys[head, :seen] @ call.q[t, n].astype(np.float64) * H**-0.5
            weights = np.exp(scores - scores.max())
            out[t, n] = weights / weights.sum() @ values[head, :seen]
    return out


SHAPES = pytest.mark.parametrize(("start", "tokens"), [(300, 1), (40, 30)], ids=["decode", "prefill"])


def assert_same_pattern(attention: Attention, call: Call) -> None:
    """Check for NumPy's finite answers, and for the same infinity or NaN elsewhere."""
    out, _ = run(attention, call)
    np.testing.assert_allclose(out, expected(call), rtol=1e-4, atol=1e-5)


@SHAPES
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("end", [1, 64, 65, 256, 290])
def test_non_finite_keys(
    isa: str, attention: Attention, start: int, tokens: int, number: float, end: int
) -> None:
    """Some or all positions before the first query, so that a whole tile or span of scores may be -inf."""
    call = make(start, tokens)
    q, keys = call.q.copy(), call.keys.copy()
    q[..., 5] = np.where(np.arange(tokens)[:, None] % 3 == 1, -1.0, 1.0)  # scores of either sign
    keys[1, : min(end, start), 5] = number
    assert_same_pattern(attention, replace(call, q=q, keys=keys))


def test_nan_among_scores_of_minus_infinity(isa: str, attention: Attention) -> None:
    """The first tile has no finite score for the peak."""
    call = make(300, 1)
    q, keys = np.abs(call.q) + 1, call.keys.copy()
    keys[:, :256] = -np.inf
    assert_same_pattern(attention, replace(call, q=q, keys=keys))
    keys[:, 17] = np.nan
    out, _ = run(attention, replace(call, q=q, keys=keys))
    assert np.all(np.isnan(out))


def test_every_score_minus_infinity_is_nan(isa: str, attention: Attention) -> None:
    """As in NumPy, the sum of the weights is 0 / 0."""
    call = make(290, 1)
    call = replace(call, q=np.abs(call.q) + 1, k=np.full_like(call.k, -np.inf))
    out, _ = run(attention, replace(call, keys=np.full_like(call.keys, -np.inf)))
    assert np.all(np.isnan(out))


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_non_finite_values(isa: str, attention: Attention, number: float) -> None:
    call = make(290, 1)
    values = call.values.copy()
    values[0, 70, 3] = number
    assert_same_pattern(attention, replace(call, values=values))


@SHAPES
def test_nan_in_a_query_stays_there(isa: str, attention: Attention, start: int, tokens: int) -> None:
    call = make(start, tokens)
    q = call.q.copy()
    q[tokens // 2, 4, 3] = np.nan
    clean, _ = run(attention, call)
    out, _ = run(attention, replace(call, q=q))
    assert np.all(np.isnan(out[tokens // 2, 4]))
    others = np.ones(out.shape[:2], bool)
    others[tokens // 2, 4] = False
    np.testing.assert_array_equal(out[others], clean[others])


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint16)


@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("H", [8, 27])
def test_bfloat16_rounds_to_nearest_even(isa: str, attention: Attention, size: float, H: int) -> None:
    call = make(3, 12, H=H)
    v = call.v * np.float32(size)
    v[0, 0, :6] = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, 0.0, -0.0]  # two ties, one that overflows
    _, after = run(attention, replace(call, v=v), "bfloat16")
    np.testing.assert_array_equal(bits(after[1][:, 3:]), bits(v.swapaxes(0, 1).astype(ml_dtypes.bfloat16)))


@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("H", [8, 27])
def test_int8_rounds_by_the_largest(isa: str, attention: Attention, size: float, H: int) -> None:
    call = make(3, 12, H=H)
    v = call.v * np.float32(size)
    v[0, 0] = 0.0
    v[1, 0, :6] = np.float32(size) * np.float32([127, 0.5, 1.5, 2.5, -0.5, -1.5])
    _, (_, rows, _, scales) = run(attention, replace(call, v=v), "int8")
    fresh = v.swapaxes(0, 1)
    should = np.abs(fresh).max(-1) / np.float32(127)
    np.testing.assert_array_equal(scales[:, 3:], should)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(rows[:, 3:], np.nan_to_num(np.rint(fresh / should[..., None])))


@pytest.mark.parametrize("size", [1e-37, 1e-42])
def test_rows_too_small_for_a_scale_are_zeros(isa: str, attention: Attention, size: float) -> None:
    call = make(3, 5)
    _, (_, rows, _, scales) = run(attention, replace(call, v=call.v * np.float32(size)), "int8")
    assert not np.any(rows[:, 3:])
    assert not np.any(scales[:, 3:])


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("H", [8, 11])
def test_bfloat16_keeps_what_is_no_number(isa: str, attention: Attention, number: float, H: int) -> None:
    call = make(3, 5, H=H)
    v = call.v.copy()
    v[2, 0, H - 1] = number
    out, after = run(attention, replace(call, v=v), "bfloat16")
    np.testing.assert_array_equal(after[1][0, 5, H - 1].astype(np.float32), np.float32(number))
    assert not np.any(np.isfinite(out[4, :3, H - 1]))
    assert np.all(np.isfinite(out[4, 3:]))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("H", [8, 11])
@pytest.mark.parametrize("tokens", [5, 20])
def test_int8_says_nan_for_a_row_with_no_number(
    isa: str, attention: Attention, number: float, H: int, tokens: int
) -> None:
    """int8 cannot hold NaN or infinity, so the scale becomes NaN."""
    call = make(3, tokens, H=H)
    v = call.v.copy()
    v[2, 0, H - 1] = number
    out, (_, rows, _, scales) = run(attention, replace(call, v=v), "int8")
    assert np.isnan(scales[0, 5])
    assert np.sum(np.isnan(scales)) == 1
    assert not np.any(rows[0, 5])
    assert np.all(np.isnan(out[-1, :3]))
    assert np.all(np.isfinite(out[-1, 3:]))
