"""Invalid calls of precast.layers: the handler names the error before it runs a step."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layers_calls import DOWN, F32, LAYERS_CACHE, LAYERS_INT8, OUTS, STEPS, WEIGHTS, ones

CACHE = "expected keys and values [L, B, K, S, H], both float32, both bfloat16 or both int8"


def test_the_good_layers_are_taken(layers: Callable[..., Any]) -> None:
    y, keys, _ = layers()
    assert np.all(np.isfinite(y))
    assert np.all(np.asarray(keys)[:, 2, :, 5:9] != 0.0)
    assert np.all(np.asarray(keys)[:, 1] == 0.0)


def with_step(place: int, **fields: int) -> dict[str, Any]:
    """A step with some of its eight integers changed, by place: ``at2=7``."""
    steps = [list(step) for step in STEPS]
    for key, value in fields.items():
        steps[place][int(key.removeprefix("at"))] = value
    return {"steps": steps}


def with_weight(place: int, array: np.ndarray | None) -> dict[str, Any]:
    """Another operand in the place of one, or without it."""
    return {"weights": [*WEIGHTS[:place], *([] if array is None else [array]), *WEIGHTS[place + 1 :]]}


def cache_of(*shape: int) -> dict[str, Any]:
    return {"caches": [np.zeros(shape, F32)] * 2}


HEADS = "expected heads to be N, K and H, with N a multiple of K"
CODES = "expected steps of eight integers and two numbers each"
WIDTHS = "the widths of a linear step do not fit together"
SCALED = "int8 caches need key and value scales, other caches take none"
W = "weights: expected float32"
ALIAS = "the cache results must alias the cache arguments"
QKV = "attention: expected q as wide as N heads, and k and v as wide as K heads"
MATCH = "to match its argument, float32 [2, 3, 2, 9, 4], found"
SIZES = "expected keys and values [2, B, 2, S, 4], found"
PER_WINDOW = "expected 2 cache results, or 4 with scales, for each of"
BAD_LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    # Widths of nothing: no operand would bound the others.
    "no width": ({"x": ones(8, 0), "y": (8, 0)}, "x [8, 0], result [8, 0]"),
    "a width of nothing": ({"outs": [0, *OUTS[1:]]}, WIDTHS),
    "a huge width": (
        {"outs": [2**60, *OUTS[1:]]},
        f"{W} [L, {2**60}, 10], found float32 [2, 24, 10]",
    ),
    "no slots": (cache_of(2, 0, 2, 9, 4), "expected caches of at least one slot and one position, found"),
    "no positions": (cache_of(2, 3, 2, 0, 4), "expected caches of at least one slot and one position, found"),
    # Step codes, and the values they name.
    "unknown kind": (with_step(1, at0=4), "step of unknown kind 4"),
    "negative kind": (with_step(0, at0=-1), "step of unknown kind -1"),
    "no steps": ({"steps": [], "numbers": ()}, CODES),
    "seven integers": ({"steps": [*STEPS[:-1], DOWN[:-1]]}, CODES),
    "too few numbers": ({"numbers": (0,) * 9}, CODES),
    "too many numbers": ({"numbers": (0,) * 12}, CODES),
    "its own result": (with_step(0, at1=1), "no earlier step computes value 1"),
    "a later value": (with_step(2, at1=6), "no earlier step computes value 6"),
    "a negative value": (with_step(2, at1=-1), "no earlier step computes value -1"),
    "a huge value": (with_step(2, at1=2**62), f"no earlier step computes value {2**62}"),
    "an unknown residual": (with_step(2, at2=5), "no earlier step computes value 5"),
    "a negative residual": (with_step(2, at2=-2), "no earlier step computes value -2"),
    "unknown q": (with_step(1, at1=4), "no earlier step computes value 4"),
    "unknown v": (with_step(1, at3=-1), "no earlier step computes value -1"),
    "q of k's width": (
        with_step(1, at1=2),
        "attention: expected q as wide as N heads, and k and v as wide as K heads",
    ),
    "k of q's width": (
        with_step(1, at2=1),
        "attention: expected q as wide as N heads, and k and v as wide as K heads",
    ),
    "v of x's width": (
        with_step(1, at3=0),
        "attention: expected q as wide as N heads, and k and v as wide as K heads",
    ),
    "negative cap": ({"numbers": (0, 0, 1, -2, *(0,) * 6)}, "finite soft_cap of at least 0, found 0 and -2"),
    "infinite cap": ({"numbers": (0, 0, 1, np.inf, *(0,) * 6)}, "finite soft_cap of at least 0"),
    "unknown gate": (with_step(3, at5=3), "a linear step with gate 3 and 2 weights"),
    "negative gate": (with_step(3, at5=-1), "a linear step with gate -1 and 2 weights"),
    "gate of three": (with_step(0, at5=2), "a linear step with gate 2 and 3 weights"),
    "no weights": (with_step(2, at6=0), "a linear step with gate 0 and 0 weights"),
    "negative weights": (with_step(2, at6=-1), "a linear step with gate 0 and -1 weights"),
    "more weights than widths": (with_step(4, at6=2), "a linear step with gate 0 and 2 weights"),
    "more weights than any": ({**with_step(0, at6=65), "outs": (8,) * 99}, "gate 0 and 65 weights"),
    "gate of three with a residual": (with_step(0, at2=0, at5=1), "a linear step with gate 1 and 3 weights"),
    "residual of three": (with_step(0, at2=0), "a linear step with gate 0 and 3 weights"),
    # Widths.
    "too few widths": ({"outs": OUTS[:-1]}, "a linear step with gate 0 and 1 weights"),
    "too many widths": ({"outs": (*OUTS, 3)}, "more widths than the steps have weights"),
    "negative width": ({"outs": (24, -8, *OUTS[2:])}, WIDTHS),
    "gate of two widths": ({"outs": (*OUTS[:5], 15, 10)}, WIDTHS),
    "residual of another width": (with_step(2, at2=1), WIDTHS),
    "result of another width": (
        {**with_step(4, at2=-1), **with_weight(8, ones(2, 9, 14)), "outs": (*OUTS[:-1], 9)},
        "expected a last step whose result is as wide as the layer's input",
    ),
    "weights of another width": (
        {"outs": (24, 8, 8, 10, 15, 15, 10)},
        f"{W} [L, 15, 10], found float32 [2, 14, 10]",
    ),
    # Operands.
    "norm of another width": (
        with_weight(0, ones(2, 11)),
        "norm: expected float32 [L, 10], found float32 [2, 11]",
    ),
    "norm of one layer": (with_weight(0, ones(1, 10)), "norm [1, 10]: no entry 1"),
    "weights of one layer": (with_weight(4, ones(1, 10, 24)), "weights [1, 10, 24]: no entry 1"),
    "weights of other inputs": (
        with_weight(8, ones(2, 10, 13)),
        f"{W} [L, 10, 14], found float32 [2, 10, 13]",
    ),
    "bias of another width": (
        with_weight(5, ones(2, 9)),
        "bias: expected float32 [L, 10], found float32 [2, 9]",
    ),
    "float16 weights": (
        with_weight(4, np.ones((2, 10, 24), np.float16)),
        "weights: expected float32, bfloat16, int8 or uint8, found float16",
    ),
    "int8 without its scale": (
        with_weight(4, np.ones((2, 1, 16, 16, 2), np.int8)),
        "scale: expected float16 [L, 1, 1, 16], found float32 [2, 10]",
    ),
    "an operand too few": (with_weight(8, None), "operand weights is missing"),
    "no operands": ({"weights": []}, "operand norm is missing"),
    "an operand too many": ({"weights": [*WEIGHTS, ones(2, 10)]}, "more operands than the steps take"),
    # Rows, angles and heads.
    "more true rows than rows": ({"used": np.int32(9)}, "expected 0 to 8 true rows, found 9"),
    "negative true rows": ({"used": np.int32(-1)}, "expected 0 to 8 true rows, found -1"),
    "tokens behind the true rows": (
        {"used": np.int32(6)},
        "sequence 1 of length 3 ends after the 6 true rows",
    ),
    "rows of the angles": ({"cos": ones(1, 3, 4, 2), "sin": ones(1, 3, 4, 2)}, "do not fit together"),
    "tokens of the angles": ({"cos": ones(1, 2, 5, 2), "sin": ones(1, 2, 5, 2)}, "do not fit together"),
    "no tokens of the angles": ({"cos": ones(1, 2, 0, 2), "sin": ones(1, 2, 0, 2)}, "do not fit together"),
    "cos and sin that differ": (
        {"cos": ones(1, 2, 4, 1)},
        "cos [1, 2, 4, 1] and sin [1, 2, 4, 2] do not fit together",
    ),
    "tables that differ": ({"cos": ones(2, 2, 4, 2)}, "cos [2, 2, 4, 2] and sin [1, 2, 4, 2] do not fit"),
    "more pairs than half a head": (
        {"cos": ones(1, 2, 4, 3), "sin": ones(1, 2, 4, 3)},
        "do not fit together",
    ),
    "no tables": (
        {"cos": ones(0, 2, 4, 2), "sin": ones(0, 2, 4, 2)},
        "layer 0: expected a window of at least 0 and one of 0 rotary tables, found 0 and 0",
    ),
    "a table too high": (
        {"ropes": (0, 1)},
        "layer 1: expected a window of at least 0 and one of 1 rotary tables, found 0 and 1",
    ),
    "a negative table": (
        {"ropes": (-1, 0)},
        "layer 0: expected a window of at least 0 and one of 1 rotary tables, found 0 and -1",
    ),
    "too few tables": ({"ropes": (0,)}, "a window and a rotary table for each layer, found 2 and 1"),
    "a negative window": (
        {"windows": (0, -1)},
        "layer 1: expected a window of at least 0 and one of 1 rotary tables, found -1 and 0",
    ),
    "rows of the result": ({"y": (7, 10)}, "result [7, 10], cos"),
    "width of the result": ({"y": (8, 11)}, "result [8, 11], cos"),
    "two heads": ({"heads": (6, 2)}, HEADS),
    "heads not a multiple": ({"heads": (6, 4, 4)}, HEADS),
    "no key heads": ({"heads": (6, 0, 4)}, HEADS),
    "no query heads": ({"heads": (0, 2, 4)}, HEADS),
    "negative heads": ({"heads": (-6, -2, 4)}, HEADS),
    "negative head dimension": ({"heads": (6, 2, -4)}, HEADS),
    "other query heads": (
        {"heads": (4, 2, 4)},
        "attention: expected q as wide as N heads, and k and v as wide as K heads",
    ),
    "other key heads": ({"heads": (6, 3, 4)}, "expected keys and values [2, B, 3, S, 4], found"),
    "other head dimension": ({"heads": (6, 2, 5)}, "expected keys and values [2, B, 2, S, 5], found"),
    "other layers": (
        {"windows": (0,) * 3, "ropes": (0,) * 3},
        "expected keys and values [3, B, 2, S, 4], found [2, 3, 2, 9, 4] and [2, 3, 2, 9, 4]",
    ),
    "no layers": ({"windows": (), "ropes": (), **cache_of(0, 3, 2, 9, 4)}, "found 0 and 0"),
    # KVCaches.
    "layers of the caches": (cache_of(3, 3, 2, 9, 4), SIZES),
    "heads of the caches": (cache_of(2, 3, 1, 9, 4), SIZES),
    "head dimension of the caches": (cache_of(2, 3, 2, 9, 3), SIZES),
    "fewer positions for values": (
        {"caches": [np.zeros(LAYERS_CACHE, F32), np.zeros((2, 3, 2, 8, 4), F32)]},
        SIZES + " [2, 3, 2, 9, 4] and [2, 3, 2, 8, 4]",
    ),
    "fewer slots for values": (
        {"caches": [np.zeros(LAYERS_CACHE, F32), np.zeros((2, 2, 2, 9, 4), F32)]},
        SIZES,
    ),
    "shorter values": ({"caches": [np.zeros(LAYERS_CACHE, F32), np.zeros((2, 3, 2, 9, 3), F32)]}, SIZES),
    "caches of four axes": (cache_of(3, 2, 9, 4), CACHE),
    "float16 caches": ({"caches": [np.zeros(LAYERS_CACHE, np.float16)] * 2}, CACHE),
    "bfloat16 keys alone": (
        {"caches": [np.zeros(LAYERS_CACHE, ml_dtypes.bfloat16), np.zeros(LAYERS_CACHE, F32)]},
        CACHE,
    ),
    "int8 without scales": ({"caches": LAYERS_INT8[:2]}, SCALED),
    "scales without int8": ({"caches": [np.zeros(LAYERS_CACHE, F32)] * 2 + LAYERS_INT8[2:]}, SCALED),
    "one cache": ({"caches": LAYERS_INT8[:1]}, f"{PER_WINDOW} 1 windows, found 1"),
    "one scale": ({"caches": LAYERS_INT8[:3]}, f"{PER_WINDOW} 1 windows, found 3"),
    "scales of another shape": (
        {"caches": [*LAYERS_INT8[:3], ones(2, 3, 2, 8)]},
        "expected float32 scales [L, B, K, S] for caches [2, 3, 2, 9, 4], found [2, 3, 2, 8]",
    ),
    "float16 scales": (
        {"caches": [*LAYERS_INT8[:3], np.ones(LAYERS_CACHE[:-1], np.float16)]},
        "expected float32 scales",
    ),
    "no aliases": ({"aliases": {}}, ALIAS),
    "keys alone aliased": ({"aliases": {4: 1}}, ALIAS),
    "scales not aliased": (
        {"caches": LAYERS_INT8, "aliases": {4: 1, 5: 2, 6: 3}},
        ALIAS,
    ),
    "results of another shape": (
        {"results": [(LAYERS_CACHE, F32), ((2, 3, 2, 10, 4), F32)], "aliases": {4: 1}},
        f"cache result 1 {MATCH} float32 [2, 3, 2, 10, 4]",
    ),
    "results of another type": (
        {"results": [(LAYERS_CACHE, np.int32), (LAYERS_CACHE, F32)], "aliases": {}},
        f"cache result 0 {MATCH} int32 [2, 3, 2, 9, 4]",
    ),
    # Places in the caches.
    "slot too high": (
        {"slots": np.int32([2, 3])},
        "sequence 1 in slot 3 with start 0 and length 3 does not fit",
    ),
    "slot negative": ({"slots": np.int32([-1, 0])}, "sequence 0 in slot -1"),
    "slot twice": ({"slots": np.int32([2, 2])}, "two sequences in slot 2"),
    "behind the capacity": ({"starts": np.int32([6, 0])}, "start 6 and length 4 does not fit 3 slots of 9"),
    "start negative": ({"starts": np.int32([5, -1])}, "start -1 and length 3 does not fit"),
    "length negative": ({"lengths": np.int32([4, -1])}, "length -1 does not fit"),
    "more than its tokens": ({"lengths": np.int32([5, 3])}, "length 5 does not fit"),
    "too few slots": (
        {"slots": np.int32([2])},
        "slots, starts or lengths: expected int32 [2], found int32 [1]",
    ),
    "too many lengths": (
        {"lengths": np.int32([2, 1, 1])},
        "slots, starts or lengths: expected int32 [2], found int32 [3]",
    ),
    "float starts": (
        {"starts": F32([5, 0])},
        "slots, starts or lengths: expected int32 [2], found float32 [2]",
    ),
    # What comes first, whose types XLA checks.
    "bfloat16 x": ({"x": np.ones((8, 10), ml_dtypes.bfloat16)}, "BF16"),
    "x of three axes": ({"x": ones(2, 4, 10)}, "rank"),
    "cos of three axes": ({"cos": ones(2, 4, 2)}, "rank"),
    "used of one axis": ({"used": np.int32([8])}, "rank"),
}


@pytest.mark.parametrize(("changed", "text"), BAD_LAYERS.values(), ids=BAD_LAYERS.keys())
def test_layers_refuse(
    layers: Callable[..., Any], refusal: Callable[..., str], changed: dict[str, Any], text: str
) -> None:
    assert text in refusal(lambda: layers(**changed))


# Two layers that see everything, and between them one that sees three positions, in a ring of six.
LONG_CACHE, RING = (2, 3, 2, 9, 4), (1, 3, 2, 6, 4)


def ringed(
    *, window: int = 3, ring: tuple[int, ...] = RING, dtype: Any = F32, **changed: Any
) -> dict[str, Any]:
    """A good call of three layers of two caches, with what is given put in its place."""
    caches = [np.zeros(LONG_CACHE, F32)] * 2 + [np.zeros(ring, dtype)] * 2
    angles = {"cos": ones(2, 2, 4, 2), "sin": np.zeros((2, 2, 4, 2), F32)}
    weights = [np.full((3, *a.shape[1:]), 0.1, F32) for a in WEIGHTS]
    good = {"windows": (0, window, 0), "ropes": (1, 0, 1), "weights": weights, "caches": caches}
    return good | angles | changed


def test_the_good_rings_are_taken(layers: Callable[..., Any]) -> None:
    y, keys, _, ring, _ = (np.asarray(a) for a in layers(**ringed()))
    assert np.all(np.isfinite(y))
    assert np.all(keys[:, 2, :, 5:9] != 0.0)
    assert np.all(ring[:, 2, :, [5, 0, 1, 2]] != 0.0)
    assert np.all(ring[:, 2, :, 3:5] == 0.0)
    layers(**ringed(ring=(1, 3, 2, 9, 4), window=2**40))


BAD_RINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a ring too short": (
        ringed(ring=(1, 3, 2, 5, 4)),
        "does not fit a ring of 5 positions with a window of 3",
    ),
    "a window too long": (ringed(window=4), "does not fit a ring of 6 positions with a window of 4"),
    "behind the capacity of the other": (
        ringed(starts=np.int32([6, 0])),
        "start 6 and length 4 does not fit 3 slots of 9 positions",
    ),
    "slots of the ring": (
        ringed(ring=(1, 2, 2, 6, 4)),
        "sequence 0 in slot 2 with start 5 and length 4 does not fit 2",
    ),
    "layers of the ring": (ringed(ring=(2, 3, 2, 6, 4)), "expected keys and values [1, B, 2, S, 4], found"),
    "heads of the ring": (ringed(ring=(1, 3, 1, 6, 4)), "expected keys and values [1, B, 2, S, 4], found"),
    "no positions": (
        ringed(ring=(1, 3, 2, 0, 4)),
        "expected caches of at least one slot and one position, found",
    ),
    "caches of two types": (ringed(dtype=ml_dtypes.bfloat16), "the caches of all windows to be of one type"),
    "int8 for one": (ringed(dtype=np.int8), SCALED),
    "one cache for all": (ringed(**cache_of(*LONG_CACHE)), f"{PER_WINDOW} 2 windows, found 2"),
    "a cache for every layer": (
        ringed(caches=[np.zeros(RING, F32)] * 6),
        f"{PER_WINDOW} 2 windows, found 6",
    ),
    "rings first": (
        ringed(caches=[np.zeros(RING, F32)] * 2 + [np.zeros(LONG_CACHE, F32)] * 2),
        SIZES,
    ),
    "a window more": (ringed(windows=(0, 3, 4)), f"{PER_WINDOW} 3 windows, found 4"),
    "a table too high": (
        ringed(ropes=(1, 0, 2)),
        "layer 2: expected a window of at least 0 and one of 2 rotary tables, found 0 and 2",
    ),
}


@pytest.mark.parametrize(("changed", "text"), BAD_RINGS.values(), ids=BAD_RINGS.keys())
def test_layers_refuse_rings(
    layers: Callable[..., Any], refusal: Callable[..., str], changed: dict[str, Any], text: str
) -> None:
    assert text in refusal(lambda: layers(**changed))


# A LayerNorm, scores of three experts, and a mixture of two of them.
MIXTURE_STEPS = ((2, 0, -1, 10, 1, 0, 0, 0), (0, 1, -1, 0, 0, 0, 1, 0), (3, 1, 2, 0, 1, 1, 3, 2))
MIXTURE_WEIGHTS = [
    *(ones(2, 10), ones(2, 10), ones(2, 3, 10)),
    *(ones(2, 10), ones(6, 5, 10), ones(6, 5, 10), ones(6, 10, 5)),
]


def mixture(*step: tuple[int, int, int], weight: tuple[int, np.ndarray] | None = None, **changed: Any) -> Any:
    """A good call with a norm and experts; of a step ``(which, which integer, value)`` may be changed."""
    steps, weights = [list(codes) for codes in MIXTURE_STEPS], list(MIXTURE_WEIGHTS)
    for which, place, value in step:
        steps[which][place] = value
    if weight is not None:
        weights[weight[0]] = weight[1]
    good = {"steps": steps, "weights": weights, "outs": (3, 5), "numbers": (1e-5, 0, 0, 0, 1e-5, 1)}
    return good | changed


@pytest.mark.parametrize(
    "good",
    [
        mixture(),
        mixture((0, 3, 5), weights=[ones(2, 5)] * 2 + MIXTURE_WEIGHTS[2:]),
        mixture((2, 7, 3), (2, 5, 2), numbers=(1e-5, 0, 0, 0, 1e-5, 0)),
        mixture((0, 4, 0), (0, 2, 0), weights=[MIXTURE_WEIGHTS[0], *MIXTURE_WEIGHTS[2:]]),
        mixture(weight=(4, ones(7, 5, 10))),
    ],
)
def test_the_good_mixtures_are_taken(layers: Callable[..., Any], good: dict[str, Any]) -> None:
    assert np.all(np.isfinite(layers(**good)[0]))


NORM = "numbers do not fit together"
EXPERTS = "the widths of an experts step do not fit together"
BAD_MIXTURES: dict[str, tuple[dict[str, Any], str]] = {
    "norm of an unknown value": (mixture((0, 1, 1)), "no earlier step computes value 1"),
    "norm with an unknown residual": (mixture((0, 2, 5)), "no earlier step computes value 5"),
    "pieces that do not divide": (mixture((0, 3, 3)), f"the widths of a norm of 3 {NORM}"),
    "pieces of nothing": (mixture((0, 3, 0)), f"the widths of a norm of 0 {NORM}"),
    "pieces of less": (mixture((0, 3, -5)), f"the widths of a norm of -5 {NORM}"),
    "pieces too large": (mixture((0, 3, 20)), f"the widths of a norm of 20 {NORM}"),
    "pieces of another width": (mixture((0, 3, 5)), "norm: expected float32 [L, 5], found float32 [2, 10]"),
    "norm with a residual of another width": (
        mixture(steps=[MIXTURE_STEPS[0], MIXTURE_STEPS[1], (2, 1, 2, 10, 0, 0, 0, 0)]),
        f"the widths of a norm of 10 {NORM}",
    ),
    "norm of one layer": (mixture(weight=(0, ones(1, 10))), "norm [1, 10]: no entry 1"),
    "bias of one layer": (mixture(weight=(1, ones(1, 10))), "bias of a norm [1, 10]: no entry 1"),
    "bias of another width": (
        mixture(weight=(1, ones(2, 9))),
        "bias of a norm: expected float32 [L, 10], found float32 [2, 9]",
    ),
    "bfloat16 norm": (
        mixture(weight=(0, np.ones((2, 10), ml_dtypes.bfloat16))),
        "norm: expected float32 [L, 10], found bfloat16 [2, 10]",
    ),
    "experts of an unknown value": (mixture((2, 1, 3)), "no earlier step computes value 3"),
    "unknown scores": (mixture((2, 2, -1)), "no earlier step computes value -1"),
    "experts with an unknown residual": (mixture((2, 3, 3)), "no earlier step computes value 3"),
    "no gate": (mixture((2, 5, 0)), "an experts step with gate 0 and 2 of 3 experts"),
    "unknown gate": (mixture((2, 5, 3)), "an experts step with gate 3 and 2 of 3 experts"),
    "none chosen": (mixture((2, 7, 0)), "gate 1 and 0 of 3 experts"),
    "a negative number chosen": (mixture((2, 7, -1)), "gate 1 and -1 of 3 experts"),
    "more chosen than there are": (mixture((2, 7, 4)), "gate 1 and 4 of 3 experts"),
    "no experts": (mixture((2, 6, 0), (2, 7, 0)), "gate 1 and 0 of 0 experts"),
    "renormalised by halves": (mixture(numbers=(0, 0, 0, 0, 0, 0.5)), "an experts step with gate 1"),
    "renormalised by NaN": (mixture(numbers=(0, 0, 0, 0, 0, np.nan)), "an experts step with gate 1"),
    "no width": (mixture(outs=(3,)), "an experts step with gate 1"),
    "a width too many": (mixture(outs=(3, 5, 5)), "more widths than the steps have weights"),
    "a width of nothing": (mixture(outs=(3, 0)), EXPERTS),
    "a huge width": (
        mixture(outs=(3, 2**60)),
        f"{W} [L, {2**60}, 10], found float32 [6, 5, 10]",
    ),
    "more experts than scores": (mixture((2, 6, 4)), EXPERTS),
    "fewer experts than scores": (mixture((2, 6, 2)), EXPERTS),
    "experts with a residual of another width": (mixture((2, 3, 2)), EXPERTS),
    "norm of the experts": (mixture(weight=(3, ones(1, 10))), "norm [1, 10]: no entry 1"),
    "too few gates": (mixture(weight=(4, ones(5, 5, 10))), "weights [5, 5, 10]: no entry 5"),
    "too few ups": (mixture(weight=(5, ones(5, 5, 10))), "weights [5, 5, 10]: no entry 5"),
    "too few downs": (mixture(weight=(6, ones(5, 10, 5))), "weights [5, 10, 5]: no entry 5"),
    "downs on their side": (
        mixture(weight=(6, ones(6, 5, 10))),
        f"{W} [L, 10, 5], found float32 [6, 5, 10]",
    ),
    "no downs": (mixture(weights=MIXTURE_WEIGHTS[:-1]), "operand weights is missing"),
    "an operand too many": (
        mixture(weights=[*MIXTURE_WEIGHTS, ones(2, 10)]),
        "more operands than the steps take",
    ),
    "int8 without its scale": (
        mixture(weight=(4, np.ones((6, 1, 16, 16, 2), np.int8))),
        "scale: expected float16 [L, 1, 1, 16], found float32 [6, 5, 10]",
    ),
}


@pytest.mark.parametrize(("changed", "text"), BAD_MIXTURES.values(), ids=BAD_MIXTURES.keys())
def test_layers_refuse_norms_and_mixtures(
    layers: Callable[..., Any], refusal: Callable[..., str], changed: dict[str, Any], text: str
) -> None:
    assert text in refusal(lambda: layers(**changed))
