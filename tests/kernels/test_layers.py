"""All layers of a decoder in one call: against the same maths in pure XLA, and against the kernels one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as memoised
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from precast.exporter.quantize import FORMATS

# Slot, start and length of a sequence of a call.
Place = tuple[int, int, int]
CACHES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decoder and the calls made to it one after another: T tokens of each, and where they lie.

    `cache` is (L, B, S), `heads` (N, K, H). `used` is given where it is less than all rows.
    """

    cache: tuple[int, int, int]
    heads: tuple[int, int, int]
    width: int
    ff: int
    calls: tuple[tuple[int, tuple[Place, ...]], ...]
    gate: str = "silu"
    biased: bool = False


CASES = {
    # One sequence: what is behind its length is padding that no product is computed for.
    "one": Case(
        cache=(2, 1, 33),
        heads=(6, 2, 12),
        width=40,
        ff=50,
        calls=((9, ((0, 0, 7),)), (1, ((0, 7, 1),)), (9, ((0, 8, 9),)), (9, ((0, 17, 0),))),
    ),
    "biases": Case(
        cache=(5, 2, 20),
        heads=(4, 4, 6),
        width=33,
        ff=17,
        calls=((6, ((1, 0, 6),)), (1, ((1, 6, 1), (0, 0, 1)))),
        gate="gelu_tanh",
        biased=True,
    ),
    # Several sequences: ragged, not in the order of their slots, one of them empty.
    "ragged": Case(
        cache=(1, 4, 70),
        heads=(6, 1, 8),
        width=64,
        ff=96,
        calls=(
            (9, ((2, 0, 9), (0, 0, 4), (3, 0, 1))),
            (1, ((1, 0, 0), (2, 9, 1), (0, 4, 1))),
            (1, ((0, 5, 1), (3, 1, 1), (2, 10, 1))),
        ),
        biased=True,
    ),
    # Blocks of tokens, and a step whose positions are cut into spans.
    "long": Case(
        cache=(2, 2, 300),
        heads=(3, 3, 10),
        width=32,
        ff=64,
        calls=((260, ((1, 0, 259),)), (1, ((0, 0, 1), (1, 259, 1))), (260, ((0, 1, 40),))),
    ),
}
PAIRS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "bfloat16"))
ALL = [
    *(("one", weights, cache) for weights in FORMATS for cache in CACHES),
    *((name, *pair) for name in CASES if name != "one" for pair in PAIRS),
]


@memoised
def weights_of(case: Case, name: str) -> dict[str, Any]:
    """Norms, biases, and weights as the format stores them."""
    from precast.exporter.models.ops import Packed

    rng, layers, (n, k, h), d = np.random.default_rng(case.width), case.cache[0], case.heads, case.width
    shapes = {"q": (n * h, d), "k": (k * h, d), "v": (k * h, d), "o": (d, n * h)}
    shapes |= {"gate": (case.ff, d), "up": (case.ff, d), "down": (d, case.ff)}
    found: dict[str, Any] = {}
    for key, (out, size) in shapes.items():
        stack = rng.standard_normal((layers, out, size), dtype=np.float32) / np.float32(np.sqrt(size))
        encoded = [FORMATS[name].encode(matrix) for matrix in stack]
        arrays = [np.stack(parts) for parts in zip(*encoded, strict=True)]
        found[key] = arrays[0] if len(arrays) == 1 else Packed(*arrays)
        if case.biased:
            found[key + ".bias"] = rng.standard_normal((layers, out), dtype=np.float32) / 4
    for key in ("norm", "norm2"):
        found[key] = 1 + rng.standard_normal((layers, d), dtype=np.float32) / 4
    return found


def layer_of(case: Case, weights: dict[str, Any]) -> Callable[..., Any]:
    """A pre-norm decoder layer as `Stack` takes it."""
    from precast.exporter.models.ops import LinearCall

    (n, k, h), d = case.heads, case.width
    outs = {"q": n * h, "k": k * h, "v": k * h, "o": d, "gate": case.ff, "up": case.ff, "down": d}

    def call(*keys: str, **around: Any) -> Any:
        return LinearCall(
            weights=tuple(weights[key] for key in keys),
            outs=tuple(outs[key] for key in keys),
            biases=tuple(weights[key + ".bias"] for key in keys) if case.biased else (),
            **around,
        )

    def layer(x: Any, attend: Any, project: Any) -> Any:
        shape, flat = x.shape, x.reshape(-1, d)
        q, keys, values = project(flat, call("q", "k", "v", norm=weights["norm"], eps=1e-5))
        heads = [a.reshape(*shape[:2], -1, h) for a in (q, keys, values)]
        out = attend(*heads).reshape(-1, n * h)
        (flat,) = project(out, call("o", residual=flat))
        (gated,) = project(flat, call("gate", "up", norm=weights["norm2"], eps=1e-6, gate=case.gate))
        return project(gated, call("down", residual=flat))[0].reshape(*shape)

    return layer


@pytest.fixture(scope="module")
def run(jax: ModuleType) -> Callable[..., Any]:
    """``(layers, case, weights, x [R, T, D], rotary, cache, rows, used) -> (x, cache)``; uses up the cache."""
    from precast.exporter.models.ops import Stack

    @partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
    def run(layers: Any, case: Case, weights: Any, *arrays: Any) -> Any:
        scale = case.heads[2] ** -0.5
        stack = Stack(layer=layer_of(case, weights), layers=case.cache[0], heads=case.heads, scale=scale)
        return layers(stack, *arrays)

    return run


def inputs_of(case: Case, tokens: int, places: Sequence[Place]) -> tuple[Any, Any, Any, np.int32]:
    """x, rotary, rows and used of a call."""
    from precast.exporter.models.ops import Rotary, Rows

    rng = np.random.default_rng(tokens + places[0][1])
    x = rng.standard_normal((len(places), tokens, case.width), dtype=np.float32)
    angles = rng.uniform(-3, 3, (len(places), tokens, case.heads[2] // 2)).astype(np.float32)
    rows = Rows(*(np.int32(column) for column in zip(*places, strict=True)))
    used = rows.lengths[0] if len(places) == 1 else np.int32(len(places) * tokens)
    return x, Rotary(np.cos(angles), np.sin(angles)), rows, used


def empty(case: Case, kind: str) -> list[np.ndarray]:
    """Caches that nothing may be read from: NaN, or the scales NaN."""
    (layers, slots, capacity), (_, k, h) = case.cache, case.heads
    shape = (layers, slots, k, capacity)
    if kind == "int8":
        rows, scales = np.full((*shape, h), 77, np.int8), np.full(shape, np.nan, np.float32)
        return [rows, rows, scales, scales]
    return [np.full((*shape, h), np.nan, CACHES[kind])] * 2


@pytest.fixture(scope="module")
def expected(jax: ModuleType, run: Callable[..., Any]) -> Callable[..., list[Any]]:
    """``(name of a case, weights, cache) -> (x, arrays of the cache after)`` of each call, in pure XLA."""
    from precast.exporter.models.ops import Cache
    from precast.exporter.models.xla_ops import XLA_OPS

    @memoised
    def answers(name: str, weights: str, kind: str) -> list[Any]:
        case, found = CASES[name], []
        stored = weights_of(case, weights)
        cache = Cache.of([jax.numpy.zeros(a.shape, a.dtype) for a in empty(case, kind)])
        for tokens, places in case.calls:
            x, rotary, rows, used = inputs_of(case, tokens, places)
            y, cache = run(XLA_OPS.layers, case, stored, x, rotary, cache, rows, used)
            found.append((np.array(y), [np.array(a) for a in cache.arrays()]))
        return found

    return answers


def filled_of(case: Case, calls: int) -> np.ndarray:
    """Which slots' positions ``[B, S]`` hold something after so many calls."""
    _, slots, capacity = case.cache
    filled = np.zeros((slots, capacity), bool)
    for _, places in case.calls[:calls]:
        for slot, start, length in places:
            filled[slot, start : start + length] = True
    return filled


def merged(case: Case, kind: str, calls: int, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Caches that hold something only where it has been put."""
    filled = filled_of(case, calls)[None, :, None, :]
    return [
        np.where(filled if a.ndim == 4 else filled[..., None], a, nothing)
        for a, nothing in zip(arrays, empty(case, kind), strict=True)
    ]


def numbers(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Keys and values in float32."""
    floats = [a.astype(np.float32) for a in arrays]
    return (
        floats[:2]
        if len(floats) == 2
        else [a * s[..., None] for a, s in zip(floats, floats[2:], strict=False)]
    )


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    """NaN included, which NumPy does not find equal to itself in bfloat16."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(*(np.ascontiguousarray(x).view(f"uint{8 * x.itemsize}") for x in (a, b)))


def assert_caches_agree(
    kind: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], lost: float
) -> None:
    """Numbers at a rounding border may fall to either side of it; few do."""
    for mine, other, scale in zip(numbers(ours), numbers(theirs), (*theirs[2:], None, None), strict=False):
        step = np.float32(0)
        if kind == "int8":
            step = 1.01 * scale[..., None]
        if kind == "bfloat16":
            step = np.abs(other) / 127 + 1e-30
        error = np.abs(mine - other)
        assert np.all(error <= step + lost)
        assert np.sum(error > lost) <= 3 + 0.04 * error.size


@pytest.fixture(scope="module")
def both(jax: ModuleType) -> SimpleNamespace:
    """The kernels' layers: all in one call, and one by one in a loop of XLA's."""
    from precast.exporter.models.cpu_ops import CPU_OPS
    from precast.exporter.models.xla_ops import looped

    return SimpleNamespace(call=CPU_OPS.layers, loop=looped(CPU_OPS.linear, CPU_OPS.attention))


@pytest.mark.parametrize(("name", "weights", "kind"), ALL)
def test_agrees_with_xla_and_with_the_kernels_one_by_one(
    isa: str,
    both: SimpleNamespace,
    run: Callable[..., Any],
    expected: Callable[..., list[Any]],
    name: str,
    weights: str,
    kind: str,
) -> None:
    from precast.exporter.models.ops import Cache

    case, answers = CASES[name], expected(name, weights, kind)
    stored = weights_of(case, weights)
    before = empty(case, kind)
    for i, (tokens, places) in enumerate(case.calls):
        x, rotary, rows, used = inputs_of(case, tokens, places)
        results = []
        for layers in (both.call, both.loop):
            y, cache = run(layers, case, stored, x, rotary, Cache.of([a.copy() for a in before]), rows, used)
            results.append([np.array(a) for a in (y, *cache.arrays())])
        for ours, theirs in zip(*results, strict=True):
            assert_same_bits(ours, theirs)
        (y, *after), (theirs, their_cache) = results[0], answers[i]
        # Activations in 16 bits, in 8 of many rows with int4 weights; and a number of the cache that falls to the other
        # side of a rounding border.
        lost = {"int8": 4e-4, "int4": 3e-2 if used > 4 else 4e-4}.get(weights, 4e-6) * np.abs(theirs).max()
        loose = lost + {"float32": 0.0, "bfloat16": 4e-3, "int8": 6e-3}[kind] * np.abs(theirs).max()
        for r, (_, _, length) in enumerate(places):
            assert np.all(np.isfinite(theirs[r, :length]))
            np.testing.assert_allclose(y[r, :length], theirs[r, :length], rtol=0, atol=loose)
            if len(places) == 1:
                assert np.all(y[r, length:] == 0.0)
        # What was not given is as it was, to the bit.
        filled = np.broadcast_to(filled_of(case, i + 1)[None, :, None], after[0].shape[:4])
        for old, new in zip(empty(case, kind), after, strict=True):
            assert_same_bits(new[~filled], old[~filled])
        for layer, here in enumerate(filled):
            held = ([a[layer][here] for a in arrays] for arrays in (after, their_cache))
            assert_caches_agree(kind, *held, lost=float(loose if layer else 2 * lost))
        before = merged(case, kind, i + 1, their_cache)


@pytest.mark.parametrize("kind", CACHES)
def test_donated_caches_are_written_in_place(
    isa: str, jax: ModuleType, both: SimpleNamespace, run: Callable[..., Any], kind: str
) -> None:
    from precast.exporter.models.cpu_ops import CPU_OPS
    from precast.exporter.models.ops import Cache

    case = CASES["one"]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in empty(case, kind)]
    cache = Cache.of(CPU_OPS.empty_cache(shapes))
    before = [array.unsafe_buffer_pointer() for array in cache.arrays()]
    x, rotary, rows, used = inputs_of(case, *case.calls[0])
    _, after = run(both.call, case, weights_of(case, "int8"), x, rotary, cache, rows, used)
    assert [array.unsafe_buffer_pointer() for array in after.arrays()] == before
    assert all(array.is_deleted() for array in cache.arrays())


def test_nothing_to_do(isa: str, both: SimpleNamespace, run: Callable[..., Any]) -> None:
    """Sequences of no tokens at all: the caches stay as they are."""
    from precast.exporter.models.ops import Cache

    case = CASES["ragged"]
    x, rotary, rows, used = inputs_of(case, 3, ((0, 0, 0), (0, 0, 0)))
    arrays = empty(case, "float32")
    _, cache = run(
        both.call,
        case,
        weights_of(case, "float32"),
        x,
        rotary,
        Cache.of([a.copy() for a in arrays]),
        rows,
        used,
    )
    for old, new in zip(arrays, cache.arrays(), strict=True):
        assert_same_bits(np.asarray(new), old)
