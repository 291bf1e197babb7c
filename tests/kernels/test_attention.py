"""precast.attention against a plain softmax attention in NumPy, float64."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Attention = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]

UNIT = 2.0**-24  # half an ulp of one: the relative error of one float32 operation


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A call's sizes; sequence r has ``lengths[r]`` tokens from ``starts[r]`` on, in slot ``slots[r]``."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    T: int
    K: int = 2
    G: int = 3
    H: int = 16
    L: int = 2
    B: int = 4
    S: int = 80
    layer: int = 1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of a call; whatever of the caches is not filled is NaN."""

    sizes: Sizes
    q: np.ndarray  # [R, T, N, H]
    k: np.ndarray  # [R, T, K, H]
    v: np.ndarray
    keys: np.ndarray  # [L, B, K, S, H]
    values: np.ndarray
    scale: float = field(default=0.25)


def make(sizes: Sizes) -> Call:
    d, rng = sizes, np.random.default_rng(sizes.seed)
    R = len(d.slots)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    q, k, v = normal(R, d.T, d.K * d.G, d.H), normal(R, d.T, d.K, d.H), normal(R, d.T, d.K, d.H)
    keys, values = (np.full((d.L, d.B, d.K, d.S, d.H), np.nan, np.float32) for _ in range(2))
    for slot, start, length in zip(d.slots, d.starts, d.lengths, strict=True):
        # Tokens that are padding are as unfit to be read as what is not filled.
        for cache in (keys, values):
            if length:
                cache[d.layer, slot, :, :start] = normal(d.K, start, d.H)
    for r, length in enumerate(d.lengths):
        q[r, length:] = k[r, length:] = v[r, length:] = np.nan
    return Call(sizes=sizes, q=q, k=k, v=v, keys=keys, values=values, scale=float(d.H) ** -0.5)


def run(attention: Attention, call: Call) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    d = call.sizes
    arrays = (call.q, call.k, call.v, call.keys, call.values, d.layer, d.slots, d.starts, d.lengths)
    return attention(*arrays, scale=call.scale)


def appended(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """The caches as they must be afterwards."""
    d, caches = call.sizes, (call.keys.copy(), call.values.copy())
    for r, (slot, start, length) in enumerate(zip(d.slots, d.starts, d.lengths, strict=True)):
        for cache, new in zip(caches, (call.k, call.v), strict=True):
            if length:
                cache[d.layer, slot, :, start : start + length] = new[r, :length].swapaxes(0, 1)
    return caches


def softmax_attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float
) -> tuple[np.ndarray, float | np.ndarray]:
    """One query ``[H]`` over the positions ``[P, H]`` it sees: the answer ``[H]`` and what float32 may miss it by."""
    q, keys, values = (a.astype(np.float64) for a in (q, keys, values))
    with np.errstate(all="ignore"):
        scores = keys @ q * scale
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        answer = weights @ values
        terms = (q.size / 4 + 10) * UNIT
        score_error = terms * np.max(np.abs(keys) @ np.abs(q)) * abs(scale) + 4 * UNIT * np.abs(scores).max()
        return answer, (2 * score_error + (len(keys) + 16) * UNIT) * (weights @ np.abs(values)) + 1e-30


def expected(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Answers ``[R, T, N, H]``, zeros for padding, and their tolerance."""
    d, (keys, values) = call.sizes, appended(call)
    out, tolerance = np.zeros(call.q.shape), np.zeros(call.q.shape)
    for r, (slot, start, length) in enumerate(zip(d.slots, d.starts, d.lengths, strict=True)):
        for t in range(length):
            for n in range(d.K * d.G):
                seen = (d.layer, slot, n // d.G, slice(0, start + t + 1))
                out[r, t, n], tolerance[r, t, n] = softmax_attention(
                    call.q[r, t, n], keys[seen], values[seen], call.scale
                )
    return out, tolerance


def assert_answers(attention: Attention, call: Call) -> None:
    out, keys, values = run(attention, call)
    answer, tolerance = expected(call)
    assert np.all(np.isfinite(out))
    np.testing.assert_array_less(np.abs(out - answer), tolerance + 1e-45)
    for cache, should in zip((keys, values), appended(call), strict=True):
        np.testing.assert_array_equal(cache.view(np.int32), should.view(np.int32))  # to the bit, NaN too


def one(start: int, length: int, **sizes: int) -> Sizes:
    """A call of one sequence without padding."""
    return Sizes(starts=(start,), lengths=(length,), slots=(sizes.pop("slot", 2),), **{"T": length, **sizes})


NAMED = {
    "one position": one(0, 1),
    "one token, one head, one number": one(0, 1, K=1, G=1, H=1, L=1, B=1, S=1, layer=0, slot=0),
    "decode up to a span's end": one(255, 1, S=300),
    "decode from a span's start": one(256, 1, S=300),
    "decode over four spans": one(777, 1, S=801, G=7, H=64),
    "a short prompt over two spans": one(250, 8, S=300),
    "two blocks of tokens over what would be two spans": one(300, 9, S=310),
    "the last position": one(79, 1),
    "the last positions, in blocks": one(10, 70),
    "a bucket full of padding but one": Sizes(starts=(5,), lengths=(1,), slots=(0,), T=70),
    "nothing active": Sizes(starts=(0, 9), lengths=(0, 0), slots=(0, 1), T=3),
    "an inactive slot may be nonsense": Sizes(starts=(-7, 9), lengths=(0, 2), slots=(99, 1), T=3),
    "two inactive in one slot": Sizes(starts=(0, 0, 4), lengths=(0, 0, 4), slots=(3, 3, 3), T=4),
    "ragged": Sizes(starts=(0, 70, 33, 1), lengths=(9, 3, 0, 5), slots=(3, 0, 1, 2), T=9),
    "decode of four": Sizes(starts=(0, 300, 513, 64), lengths=(1, 1, 1, 1), slots=(3, 0, 1, 2), T=1, S=515),
    "as many queries as a block holds": one(3, 1, G=24, K=1),
    "more queries than a block holds": one(3, 4, G=30, K=1),
    "no sequences": Sizes(starts=(), lengths=(), slots=(), T=4),
    "no tokens": Sizes(starts=(3,), lengths=(0,), slots=(0,), T=0),
}


@pytest.mark.parametrize("sizes", NAMED.values(), ids=NAMED.keys())
def test_agrees_with_numpy(isa: str, attention: Attention, sizes: Sizes) -> None:
    assert_answers(attention, make(sizes))


@pytest.mark.parametrize("H", [1, 2, 3, 4, 7, 8, 9, 16, 24, 31, 64, 80, 96, 100, 128])
def test_head_dimensions(isa: str, attention: Attention, H: int) -> None:
    assert_answers(attention, make(one(7, 13, H=H, S=23)))
    assert_answers(attention, make(one(260, 1, H=H, S=271)))


@pytest.mark.parametrize("G", [1, 2, 3, 7])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 6, 7, 23, 24, 25, 65, 70])
def test_groups_and_tokens(isa: str, attention: Attention, G: int, T: int) -> None:
    assert_answers(attention, make(one(30, T, G=G, K=1 + T % 2, H=8, S=101)))


@st.composite
def calls(draw: st.DrawFn) -> Sizes:
    T, S = draw(st.sampled_from([1, 2, 5, 13, 33])), draw(st.sampled_from([33, 70, 129, 300]))
    slots = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    lengths = [draw(st.integers(0, T)) for _ in slots]
    # Hypothesis likes ends: an empty cache and a full one come up often.
    starts = [draw(st.integers(0, S - length)) for length in lengths]
    return Sizes(
        starts=tuple(starts),
        lengths=tuple(lengths),
        slots=tuple(slots),
        T=T,
        S=S,
        K=draw(st.integers(1, 3)),
        G=draw(st.sampled_from([1, 2, 3, 7])),
        H=draw(st.sampled_from([2, 7, 8, 24])),
        layer=draw(st.integers(0, 1)),
        seed=draw(st.integers(0, 99)),
    )


# The fixture is the same for every example: it says which kernels run.
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=calls())
def test_any_call(isa: str, attention: Attention, sizes: Sizes) -> None:
    assert_answers(attention, make(sizes))


LONG_AND_SHORT = [one(300, 1, S=310), one(40, 30, S=75)]


@pytest.mark.parametrize("sizes", LONG_AND_SHORT, ids=["decode", "prefill"])
def test_large_scores_do_not_overflow(isa: str, attention: Attention, sizes: Sizes) -> None:
    """Scores of thousands, of both signs: exp of any of them alone would overflow or vanish."""
    call = make(sizes)
    call = replace(call, q=call.q * np.float32(1000))
    assert_answers(attention, call)


@pytest.mark.parametrize("sizes", LONG_AND_SHORT, ids=["decode", "prefill"])
def test_a_dominant_position_anywhere(isa: str, attention: Attention, sizes: Sizes) -> None:
    """The peak comes first, last, or in a later tile or span: what was gathered before is scaled down by it."""
    call = make(sizes)
    start = sizes.starts[0]
    for position in (0, 1, 63, 64, 65, 255, 256, start - 1):
        if position < start:
            keys = call.keys.copy()
            keys[sizes.layer, sizes.slots[0], :, position] = 30 * call.q[0, 0, :: sizes.G]
            assert_answers(attention, replace(call, keys=keys))


@pytest.mark.parametrize("sizes", LONG_AND_SHORT, ids=["decode", "prefill"])
def test_nan_in_a_query_stays_there(isa: str, attention: Attention, sizes: Sizes) -> None:
    call = make(sizes)
    t, n = sizes.T // 2, 4
    q = call.q.copy()
    q[0, t, n, 3] = np.nan
    clean, *_ = run(attention, call)
    out, *_ = run(attention, replace(call, q=q))
    assert np.all(np.isnan(out[0, t, n]))
    others = np.ones(out.shape[:3], bool)
    others[0, t, n] = False
    np.testing.assert_array_equal(out[others], clean[others])


def assert_same_pattern(attention: Attention, call: Call) -> None:
    """Finite where NumPy is and right there, elsewhere the same infinity or NaN."""
    out, *_ = run(attention, call)
    answer, tolerance = expected(call)
    finite = np.isfinite(answer)
    np.testing.assert_array_equal(np.where(finite, 0.0, out), np.where(finite, 0.0, answer))
    # Infinite scores leave no bound to compute.
    slack = np.where(np.isfinite(tolerance), tolerance, 1e-5)[finite]
    assert np.all(np.abs(out[finite] - answer[finite]) <= slack)


@pytest.mark.parametrize("sizes", LONG_AND_SHORT, ids=["decode", "prefill"])
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("end", [1, 64, 65, 256, 290])
def test_non_finite_keys(isa: str, attention: Attention, sizes: Sizes, number: float, end: int) -> None:
    """From none to every position before the first query; a whole tile or span of scores may be -inf."""
    call = make(sizes)
    where = (sizes.layer, sizes.slots[0], 1, slice(0, min(end, sizes.starts[0])), 5)
    q, keys = call.q.copy(), call.keys.copy()
    q[..., 5] = np.where(np.arange(sizes.T)[:, None] % 3 == 1, -1.0, 1.0)  # scores of either sign
    keys[where] = number
    assert_same_pattern(attention, replace(call, q=q, keys=keys))


def test_every_score_minus_infinity_is_nan(isa: str, attention: Attention) -> None:
    """As in NumPy: there is nothing to normalise by."""
    call = make(one(290, 1, S=300))
    keys, k = np.full_like(call.keys, -np.inf), np.full_like(call.k, -np.inf)
    out, *_ = run(attention, replace(call, q=np.abs(call.q) + 1, k=k, keys=keys))
    assert np.all(np.isnan(out))


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_non_finite_values(isa: str, attention: Attention, number: float) -> None:
    call = make(one(290, 1, S=300))
    values = call.values.copy()
    values[1, 2, 0, 70, 3] = number
    assert_same_pattern(attention, replace(call, values=values))


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-20, 3.0])
def test_any_scale(isa: str, attention: Attention, scale: float) -> None:
    assert_answers(attention, replace(make(one(20, 9)), scale=scale))


def test_chunks_agree_with_the_whole(isa: str, attention: Attention) -> None:
    """A prompt in one call, and the same in chunks that append to the cache one after another."""
    whole = make(one(0, 70, H=24))
    out, keys, values = run(attention, whole)
    caches, parts = (whole.keys, whole.values), []
    for start, length in ((0, 33), (33, 1), (34, 29), (63, 7)):
        sizes = one(start, length, H=24)
        cut = {name: getattr(whole, name)[:, start : start + length] for name in ("q", "k", "v")}
        part, *caches = run(
            attention, Call(sizes=sizes, **cut, keys=caches[0], values=caches[1], scale=whole.scale)
        )
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), out, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(caches[0], keys)
    np.testing.assert_array_equal(caches[1], values)
