"""All layers of a decoder in one call: against the same maths in pure XLA, and against the kernels one by one."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache as memoised
from functools import partial
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from layers_cases import CACHES, CASES, Case, Place
from layers_model import MIXED, Layer, weights_of

from precast.exporter.quantize import FORMATS

KINDS = (*FORMATS, MIXED)
PAIRS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "bfloat16"))
EXACT = (("float32", "float32"), ("bfloat16", "float32"), ("int8", "float32"))
ALL = [
    *(("one", weights, cache) for weights in KINDS for cache in CACHES),
    *((name, *pair) for name in ("biases", "ragged", "long") for pair in PAIRS),
    *((name, *pair) for name in ("rings", "long ring") for pair in PAIRS[:3]),
    *((name, *PAIRS[i]) for name in ("ragged rings", "qk norms", "layer norms", "plain") for i in (0, 2)),
    *((name, *PAIRS[0]) for name in ("wide group", "whole norms")),
    # A larger error would change which experts are chosen.
    *((name, *pair) for name in ("experts", "one expert of a row") for pair in EXACT),
    *((name, w, "float32") for name in ("all experts", "experts alone") for w in KINDS),
]


def _once(combinations: Sequence[tuple[str, str, str]]) -> list[Any]:
    """Mark as long all but one combination of each case; of the first case keep one for each pair of formats."""
    names = list(dict.fromkeys(name for name, *_ in combinations))
    short = {("one", *pair) for pair in (*PAIRS, (MIXED, "bfloat16"))}
    for place, name in enumerate(names[1:]):
        of_name = [c for c in combinations if c[0] == name]
        short.add(of_name[place % len(of_name)])
    return [pytest.param(*c, marks=() if c in short else pytest.mark.long) for c in combinations]


@pytest.fixture(scope="module")
def run(jax: ModuleType) -> Callable[..., Any]:
    """``(layers, case, weights, x [R, T, D], rotary, caches, rows, used) -> (x, caches)``; uses up the caches."""
    from precast.exporter.models.ops import LayerStack

    @partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
    def run(layers: Any, case: Case, weights: Any, *arrays: Any) -> Any:
        stack = LayerStack(
            layer=Layer(case, weights),
            heads=case.heads,
            scale=case.heads[2] ** -0.5,
            windows=case.windows,
            ropes=case.ropes or (0,) * case.layers,
            soft_cap=case.soft_cap,
        )
        return layers(stack, *arrays)

    return run


def inputs_of(case: Case, tokens: int, places: Sequence[Place]) -> tuple[Any, Any, Any, np.int32]:
    """x, rotary, rows and used of a call."""
    from precast.exporter.models.ops import Batch, Rotary

    rng = np.random.default_rng(tokens + places[0][1])
    x = rng.standard_normal((len(places), tokens, case.width), dtype=np.float32)
    pairs = case.heads[2] // 2 if case.pairs is None else case.pairs
    shape = (1 + max(case.ropes, default=0), len(places), tokens, pairs)
    angles = rng.uniform(-3, 3, shape).astype(np.float32)
    batch = Batch(*(np.int32(column) for column in zip(*places, strict=True)))
    used = batch.lengths[0] if len(places) == 1 else np.int32(len(places) * tokens)
    return x, Rotary(np.cos(angles), np.sin(angles)), batch, used


def empty(case: Case, kind: str) -> list[list[np.ndarray]]:
    """Return unreadable caches for each group: NaN, or NaN scales."""
    _, k, h = case.heads
    groups = []
    for layers, size in zip(case.layers_of, case.sizes, strict=True):
        shape = (len(layers), case.slots, k, size)
        rows = [np.full((*shape, h), 77 if kind == "int8" else np.nan, CACHES[kind])] * 2
        groups.append(rows + ([np.full(shape, np.nan, np.float32)] * 2 if kind == "int8" else []))
    return groups


def caches_of(groups: Sequence[Sequence[np.ndarray]]) -> tuple[Any, ...]:
    from precast.exporter.models.ops import KVCache

    return tuple(KVCache.from_arrays([a.copy() for a in arrays]) for arrays in groups)


def arrays_of(caches: Sequence[Any]) -> list[list[np.ndarray]]:
    return [[np.array(a) for a in cache.arrays()] for cache in caches]


@pytest.fixture(scope="module")
def expected(jax: ModuleType, run: Callable[..., Any]) -> Callable[..., list[Any]]:
    """``(name of a case, weights, cache) -> (x, arrays of the caches after)`` of each call, in pure XLA."""
    from precast.exporter.models.xla_ops import XLA_OPS

    @memoised
    def answers(name: str, weights: str, kind: str) -> list[Any]:
        case, found = CASES[name], []
        stored = weights_of(case, weights)
        caches = caches_of([[np.zeros(a.shape, a.dtype) for a in arrays] for arrays in empty(case, kind)])
        for tokens, places in case.calls:
            x, rotary, rows, used = inputs_of(case, tokens, places)
            y, caches = run(XLA_OPS.layers, case, stored, x, rotary, caches, rows, used)
            found.append((np.array(y), arrays_of(caches)))
        return found

    return answers


def written(case: Case, group: int, call: int) -> np.ndarray:
    """Return a mask ``[B, S]`` of the places of a group's cache that a call fills."""
    here = np.zeros((case.slots, case.sizes[group]), bool)
    for slot, start, length in case.calls[call][1]:
        here[slot, np.arange(start, start + length) % case.sizes[group]] = case.attends
    return here


def held(case: Case, group: int, calls: int) -> np.ndarray:
    """Return a mask ``[B, S]`` of the places that the next token may see after this many calls."""
    window, size = case.groups[group], case.sizes[group]
    here = np.zeros((case.slots, size), bool)
    for call, (_, places) in enumerate(case.calls[:calls]):
        here |= written(case, group, call)
        for slot, start, length in places:
            end = start + length
            if window and length:
                here[slot] = False
                here[slot, np.arange(max(0, end + 1 - window), end) % size] = True
    return here


def merged(
    case: Case, kind: str, calls: int, groups: Sequence[Sequence[np.ndarray]]
) -> list[list[np.ndarray]]:
    """Return caches with rows only in readable places."""
    found = []
    for group, (arrays, nothing) in enumerate(zip(groups, empty(case, kind), strict=True)):
        here = held(case, group, calls)[None, :, None, :]
        pairs = zip(arrays, nothing, strict=True)
        found.append([np.where(here if a.ndim == 4 else here[..., None], a, n) for a, n in pairs])
    return found


def numbers(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return keys and values in float32."""
    floats = [a.astype(np.float32) for a in arrays]
    if len(floats) == 2:
        return floats
    return [a * s[..., None] for a, s in zip(floats, floats[2:], strict=False)]


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    """Compare bits, because NumPy finds NaN in bfloat16 unequal to itself."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(*(np.ascontiguousarray(x).view(f"uint{8 * x.itemsize}") for x in (a, b)))


def assert_caches_agree(
    kind: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], lost: float
) -> None:
    """Compare caches; a few numbers next to a rounding border may fall to either side."""
    for mine, other, scale in zip(numbers(ours), numbers(theirs), (*theirs[2:], None, None), strict=False):
        step = np.float32(0)
        if kind == "int8":
            step = 1.01 * scale[..., None]
        if kind == "bfloat16":
            step = np.abs(other) / 127 + 1e-30
        error = np.abs(mine - other)
        assert np.all(error <= step + lost)
        assert np.sum(error > lost) <= 3 + 0.04 * error.size


def layers_in(case: Case, groups: Sequence[Sequence[np.ndarray]], call: int) -> Iterator[list[np.ndarray]]:
    """Yield the rows that a call wrote, layer by layer."""
    for layer, window in enumerate(case.windows):
        group = case.groups.index(window)
        place = case.layers_of[group].index(layer)
        arrays = [a[place] for a in groups[group]]
        here = np.broadcast_to(written(case, group, call)[:, None], arrays[0].shape[:3])
        yield [a[here] for a in arrays]


@pytest.fixture(scope="module")
def both(jax: ModuleType) -> SimpleNamespace:
    """The kernels' layers: all in one call, and one by one in a loop of XLA."""
    from precast.exporter.models.cpu_ops import CPU_OPS
    from precast.exporter.models.xla_ops import layer_loop

    return SimpleNamespace(call=CPU_OPS.layers, loop=layer_loop(lambda: CPU_OPS))


def lost_of(weights: str, kind: str) -> tuple[float, float]:
    """Return the error allowed, relative to the largest number, for the weights' format alone and with the cache's."""
    # Activations in 16 bits, in 8 with int4 weights; and a number of the cache that falls to the other side of a
    # rounding border.
    lost = {"int8": 4e-4, "int4": 3e-2, "int4-symmetric": 3e-2, MIXED: 3e-2}.get(weights, 4e-6)
    return lost, lost + {"float32": 0.0, "bfloat16": 4e-3, "int8": 6e-3}[kind]


@pytest.mark.parametrize(("name", "weights", "kind"), _once(ALL))
def test_agrees_with_xla_and_with_the_kernels_one_by_one(
    isa: str,
    both: SimpleNamespace,
    run: Callable[..., Any],
    expected: Callable[..., list[Any]],
    name: str,
    weights: str,
    kind: str,
) -> None:
    case, answers = CASES[name], expected(name, weights, kind)
    stored, before = weights_of(case, weights), empty(case, kind)
    for i, (tokens, places) in enumerate(case.calls):
        x, rotary, rows, used = inputs_of(case, tokens, places)
        results = []
        for layers in (both.call, both.loop) if case.only_kernels else (both.call,):
            y, caches = run(layers, case, stored, x, rotary, caches_of(before), rows, used)
            results.append((np.array(y), arrays_of(caches)))
        if len(results) == 2:
            (ours, our_caches), (others, other_caches) = results
            # Rows of padding are meaningless.
            for r, (_, _, length) in enumerate(places):
                assert_same_bits(ours[r, :length], others[r, :length])
            for mine, other in zip(chain(*our_caches), chain(*other_caches), strict=True):
                assert_same_bits(mine, other)
        (y, after), (theirs, their_caches) = results[0], answers[i]
        lost, loose = (a * np.abs(theirs).max() for a in lost_of(weights, kind))
        for r, (_, _, length) in enumerate(places):
            assert np.all(np.isfinite(theirs[r, :length]))
            np.testing.assert_allclose(y[r, :length], theirs[r, :length], rtol=0, atol=loose)
            if len(places) == 1:
                assert np.all(y[r, length:] == 0.0)
        # All other places keep their bits.
        for group, (given, kept) in enumerate(zip(before, after, strict=True)):
            left = ~np.broadcast_to(written(case, group, i)[None, :, None], given[0].shape[:4])
            for old, new in zip(given, kept, strict=True):
                assert_same_bits(new[left], old[left])
        pairs = zip(layers_in(case, after, i), layers_in(case, their_caches, i), strict=True)
        for layer, (mine, other) in enumerate(pairs):
            assert_caches_agree(kind, mine, other, lost=float(loose if layer else 2 * lost))
        before = merged(case, kind, i + 1, their_caches)


@pytest.mark.parametrize("name", ["one", "rings"])
@pytest.mark.parametrize("kind", CACHES)
def test_donated_caches_are_written_in_place(
    isa: str, jax: ModuleType, both: SimpleNamespace, run: Callable[..., Any], name: str, kind: str
) -> None:
    from precast.exporter.models.cpu_ops import CPU_OPS
    from precast.exporter.models.ops import KVCache

    case = CASES[name]
    caches = tuple(
        KVCache.from_arrays(CPU_OPS.empty_cache([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]))
        for arrays in empty(case, kind)
    )
    given = [array for cache in caches for array in cache.arrays()]
    before = [array.unsafe_buffer_pointer() for array in given]
    x, rotary, rows, used = inputs_of(case, *case.calls[0])
    _, after = run(both.call, case, weights_of(case, "int8"), x, rotary, caches, rows, used)
    assert [array.unsafe_buffer_pointer() for cache in after for array in cache.arrays()] == before
    assert all(array.is_deleted() for array in given)


@pytest.mark.parametrize("name", ["ragged", "ragged rings", "experts"])
def test_nothing_to_do(isa: str, both: SimpleNamespace, run: Callable[..., Any], name: str) -> None:
    """Sequences without tokens leave the caches unchanged."""
    case = CASES[name]
    x, rotary, rows, used = inputs_of(case, 3, ((0, 0, 0), (0, 0, 0)))
    before = empty(case, "float32")
    stored = weights_of(case, "float32")
    _, caches = run(both.call, case, stored, x, rotary, caches_of(before), rows, used)
    for old, new in zip(chain(*before), chain(*arrays_of(caches)), strict=True):
        assert_same_bits(new, old)
