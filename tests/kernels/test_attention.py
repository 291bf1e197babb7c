"""precast.attention against a plain softmax attention in NumPy, float64.

The tests first compare the caches, within the precision of their type. They then compare the answers with an attention
over the stored rows, which leaves only the errors of float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Attention = Callable[..., tuple[np.ndarray, list[np.ndarray]]]

UNIT = 2.0**-24  # half an ulp of one: the relative error of one float32 operation
TINY = 1e-37  # subnormal numbers may count as zero
KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a call; sequence r has ``lengths[r]`` tokens from ``starts[r]`` on, in slot ``slots[r]``.

    With a window the S places may be a ring: position p is at place p mod S.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    T: int
    K: int = 2
    G: int = 3
    H: int = 16
    P: int = 8
    L: int = 2
    B: int = 4
    S: int = 80
    layer: int = 1
    window: int = 0
    soft_cap: float = 0.0
    kind: str = "float32"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of a call; unfilled positions of the caches, and positions before every window, are NaN."""

    sizes: Sizes
    q: np.ndarray  # [R, T, N, H]
    k: np.ndarray  # [R, T, K, H]
    v: np.ndarray
    cos: np.ndarray  # [R, T, P]
    sin: np.ndarray
    caches: list[np.ndarray]  # keys and values [L, B, K, S, H], for int8 then their scales [L, B, K, S]
    scale: float


def filled(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of a cache and their scales, which matter only for int8."""
    if kind == "int8":
        return rng.integers(-127, 128, shape, np.int8), rng.uniform(0.004, 0.02, shape[:-1]).astype(
            np.float32
        )
    return rng.standard_normal(shape, dtype=np.float32).astype(KINDS[kind]), np.zeros(shape[:-1], np.float32)


def make(sizes: Sizes) -> Call:
    d, rng = sizes, np.random.default_rng(sizes.seed)
    R, room = len(d.slots), (d.L, d.B, d.K, d.S)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    q, k, v = normal(R, d.T, d.K * d.G, d.H), normal(R, d.T, d.K, d.H), normal(R, d.T, d.K, d.H)
    angles = rng.uniform(-4, 4, (R, d.T, d.P)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    nothing = 99 if d.kind == "int8" else np.nan
    rows = [np.full((*room, d.H), nothing, KINDS[d.kind]) for _ in range(2)]
    scales = [np.full(room, np.nan, np.float32) for _ in range(2)]
    for slot, start, length in zip(d.slots, d.starts, d.lengths, strict=True):
        first = max(0, start + 1 - d.window) if d.window else 0
        for row, scale in zip(rows, scales, strict=True):
            if length and first < start:
                rows_of, scales_of = (a[d.layer, slot] for a in (row, scale))
                seen = np.s_[:, np.arange(first, start) % d.S]
                rows_of[seen], scales_of[seen] = filled(rng, d.kind, (d.K, start - first, d.H))
    for r, length in enumerate(d.lengths):
        for a in (q, k, v, cos, sin):
            a[r, length:] = np.nan  # the kernels must not read padding either
    caches = rows + scales if d.kind == "int8" else rows
    return Call(sizes=d, q=q, k=k, v=v, cos=cos, sin=sin, caches=caches, scale=float(d.H) ** -0.5)


def run(attention: Attention, call: Call) -> tuple[np.ndarray, list[np.ndarray]]:
    d = call.sizes
    arrays = (call.q, call.k, call.v, call.cos, call.sin, call.caches)
    places = (d.layer, d.slots, d.starts, d.lengths)
    return attention(*arrays, *places, scale=call.scale, window=d.window, soft_cap=d.soft_cap)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``x [R, T, heads, H]`` rotated in float64, and the magnitude of the terms of each sum."""
    x, c, s = x.astype(np.float64), cos[:, :, None].astype(np.float64), sin[:, :, None].astype(np.float64)
    P = cos.shape[-1]
    a, b, rest = x[..., :P], x[..., P : 2 * P], x[..., 2 * P :]
    turned = np.concatenate([a * c - b * s, b * c + a * s, rest], axis=-1)
    terms = [abs(a * c) + abs(b * s), abs(b * c) + abs(a * s), np.zeros_like(rest)]
    return turned, np.concatenate(terms, axis=-1)


def stored(caches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and values in float64."""
    keys, values = (a.astype(np.float64) for a in caches[:2])
    if len(caches) == 2:
        return keys, values
    return keys * caches[2][..., None], values * caches[3][..., None]


def as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array)[..., None].view(np.uint8)


def assert_stored(kind: str, x: np.ndarray, error: np.ndarray, row: np.ndarray, scale: np.ndarray) -> None:
    """Check that `row` (int8: times `scale [...]`) holds `x`, known up to `error`, to the precision of the type."""
    number = row.astype(np.float64)
    if kind == "int8":
        top, slack = np.abs(x).max(-1), error.max(-1)
        assert np.all(np.abs(scale - top / 127) <= slack / 127 + 4 * UNIT * scale + TINY)
        number, allowed = number * scale[..., None], (0.5 + 300 * UNIT) * scale[..., None]
    else:
        allowed = np.abs(x) * (2.0**-8 if kind == "bfloat16" else 0.0)
    assert np.all(np.abs(number - x) <= allowed + 2 * error + TINY)


def assert_appended(call: Call, after: list[np.ndarray]) -> None:
    """Check that the tokens' rows are in their places and that all other rows keep their bits."""
    d = call.sizes
    untouched = np.ones((d.L, d.B, d.K, d.S), bool)
    scales = after[2:] or [np.zeros(untouched.shape)] * 2
    keys, terms = rotate(call.k, call.cos, call.sin)
    fresh = ((keys, 3 * UNIT * terms), (call.v.astype(np.float64), np.zeros(call.v.shape)))
    for r, (slot, start, length) in enumerate(zip(d.slots, d.starts, d.lengths, strict=True)):
        if not length:
            continue
        places = np.s_[:, np.arange(start, start + length) % d.S]
        untouched[d.layer, slot][places] = False
        for (x, error), rows, scale in zip(fresh, after[:2], scales, strict=True):
            x, error = (a[r, :length].swapaxes(0, 1) for a in (x, error))
            assert_stored(d.kind, x, error, rows[d.layer, slot][places], scale[d.layer, slot][places])
    for old, new in zip(call.caches, after, strict=True):
        np.testing.assert_array_equal(as_bytes(old[untouched]), as_bytes(new[untouched]))


class Query(NamedTuple):
    """A rotated query ``[H]``, the magnitude of the terms of its sums, and the scale and cap of its scores."""

    q: np.ndarray
    terms: np.ndarray
    scale: float
    soft_cap: float


def softmax_attention(
    query: Query, keys: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, float | np.ndarray]:
    """Return the answer ``[H]`` of one query over its visible positions ``[P, H]``, and the error allowed."""
    with np.errstate(all="ignore"):
        scores = keys @ query.q * query.scale
        sums = (query.q.size / 4 + 12) * np.abs(keys) @ np.abs(query.q) + 3 * np.abs(keys) @ query.terms
        score_error = UNIT * np.max(sums) * abs(query.scale)
        if query.soft_cap:
            scores = query.soft_cap * np.tanh(scores / query.soft_cap)
        score_error += 10 * UNIT * np.abs(scores).max()
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        error = (2 * score_error + (len(keys) + 16) * UNIT) * (weights @ np.abs(values)) + 1e-30
        return weights @ values, error


def expected(call: Call, after: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the answers ``[R, T, N, H]`` over the stored rows, zeros for padding, and their tolerance."""
    d, (keys, values) = call.sizes, stored(after)
    q, terms = rotate(call.q, call.cos, call.sin)
    out, tolerance = np.zeros(call.q.shape), np.zeros(call.q.shape)
    for r, (slot, start, length) in enumerate(zip(d.slots, d.starts, d.lengths, strict=True)):
        for t in range(length):
            first = max(0, start + t + 1 - d.window) if d.window else 0
            for n in range(d.K * d.G):
                seen = np.arange(first, start + t + 1) % d.S
                query = Query(q[r, t, n], terms[r, t, n], call.scale, d.soft_cap)
                held = (a[d.layer, slot, n // d.G, seen] for a in (keys, values))
                out[r, t, n], tolerance[r, t, n] = softmax_attention(query, *held)
    return out, tolerance


def assert_answers(attention: Attention, call: Call) -> None:
    out, after = run(attention, call)
    assert_appended(call, after)
    answer, tolerance = expected(call, after)
    assert np.all(np.isfinite(out))
    np.testing.assert_array_less(np.abs(out - answer), tolerance + 1e-45)


def one(start: int, length: int, **sizes: int | float | str) -> Sizes:
    """Return the sizes of a call of one sequence without padding."""
    return Sizes(starts=(start,), lengths=(length,), slots=(sizes.pop("slot", 2),), **{"T": length, **sizes})


NAMED = {
    "one position": one(0, 1),
    "one token, one head, one number": one(0, 1, K=1, G=1, H=1, P=0, L=1, B=1, S=1, layer=0, slot=0),
    "decode up to a span's end": one(255, 1, S=300),
    "decode from a span's start": one(256, 1, S=300),
    "decode over four spans": one(777, 1, S=801, G=7, H=64, P=32),
    "a short prompt over two spans": one(250, 8, S=300),
    "two blocks of tokens over as many positions as two spans": one(300, 17, S=320),
    "the last position": one(79, 1),
    "the last positions, in blocks": one(10, 70),
    "a bucket full of padding but one": Sizes(starts=(5,), lengths=(1,), slots=(0,), T=70),
    "nothing active": Sizes(starts=(0, 9), lengths=(0, 0), slots=(0, 1), T=3),
    "an inactive sequence with an invalid slot and start": Sizes(
        starts=(-7, 9), lengths=(0, 2), slots=(99, 1), T=3
    ),
    "two inactive in one slot": Sizes(starts=(0, 0, 4), lengths=(0, 0, 4), slots=(3, 3, 3), T=4),
    "ragged": Sizes(starts=(0, 70, 33, 1), lengths=(9, 3, 0, 5), slots=(3, 0, 1, 2), T=9),
    "decode of four": Sizes(starts=(0, 300, 513, 64), lengths=(1, 1, 1, 1), slots=(3, 0, 1, 2), T=1, S=515),
    "a long prompt beside a decode over spans": Sizes(
        starts=(0, 600, 3), lengths=(60, 1, 9), slots=(1, 0, 2), T=60, S=601
    ),
    "as many queries as a block holds": one(3, 1, G=48, K=1),
    "more queries than a block holds": one(3, 4, G=60, K=1),
    "no sequences": Sizes(starts=(), lengths=(), slots=(), T=4),
    "no tokens": Sizes(starts=(3,), lengths=(0,), slots=(0,), T=0),
    "a window within a tile": one(70, 20, S=100, window=7),
    "a window of one": one(70, 20, S=100, window=1),
    "a window as long as what is filled": one(70, 20, S=100, window=90),
    "a window longer than the capacity": one(70, 20, S=100, window=2**62),
    "a window over tiles, in blocks": one(150, 130, S=300, window=100),
    "decode, a window over spans": one(900, 1, S=901, window=300),
    "decode, a window within a span": one(900, 1, S=901, window=50),
    "a window that begins within a prompt": one(0, 150, S=160, window=64),
    "a soft cap": one(70, 40, S=120, soft_cap=1.5),
    "decode, a soft cap and a window": one(600, 1, S=601, soft_cap=0.5, window=400),
    "a ring's end within a chunk": one(75, 20, window=40),
    "a ring's last place": one(159, 1, window=30),
    "a ring's first place": one(160, 1, window=30),
    "the shortest possible ring": one(300, 20, S=59, window=40),
    "a ring of one": one(77, 1, S=1, window=1),
    "a full ring": one(64, 70, S=70, window=1),
    "a ring's end within a chunk of blocks": one(1000, 130, S=260, window=100),
    "decode over a ring's end": one(205, 1, S=100, window=100),
    "decode over a ring's end, in spans": one(1300, 1, S=500, window=450, soft_cap=1.5),
    "many queries over a ring's end, in spans": one(1300, 2, S=451, window=450, G=7),
    "ragged rings": Sizes(
        starts=(0, 700, 33, 10**9), lengths=(9, 3, 0, 5), slots=(3, 0, 1, 2), T=9, S=70, window=60
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", NAMED.values(), ids=NAMED.keys())
def test_agrees_with_numpy(isa: str, attention: Attention, sizes: Sizes, kind: str) -> None:
    assert_answers(attention, make(replace(sizes, kind=kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("H", [1, 2, 3, 4, 7, 8, 9, 16, 24, 31, 64, 80, 100, 128])
def test_head_dimensions(isa: str, attention: Attention, H: int, kind: str) -> None:
    """Whole and partial vectors; rotation of all, some or none of a head."""
    assert_answers(attention, make(one(7, 13, H=H, P=H // 2, S=23, kind=kind)))
    assert_answers(attention, make(one(260, 1, H=H, P=H // 3, S=271, kind=kind)))
    assert_answers(attention, make(one(7, 2, H=H, P=0, G=2, S=23, kind=kind)))


@pytest.mark.parametrize("G", [1, 2, 3, 7])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 47, 48, 49, 70])
def test_groups_and_tokens(isa: str, attention: Attention, G: int, T: int) -> None:
    assert_answers(attention, make(one(30, T, G=G, K=1 + T % 2, H=8, P=3, S=101, window=T % 3 * 20)))


@st.composite
def calls(draw: st.DrawFn) -> Sizes:
    T, S = draw(st.sampled_from([1, 2, 5, 13, 33])), draw(st.sampled_from([33, 70, 129, 300]))
    slots = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    lengths = [draw(st.integers(0, T)) for _ in slots]
    window = draw(st.sampled_from([0, 1, 5, 64, 65, 299]))
    # Hypothesis favours the ends of ranges, so empty and full caches are frequent. A ring may be past its end.
    rings = [0 < window <= S + 1 - length for length in lengths]
    starts = [draw(st.integers(0, 3 * S if ring else S - n)) for n, ring in zip(lengths, rings, strict=True)]
    H = draw(st.sampled_from([2, 7, 8, 24]))
    return Sizes(
        starts=tuple(starts),
        lengths=tuple(lengths),
        slots=tuple(slots),
        T=T,
        S=S,
        K=draw(st.integers(1, 3)),
        G=draw(st.sampled_from([1, 2, 3, 7])),
        H=H,
        P=draw(st.integers(0, H // 2)),
        layer=draw(st.integers(0, 1)),
        window=window,
        soft_cap=draw(st.sampled_from([0.0, 0.3, 30.0])),
        kind=draw(st.sampled_from(sorted(KINDS))),
        seed=draw(st.integers(0, 99)),
    )


# The fixture is the same for every example: it selects the kernels.
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=calls())
def test_any_call(isa: str, attention: Attention, sizes: Sizes) -> None:
    assert_answers(attention, make(sizes))


LONG_AND_SHORT = [one(300, 1, S=310), one(40, 30, S=75)]


@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@pytest.mark.parametrize("sizes", LONG_AND_SHORT, ids=["decode", "prefill"])
def test_large_scores_do_not_overflow(isa: str, attention: Attention, sizes: Sizes, soft_cap: float) -> None:
    """Scores of thousands, of both signs, whose exponentials overflow or vanish."""
    call = make(replace(sizes, soft_cap=soft_cap))
    assert_answers(attention, replace(call, q=call.q * np.float32(1000)))


@pytest.mark.parametrize("sizes", LONG_AND_SHORT, ids=["decode", "prefill"])
def test_a_dominant_position_anywhere(isa: str, attention: Attention, sizes: Sizes) -> None:
    """The peak comes first, last, or in a later tile or span, and rescales the sums before it."""
    call = make(replace(sizes, P=0))
    start = sizes.starts[0]
    for position in (0, 1, 63, 64, 65, 255, 256, start - 1):
        if position < start:
            keys = call.caches[0].copy()
            keys[sizes.layer, sizes.slots[0], :, position] = 30 * call.q[0, 0, :: sizes.G]
            assert_answers(attention, replace(call, caches=[keys, call.caches[1]]))


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-20, 3.0])
def test_any_scale(isa: str, attention: Attention, scale: float) -> None:
    assert_answers(attention, replace(make(one(20, 9)), scale=scale))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_agree_with_the_whole(isa: str, attention: Attention, kind: str) -> None:
    """A prompt in one call agrees with the same prompt in chunks."""
    whole = make(one(0, 70, H=24, P=8, window=50, kind=kind))
    out, caches = run(attention, whole)
    chunk_caches, parts = whole.caches, []
    for start, length in ((0, 33), (33, 1), (34, 29), (63, 7)):
        names = ("q", "k", "v", "cos", "sin")
        cut = {name: getattr(whole, name)[:, start : start + length] for name in names}
        sizes = one(start, length, H=24, P=8, window=50, kind=kind)
        part, chunk_caches = run(attention, Call(sizes=sizes, **cut, caches=chunk_caches, scale=whole.scale))
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), out, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(chunk_caches, caches, strict=True):
        np.testing.assert_array_equal(as_bytes(ours), as_bytes(theirs))
