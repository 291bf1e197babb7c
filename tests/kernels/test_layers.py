"""All layers of a decoder in one call: against the same maths in pure XLA, and against the kernels one by one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as memoised
from functools import partial
from itertools import chain
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

    `windows` and `ropes` are those of its layers, `sizes` the places of each window's cache, `heads` (N, K, H).
    `norms` stand before the products and the attention, "around" them, or are LayerNorms before ("layer").
    `experts` are E, how many a row chooses, and whether the shares are renormalised; without `attends` there are but
    they.
    """

    windows: tuple[int, ...]
    slots: int
    sizes: tuple[int, ...]
    heads: tuple[int, int, int]
    width: int
    ff: int
    calls: tuple[tuple[int, tuple[Place, ...]], ...]
    ropes: tuple[int, ...] = ()
    pairs: int | None = None
    norms: str = "before"
    heads_normed: str = ""
    soft_cap: float = 0.0
    gate: str = "silu"
    biased: bool = False
    mlp: str = "gated"
    experts: tuple[int, int, bool] = (1, 1, False)
    attends: bool = True

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def groups(self) -> list[int]:
        return sorted(set(self.windows))

    @property
    def layers_of(self) -> list[list[int]]:
        """For each group its layers."""
        return [[i for i, w in enumerate(self.windows) if w == window] for window in self.groups]

    @property
    def only_kernels(self) -> bool:
        """Whether the kernels one by one are kernels all."""
        return self.norms == "before" and not self.heads_normed and self.mlp != "experts"


def steps(slot: int, first: int, last: int) -> tuple[tuple[int, tuple[Place, ...]], ...]:
    """A token a call, at the positions ``[first, last)``."""
    return tuple((1, ((slot, position, 1),)) for position in range(first, last))


CASES = {
    # One sequence: what is behind its length is padding that no product is computed for.
    "one": Case(
        windows=(0, 0),
        slots=1,
        sizes=(33,),
        heads=(6, 2, 12),
        width=40,
        ff=50,
        calls=((9, ((0, 0, 7),)), (1, ((0, 7, 1),)), (9, ((0, 8, 9),)), (9, ((0, 17, 0),))),
    ),
    "biases": Case(
        windows=(0,) * 5,
        slots=2,
        sizes=(20,),
        heads=(4, 4, 6),
        width=33,
        ff=17,
        calls=((6, ((1, 0, 6),)), (1, ((1, 6, 1), (0, 0, 1)))),
        gate="gelu_tanh",
        biased=True,
    ),
    # Several sequences: ragged, not in the order of their slots, one of them empty.
    "ragged": Case(
        windows=(0,),
        slots=4,
        sizes=(70,),
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
        windows=(0, 0),
        slots=2,
        sizes=(300,),
        heads=(3, 3, 10),
        width=32,
        ff=64,
        calls=((260, ((1, 0, 259),)), (1, ((0, 0, 1), (1, 259, 1))), (260, ((0, 1, 40),))),
    ),
    # Three caches, two of them rings as short as may be; chunks and steps that cross windows' edges and rings' ends.
    "rings": Case(
        windows=(5, 0, 9, 5),
        ropes=(0, 1, 1, 0),
        slots=1,
        sizes=(40, 10, 14),
        heads=(4, 2, 8),
        width=24,
        ff=32,
        calls=(
            (6, ((0, 0, 6),)),
            (6, ((0, 6, 6),)),
            (6, ((0, 12, 6),)),
            (6, ((0, 18, 2),)),
            *steps(0, 20, 31),
        ),
        soft_cap=2.0,
    ),
    "ragged rings": Case(
        windows=(0, 4, 4),
        slots=3,
        sizes=(30, 9),
        heads=(2, 2, 6),
        width=20,
        ff=24,
        pairs=2,
        calls=(
            (6, ((2, 0, 6), (0, 0, 4))),
            (6, ((0, 4, 6), (2, 6, 2))),
            (1, ((2, 8, 1), (1, 0, 1), (0, 10, 1))),
            (6, ((1, 1, 0), (0, 11, 6))),
            (6, ((2, 9, 6), (1, 1, 5))),
            (1, ((0, 17, 1), (1, 6, 1), (2, 15, 1))),
            (1, ((1, 7, 1), (2, 16, 1), (0, 18, 1))),
        ),
    ),
    # Blocks of tokens, tiles and spans that the ring's end cuts.
    "long ring": Case(
        windows=(100,),
        slots=1,
        sizes=(169,),
        heads=(6, 2, 10),
        width=30,
        ff=16,
        calls=(
            *((70, ((0, start, 70),)) for start in (0, 70, 140)),
            (70, ((0, 210, 65),)),
            (70, ((0, 275, 62),)),
            *steps(0, 337, 340),
            (70, ((0, 340, 3),)),
        ),
    ),
    # So many query heads to a key head that even a step is many rows; a window that the cache never reaches.
    "wide group": Case(
        windows=(150, 400),
        slots=1,
        sizes=(150, 200),
        heads=(12, 1, 8),
        width=30,
        ff=16,
        calls=((1, ((0, 0, 1),)), (140, ((0, 1, 0),)), *((1, ((0, p, 1),)) for p in range(1, 8))),
        pairs=0,
    ),
    "qk norms": Case(
        windows=(0, 6),
        ropes=(1, 0),
        slots=2,
        sizes=(20, 12),
        heads=(4, 2, 12),
        width=40,
        ff=30,
        calls=((5, ((1, 0, 5), (0, 0, 3))), (5, ((1, 5, 5), (0, 3, 4))), (1, ((0, 7, 1), (1, 10, 1)))),
        heads_normed="head",
        norms="around",
        gate="gelu_tanh",
        soft_cap=5.0,
    ),
    "whole norms": Case(
        windows=(0, 0),
        slots=1,
        sizes=(330,),
        heads=(3, 1, 24),
        width=48,
        ff=36,
        calls=((320, ((0, 0, 311),)), (1, ((0, 311, 1),))),
        heads_normed="all",
    ),
    "layer norms": Case(
        windows=(0, 0),
        slots=2,
        sizes=(24,),
        heads=(3, 3, 10),
        width=30,
        ff=45,
        calls=((7, ((1, 0, 7), (0, 0, 5))), (1, ((0, 5, 1), (1, 7, 1)))),
        pairs=0,
        norms="layer",
        mlp="plain",
        gate="gelu_tanh",
        biased=True,
    ),
    "plain": Case(
        windows=(0, 3),
        slots=1,
        sizes=(24, 10),
        heads=(3, 3, 10),
        width=30,
        ff=45,
        calls=((7, ((0, 0, 7),)), (7, ((0, 7, 5),)), (1, ((0, 12, 1),))),
        pairs=0,
        mlp="plain",
        biased=True,
    ),
    "experts": Case(
        windows=(0, 5),
        slots=2,
        sizes=(24, 11),
        heads=(4, 2, 8),
        width=36,
        ff=20,
        calls=((7, ((1, 0, 7), (0, 0, 5))), (7, ((1, 7, 6), (0, 5, 6))), (1, ((0, 11, 1), (1, 13, 1)))),
        mlp="experts",
        experts=(7, 3, True),
    ),
    "one expert of a row": Case(
        windows=(0, 0),
        slots=1,
        sizes=(80,),
        heads=(2, 1, 8),
        width=33,
        ff=40,
        calls=((70, ((0, 0, 66),)), (1, ((0, 66, 1),))),
        mlp="experts",
        experts=(5, 1, False),
        norms="layer",
    ),
    "all experts": Case(
        windows=(0, 0),
        slots=1,
        sizes=(40,),
        heads=(2, 1, 8),
        width=40,
        ff=33,
        calls=((30, ((0, 0, 27),)), (1, ((0, 27, 1),))),
        mlp="experts",
        experts=(4, 4, True),
        gate="gelu_tanh",
        soft_cap=3.0,
    ),
    # Scores that no error of a layer before shifts.
    "experts alone": Case(
        windows=(0,),
        slots=1,
        sizes=(9,),
        heads=(1, 1, 2),
        width=70,
        ff=50,
        calls=((200, ((0, 0, 190),)), (1, ((0, 0, 1),)), (4, ((0, 0, 4),)), (9, ((0, 0, 0),))),
        mlp="experts",
        experts=(9, 4, False),
        attends=False,
    ),
}
PAIRS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "bfloat16"))
EXACT = (("float32", "float32"), ("bfloat16", "float32"), ("int8", "float32"))
ALL = [
    *(("one", weights, cache) for weights in FORMATS for cache in CACHES),
    *((name, *pair) for name in ("biases", "ragged", "long") for pair in PAIRS),
    *((name, *pair) for name in ("rings", "long ring") for pair in PAIRS[:3]),
    *((name, *PAIRS[i]) for name in ("ragged rings", "qk norms", "layer norms", "plain") for i in (0, 2)),
    *((name, *PAIRS[0]) for name in ("wide group", "whole norms")),
    # Who is chosen changes with an error that is large enough.
    *((name, *pair) for name in ("experts", "one expert of a row") for pair in EXACT),
    *((name, w, "float32") for name in ("all experts", "experts alone") for w in FORMATS),
]


def _once(combinations: Sequence[tuple[str, str, str]]) -> list[Any]:
    """Mark as long all but one combination of each case; of the first case keep one for each pair of formats."""
    names = list(dict.fromkeys(name for name, *_ in combinations))
    short = {("one", *pair) for pair in PAIRS}
    for place, name in enumerate(names[1:]):
        of_name = [c for c in combinations if c[0] == name]
        short.add(of_name[place % len(of_name)])
    return [pytest.param(*c, marks=() if c in short else pytest.mark.long) for c in combinations]


def matrices(case: Case) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's weights."""
    (n, k, h), d = case.heads, case.width
    shapes = {"q": (n * h, d), "k": (k * h, d), "v": (k * h, d), "o": (d, n * h)}
    shapes |= {"gate": (case.ff, d), "up": (case.ff, d), "down": (d, case.ff)}
    return shapes | ({"router": (case.experts[0], d)} if case.mlp == "experts" else {})


def norms(case: Case) -> dict[str, int]:
    (n, k, h), d = case.heads, case.width
    whole = case.heads_normed == "all"
    around = {"norm": d, "norm2": d, "after": d, "after2": d}
    return around | {"q norm": n * h if whole else h, "k norm": k * h if whole else h}


@memoised
def weights_of(case: Case, name: str) -> dict[str, Any]:
    """Norms, biases, and weights as the format stores them; scores of experts are float32's."""
    from precast.exporter.models.ops import PackedWeight

    rng, found = np.random.default_rng(case.width), {}
    for key, (out, size) in matrices(case).items():
        each = case.experts[0] if key in ("gate", "up", "down") else 1
        stack = rng.standard_normal((case.layers * each, out, size), dtype=np.float32) / np.float32(size**0.5)
        encoded = [FORMATS["float32" if key == "router" else name].encode(matrix) for matrix in stack]
        arrays = [np.stack(parts) for parts in zip(*encoded, strict=True)]
        found[key] = arrays[0] if len(arrays) == 1 else PackedWeight(*arrays)
        if case.biased:
            found[key + ".bias"] = rng.standard_normal((case.layers, out), dtype=np.float32) / 4
    for key, width in norms(case).items():
        found[key] = 1 + rng.standard_normal((case.layers, width), dtype=np.float32) / 4
    for key, width in norms(case).items():
        found[key + ".bias"] = rng.standard_normal((case.layers, width), dtype=np.float32) / 4
    return found


class Layer:
    """A decoder's layer as `LayerStack` takes it."""

    def __init__(self, case: Case, weights: dict[str, Any]) -> None:
        self.case, self.weights = case, weights

    def linear(self, *keys: str, **around: Any) -> Any:
        from precast.exporter.models.ops import LinearCall

        return LinearCall(
            weights=tuple(self.weights[key] for key in keys),
            outs=tuple(matrices(self.case)[key][0] for key in keys),
            biases=tuple(self.weights[key + ".bias"] for key in keys) if self.case.biased else (),
            **around,
        )

    def norm(self, key: str, *, bias: bool = False, residual: Any = None) -> Any:
        from precast.exporter.models.ops import NormCall

        weight, width = self.weights[key], norms(self.case)[key]
        added = self.weights[key + ".bias"] if bias else None
        return NormCall(weight=weight, eps=1e-5, width=width, bias=added, residual=residual)

    def before(self, x: Any, key: str, calls: Any) -> tuple[Any, dict[str, Any]]:
        """x as the next product takes it, and the norm it does itself."""
        if self.case.norms == "layer":
            return calls.normalize(x, self.norm(key, bias=True)), {}
        return x, {"norm": self.weights[key], "eps": 1e-6}

    def after(self, x: Any, product: str, norm: str, residual: Any, calls: Any) -> Any:
        if self.case.norms != "around":
            return calls.project(x, self.linear(product, residual=residual))[0]
        return calls.normalize(calls.project(x, self.linear(product))[0], self.norm(norm, residual=residual))

    def attention(self, x: Any, tokens: tuple[int, ...], calls: Any) -> Any:
        (n, _, h), given = self.case.heads, self.before(x, "norm", calls)
        q, k, v = calls.project(given[0], self.linear("q", "k", "v", **given[1]))
        if self.case.heads_normed:
            q, k = (calls.normalize(a, self.norm(key)) for a, key in ((q, "q norm"), (k, "k norm")))
        out = calls.attend(*(a.reshape(*tokens, -1, h) for a in (q, k, v))).reshape(-1, n * h)
        return self.after(out, "o", "after", x, calls)

    def mixture(self, x: Any, calls: Any) -> Any:
        from precast.exporter.models.ops import ExpertsCall

        given, how = self.before(x, "norm2", calls)
        (scores,) = calls.project(given, self.linear("router", **how))
        (experts, chosen, renormalised), w = self.case.experts, self.weights
        call = ExpertsCall(
            **{key: w[key] for key in ("gate", "up", "down")},
            experts=experts,
            ff_width=self.case.ff,
            experts_per_token=chosen,
            renormalised=renormalised,
            activation=self.case.gate,
            residual=None if not self.case.attends else x,
            **how,
        )
        return calls.mix(given, scores, call)

    def __call__(self, x: Any, calls: Any) -> Any:
        flat = x.reshape(-1, self.case.width)
        if self.case.attends:
            flat = self.attention(flat, x.shape[:2], calls)
        if self.case.mlp == "experts":
            return self.mixture(flat, calls).reshape(*x.shape)
        given, how = self.before(flat, "norm2", calls)
        keys = ("gate", "up") if self.case.mlp == "gated" else ("up",)
        (gated,) = calls.project(given, self.linear(*keys, gate=self.case.gate, **how))
        return self.after(gated, "down", "after2", flat, calls).reshape(*x.shape)


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
    """For each group caches that nothing may be read from: NaN, or the scales NaN."""
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
    """The places ``[B, S]`` of a group's cache that a call fills."""
    here = np.zeros((case.slots, case.sizes[group]), bool)
    for slot, start, length in case.calls[call][1]:
        here[slot, np.arange(start, start + length) % case.sizes[group]] = case.attends
    return here


def held(case: Case, group: int, calls: int) -> np.ndarray:
    """The places ``[B, S]`` that hold something after so many calls which the next token may see."""
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
    """KVCaches that hold something only where it may be read."""
    found = []
    for group, (arrays, nothing) in enumerate(zip(groups, empty(case, kind), strict=True)):
        here = held(case, group, calls)[None, :, None, :]
        pairs = zip(arrays, nothing, strict=True)
        found.append([np.where(here if a.ndim == 4 else here[..., None], a, n) for a, n in pairs])
    return found


def numbers(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Keys and values in float32."""
    floats = [a.astype(np.float32) for a in arrays]
    if len(floats) == 2:
        return floats
    return [a * s[..., None] for a, s in zip(floats, floats[2:], strict=False)]


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


def layers_in(case: Case, groups: Sequence[Sequence[np.ndarray]], call: int) -> Iterator[list[np.ndarray]]:
    """What a call put into the caches, layer by layer."""
    for layer, window in enumerate(case.windows):
        group = case.groups.index(window)
        place = case.layers_of[group].index(layer)
        arrays = [a[place] for a in groups[group]]
        here = np.broadcast_to(written(case, group, call)[:, None], arrays[0].shape[:3])
        yield [a[here] for a in arrays]


@pytest.fixture(scope="module")
def both(jax: ModuleType) -> SimpleNamespace:
    """The kernels' layers: all in one call, and one by one in a loop of XLA's."""
    from precast.exporter.models.cpu_ops import CPU_OPS
    from precast.exporter.models.xla_ops import layer_loop

    return SimpleNamespace(call=CPU_OPS.layers, loop=layer_loop(lambda: CPU_OPS))


def lost_of(weights: str, kind: str, *, many: bool) -> tuple[float, float]:
    """Of the largest number, what the weights' format may lose, and what with the cache's."""
    # Activations in 16 bits, in 8 of many rows with int4 weights; and a number of the cache that falls to the other
    # side of a rounding border.
    lost = {"int8": 4e-4, "int4": 3e-2 if many else 4e-4}.get(weights, 4e-6)
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
            flat = ([y, *chain(*groups)] for y, groups in results)
            for ours, others in zip(*flat, strict=True):
                assert_same_bits(ours, others)
        (y, after), (theirs, their_caches) = results[0], answers[i]
        lost, loose = (a * np.abs(theirs).max() for a in lost_of(weights, kind, many=used > 4))
        for r, (_, _, length) in enumerate(places):
            assert np.all(np.isfinite(theirs[r, :length]))
            np.testing.assert_allclose(y[r, :length], theirs[r, :length], rtol=0, atol=loose)
            if len(places) == 1:
                assert np.all(y[r, length:] == 0.0)
        # What was not given is as it was, to the bit.
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
    """Sequences of no tokens at all: the caches stay as they are."""
    case = CASES[name]
    x, rotary, rows, used = inputs_of(case, 3, ((0, 0, 0), (0, 0, 0)))
    before = empty(case, "float32")
    stored = weights_of(case, "float32")
    _, caches = run(both.call, case, stored, x, rotary, caches_of(before), rows, used)
    for old, new in zip(chain(*before), chain(*arrays_of(caches)), strict=True):
        assert_same_bits(new, old)
