"""Calls that do not make sense: the handlers say what is wrong, and never touch memory that is not theirs."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

F32 = np.float32


def arrays(**changed: Any) -> list[Any]:
    """A good call of precast.attention: two sequences of four tokens, with what is given put in its place."""
    cache = (2, 3, 2, 9, 8)  # [L, B, K, S, H]
    good: dict[str, Any] = {
        "q": np.ones((2, 4, 6, 8), F32),
        "k": np.ones((2, 4, 2, 8), F32),
        "v": np.ones((2, 4, 2, 8), F32),
        "cos": np.ones((2, 4, 3), F32),
        "sin": np.zeros((2, 4, 3), F32),
        "keys": np.zeros(cache, F32),
        "values": np.zeros(cache, F32),
        "scales": [],
        "layer": 1,
        "slots": (2, 0),
        "starts": (5, 0),
        "lengths": (4, 3),
    }
    assert changed.keys() <= good.keys()
    *fresh, keys, values, scales, layer, slots, starts, lengths = (good | changed).values()
    return [*fresh, [keys, values, *scales], layer, slots, starts, lengths]


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, F32)


def test_the_good_call_is_taken(attention: Callable[..., Any]) -> None:
    out, *_ = attention(*arrays(), scale=1.0)
    assert np.all(out[1, :3] == 1.0)


FIT = "do not fit together"
CACHE_SHAPE = (2, 3, 2, 9, 8)
INT8 = np.zeros(CACHE_SHAPE, np.int8)
SCALES = [np.ones(CACHE_SHAPE[:-1], F32)] * 2
ANGLES = "cos [2, 4, 5] and sin [2, 4, 5] do not fit q [2, 4, 6, 8]"
CACHE = "expected keys and values [L, B, K, S, H], both float32, both bfloat16 or both int8"
ROWS = "expected slots, starts and lengths of shape [2]"
BAD_ATTENTION = {
    "layer too high": ({"layer": 2}, "no layer 2 in caches of 2 layers"),
    "layer negative": ({"layer": -1}, "no layer -1 in caches of 2 layers"),
    "slot too high": (
        {"slots": (2, 3)},
        "sequence 1 in slot 3 with start 0 and length 3 does not fit 3 slots",
    ),
    "slot negative": ({"slots": (-1, 0)}, "sequence 0 in slot -1 with start 5"),
    "slot twice": ({"slots": (2, 2)}, "two sequences in slot 2"),
    "start negative": ({"starts": (5, -1)}, "start -1 and length 3 does not fit"),
    "behind the capacity": ({"starts": (6, 0)}, "start 6 and length 4 does not fit 3 slots of 9 positions"),
    "far behind the capacity": ({"starts": (2**31 - 1, 0)}, "start 2147483647 and length 4 does not fit"),
    "length negative": ({"lengths": (4, -1)}, "length -1 does not fit"),
    "more than its tokens": (
        {"lengths": (4, 5)},
        "length 5 does not fit 3 slots of 9 positions and 4 tokens",
    ),
    "too few slots": ({"slots": (1,)}, ROWS),
    "too many starts": ({"starts": (1, 2, 3)}, ROWS),
    "too few lengths": ({"lengths": (1,)}, ROWS),
    "heads not a multiple": ({"q": ones(2, 4, 5, 8)}, "q [2, 4, 5, 8], k [2, 4, 2, 8]"),
    "no query heads": ({"q": ones(2, 4, 0, 8)}, FIT),
    "no key heads": (
        {key: ones(2, 4, 0, 8) for key in ("k", "v")}
        | {key: ones(2, 3, 0, 9, 8) for key in ("keys", "values")},
        FIT,
    ),
    "head dimension of k": ({"k": ones(2, 4, 2, 7), "v": ones(2, 4, 2, 7)}, FIT),
    "head dimension of the cache": ({"keys": ones(2, 3, 2, 9, 7), "values": ones(2, 3, 2, 9, 7)}, FIT),
    "heads of the cache": ({"keys": ones(2, 3, 1, 9, 8), "values": ones(2, 3, 1, 9, 8)}, FIT),
    "caches that differ": (
        {"values": ones(2, 3, 2, 10, 8)},
        "caches [2, 3, 2, 9, 8] and [2, 3, 2, 10, 8] do not fit",
    ),
    "k and v that differ": ({"v": ones(2, 4, 1, 8)}, FIT),
    "tokens of k": ({"k": ones(2, 5, 2, 8), "v": ones(2, 5, 2, 8)}, FIT),
    "sequences of k": ({"k": ones(1, 4, 2, 8), "v": ones(1, 4, 2, 8)}, FIT),
    "cache of four axes": ({"keys": ones(3, 2, 9, 8), "values": ones(3, 2, 9, 8)}, CACHE),
    "float16 caches": ({key: np.zeros(CACHE_SHAPE, np.float16) for key in ("keys", "values")}, CACHE),
    "int32 caches": ({key: np.zeros(CACHE_SHAPE, np.int32) for key in ("keys", "values")}, CACHE),
    "bfloat16 keys alone": ({"keys": np.zeros(CACHE_SHAPE, ml_dtypes.bfloat16)}, CACHE),
    "int8 values alone": ({"values": np.zeros(CACHE_SHAPE, np.int8)}, CACHE),
    "int8 keys alone": ({"keys": INT8, "scales": SCALES}, CACHE),
    "int8 without scales": (
        {"keys": INT8, "values": INT8},
        "int8 caches need key and value scales, other caches take none",
    ),
    "scales without int8": (
        {"scales": SCALES},
        "int8 caches need key and value scales, other caches take none",
    ),
    "one scale": ({"keys": INT8, "values": INT8, "scales": SCALES[:1]}, "found 7 operands and 3 results"),
    "scales of half precision": (
        {"keys": INT8, "values": INT8, "scales": [SCALES[0], np.ones((2, 3, 2, 9), np.float16)]},
        "expected float32 scales [L, B, K, S] for caches [2, 3, 2, 9, 8], found [2, 3, 2, 9]",
    ),
    "scales of five axes": (
        {"keys": INT8, "values": INT8, "scales": [ones(2, 3, 2, 9, 1), SCALES[1]]},
        "found [2, 3, 2, 9, 1]",
    ),
    "too few scales": (
        {"keys": INT8, "values": INT8, "scales": [SCALES[0], ones(2, 3, 2, 8)]},
        "found [2, 3, 2, 8]",
    ),
    "more pairs than half a head": ({"cos": ones(2, 4, 5), "sin": ones(2, 4, 5)}, ANGLES),
    "cos and sin that differ": ({"cos": ones(2, 4, 2)}, "cos [2, 4, 2] and sin [2, 4, 3] do not fit q"),
    "tokens of cos": ({"cos": ones(2, 5, 3), "sin": ones(2, 5, 3)}, "do not fit q [2, 4, 6, 8]"),
    "sequences of cos": ({"cos": ones(1, 4, 3), "sin": ones(1, 4, 3)}, "do not fit q [2, 4, 6, 8]"),
    "cos of two axes": ({"cos": ones(2, 4)}, "rank"),
    "integer sin": ({"sin": np.zeros((2, 4, 3), np.int32)}, "S32"),
    "float16 q": ({"q": np.ones((2, 4, 6, 8), np.float16)}, "F16"),
    "bfloat16 k": ({"k": np.ones((2, 4, 2, 8), ml_dtypes.bfloat16)}, "BF16"),
    "integer v": ({"v": np.ones((2, 4, 2, 8), np.int32)}, "S32"),
    "q of three axes": ({"q": ones(4, 6, 8)}, "rank"),
    "layer of one axis": ({"layer": (1,)}, "rank"),
    "slots of two axes": ({"slots": ((2, 0),)}, "rank"),
}


@pytest.mark.parametrize(("changed", "text"), BAD_ATTENTION.values(), ids=BAD_ATTENTION.keys())
def test_attention_refuses(
    attention: Callable[..., Any], refusal: Callable[..., str], changed: dict[str, Any], text: str
) -> None:
    assert text in refusal(lambda: attention(*arrays(**changed), scale=1.0))


@pytest.mark.parametrize("aliases", [{}, {5: 1}, {6: 2}])
def test_attention_refuses_caches_that_are_not_aliased(
    attention: Callable[..., Any], refusal: Callable[..., str], aliases: dict[int, int]
) -> None:
    text = refusal(lambda: attention(*arrays(), scale=1.0, aliases=aliases))
    assert "the cache results must alias the cache arguments" in text


@pytest.mark.parametrize("missing", range(4))
def test_attention_refuses_scales_that_are_not_aliased(
    attention: Callable[..., Any], refusal: Callable[..., str], missing: int
) -> None:
    given = arrays(keys=INT8, values=INT8, scales=SCALES)
    aliases = {5 + i: 1 + i for i in range(4) if i != missing}
    text = refusal(lambda: attention(*given, scale=1.0, aliases=aliases))
    assert "the cache results must alias the cache arguments" in text


@pytest.mark.parametrize(
    ("window", "soft_cap"), [(-1, 0.0), (-(2**63), 0.0), (0, -1.0), (0, np.inf), (0, np.nan)]
)
def test_attention_refuses_windows_and_caps(
    attention: Callable[..., Any], refusal: Callable[..., str], window: int, soft_cap: float
) -> None:
    text = refusal(lambda: attention(*arrays(), scale=1.0, window=window, soft_cap=soft_cap))
    assert f"a window and a finite soft_cap of at least 0, found {window} and" in text


RINGS = {
    "what the first token sees": (
        {"starts": (6, 0)},
        7,
        "start 6 and length 4 does not fit a ring of 9 positions",
    ),
    "in a later round": (
        {"starts": (40, 0)},
        7,
        "sequence 0 in slot 2 with start 40 and length 4 does not fit a ring",
    ),
    "of one token": ({"starts": (9, 0), "lengths": (1, 3)}, 10, "9 positions with a window of 10"),
    "by far": ({"starts": (6, 0)}, 2**63 - 1, f"9 positions with a window of {2**63 - 1}"),
    "of the second": (
        {"starts": (0, 2**31 - 1)},
        8,
        "sequence 1 in slot 0 with start 2147483647 and length 3 does not fit",
    ),
    "negative start": ({"starts": (-1, 0)}, 3, "start -1 and length 4 does not fit 3 slots"),
}


@pytest.mark.parametrize(("changed", "window", "text"), RINGS.values(), ids=RINGS.keys())
def test_attention_refuses_rings_that_are_too_short(
    attention: Callable[..., Any],
    refusal: Callable[..., str],
    changed: dict[str, Any],
    window: int,
    text: str,
) -> None:
    assert text in refusal(lambda: attention(*arrays(**changed), scale=1.0, window=window))


@pytest.mark.parametrize(
    ("starts", "window"), [((6, 0), 6), ((2**31 - 1, 2**31 - 1), 6), ((5, 6), 2**63 - 1), ((5, 0), 99)]
)
def test_rings_that_are_long_enough_are_taken(
    attention: Callable[..., Any], starts: tuple[int, int], window: int
) -> None:
    attention(*arrays(starts=starts), scale=1.0, window=window)


def test_attention_refuses_attributes_of_other_types(jax: ModuleType, refusal: Callable[..., str]) -> None:
    *fresh, caches, layer, slots, starts, lengths = arrays()
    given = [*fresh, *caches, *(np.asarray(a, np.int32) for a in (layer, slots, starts, lengths))]
    results = [jax.ShapeDtypeStruct(given[i].shape, F32) for i in (0, 5, 6)]
    call = jax.ffi.ffi_call("precast.attention.v2", results, input_output_aliases={5: 1, 6: 2})
    good = {"scale": np.float32(1.0), "window": np.int64(0), "soft_cap": np.float32(0.0)}
    assert "expected F32 but got F64" in refusal(lambda: call(*given, **good | {"scale": np.float64(1.0)}))
    # Other numbers: to jax an attribute of one is the same attribute, whatever its type.
    assert "expected F32 but got S32" in refusal(lambda: call(*given, **good | {"soft_cap": np.int32(2)}))
    assert "expected S64 but got S32" in refusal(lambda: call(*given, **good | {"window": np.int32(3)}))
    assert "scale" in refusal(lambda: call(*given, scal=np.float32(1.0), window=np.int64(0), soft_cap=F32(0)))
    assert "expected 3 but got 4" in refusal(lambda: call(*given, **good, softcap=np.float32(1.0)))


# --- linear -------------------------------------------------------------------------------------------------

# Weights of 20 outputs of 40 inputs, as each format has them: two panels, two groups.
STORED = {
    "float32": [(F32, (2, 20, 40))],
    "bfloat16": [(ml_dtypes.bfloat16, (2, 20, 40))],
    "int8": [(np.int8, (2, 2, 32, 16, 2)), (np.float16, (2, 2, 2, 16))],
    "int4": [(np.uint8, (2, 2, 8, 16, 4)), (np.float16, (2, 2, 2, 16)), (np.float16, (2, 2, 2, 16))],
}
PARTS = {"float32": ("weights",), "bfloat16": ("weights",)}
PARTS |= {"int8": ("int8 weights", "scale"), "int4": ("int4 weights", "scale", "minimum")}
X = np.ones((3, 40), F32)
W = ones(2, 20, 40)


def expected_part(name: str, place: int) -> str:
    """Return the part of a refusal that says which operand a format takes at a place."""
    dtype, shape = STORED[name][place]
    axes = ", ".join(map(str, shape[1:]))
    return f"{PARTS[name][place]}: expected {np.dtype(dtype)} [L, {axes}]"


def stored(name: str) -> list[np.ndarray]:
    return [np.zeros(shape, dtype) for dtype, shape in STORED[name]]


@pytest.mark.parametrize("name", STORED)
def test_the_good_weights_are_taken(linear: Callable[..., Any], name: str) -> None:
    assert np.all(linear(X, 1, [stored(name)], [20])[0] == 0.0)


@pytest.mark.parametrize("axis", range(5))
@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, parts in PARTS.items() for place in range(len(parts))]
)
def test_linear_refuses_shapes_of_weights(
    linear: Callable[..., Any], refusal: Callable[..., str], name: str, place: int, axis: int, by: int
) -> None:
    arrays = stored(name)
    shape = list(arrays[place].shape)
    if axis >= len(shape) or (axis == 0 and by > 0):
        return
    shape[axis] += by
    arrays[place] = np.zeros(shape, arrays[place].dtype)
    text = refusal(lambda: linear(X, 1, [arrays], [20]))
    found = f"{expected_part(name, place)}, found {np.dtype(STORED[name][place][0])} {shape}"
    if axis == 0:
        found = f"{PARTS[name][place]} {shape}: no entry 1"
    assert found in text


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, parts in PARTS.items() for place in range(len(parts))]
)
def test_linear_refuses_ranks_of_weights(
    linear: Callable[..., Any], refusal: Callable[..., str], name: str, place: int
) -> None:
    for change in (lambda a: a[0], lambda a: a[None]):
        arrays = stored(name)
        arrays[place] = change(arrays[place])
        text = refusal(lambda arrays=arrays: linear(X, 0, [arrays], [20]))
        found = f"found {arrays[place].dtype} {list(arrays[place].shape)}"
        assert f"{expected_part(name, place)}, {found}" in text


@pytest.mark.parametrize(("name", "place"), [("int8", 1), ("int4", 1), ("int4", 2)])
@pytest.mark.parametrize("dtype", [F32, ml_dtypes.bfloat16, np.uint16])
def test_linear_refuses_types_of_scales(
    linear: Callable[..., Any], refusal: Callable[..., str], name: str, place: int, dtype: Any
) -> None:
    arrays = stored(name)
    arrays[place] = arrays[place].astype(dtype)
    text = refusal(lambda: linear(X, 0, [arrays], [20]))
    assert f"linear: {expected_part(name, place)}, found {np.dtype(dtype)} [2, 2, 2, 16]" in text


@pytest.mark.parametrize("dtype", [np.float16, np.int16, np.int32, np.uint16, np.bool_])
def test_linear_refuses_types_of_weights(
    linear: Callable[..., Any], refusal: Callable[..., str], dtype: Any
) -> None:
    text = refusal(lambda: linear(X, 0, [[np.ones((2, 20, 40), dtype)]], [20]))
    assert f"linear: weights: expected float32, bfloat16, int8 or uint8, found {np.dtype(dtype)}" in text


BAD_LINEAR: dict[str, tuple[dict[str, Any], str]] = {
    "layer too high": ({"layer": 2}, "weights [2, 20, 40]: no entry 2"),
    "layer negative": ({"layer": -1}, "weights [2, 20, 40]: no entry -1"),
    "layer of the second": (
        {"layer": 1, "weights": [[W], [W[:1]]], "outs": [20, 20]},
        "weights [1, 20, 40]: no entry 1",
    ),
    "no layers": ({"layer": 0, "weights": [[W[:0]]]}, "weights [0, 20, 40]: no entry 0"),
    "layer of the norm": ({"layer": 1, "norm": ones(1, 40)}, "norm [1, 40]: no entry 1"),
    "layer of the bias": ({"layer": 1, "biases": [ones(1, 20)]}, "bias [1, 20]: no entry 1"),
    "width of the second": (
        {"weights": [[W], [W]], "outs": [20, 21]},
        "weights: expected float32 [L, 21, 40], found float32 [2, 20, 40]",
    ),
    "width of the norm": ({"norm": ones(2, 41)}, "norm: expected float32 [L, 40], found float32 [2, 41]"),
    "norm of one axis": ({"norm": ones(40)}, "norm: expected float32 [L, 40], found float32 [40]"),
    "bfloat16 norm": (
        {"norm": np.ones((2, 40), ml_dtypes.bfloat16)},
        "norm: expected float32 [L, 40], found bfloat16 [2, 40]",
    ),
    "width of the bias": ({"biases": [ones(2, 40)]}, "bias: expected float32 [L, 20], found float32 [2, 40]"),
    "float16 bias": (
        {"biases": [np.ones((2, 20), np.float16)]},
        "bias: expected float32 [L, 20], found float16 [2, 20]",
    ),
    "rows of the residual": (
        {"residual": ones(2, 20)},
        "residual: expected float32 [3, 20], found float32 [2, 20]",
    ),
    "width of the residual": (
        {"residual": ones(3, 40)},
        "residual: expected float32 [3, 20], found float32 [3, 40]",
    ),
    "residual of three axes": (
        {"residual": ones(1, 3, 20)},
        "residual: expected float32 [3, 20], found float32 [1, 3, 20]",
    ),
    "integer residual": (
        {"residual": np.ones((3, 20), np.int32)},
        "residual: expected float32 [3, 20], found int32 [3, 20]",
    ),
    "residual and two results": (
        {"weights": [[W], [W]], "outs": [20, 20], "residual": ones(3, 20)},
        "expected one result, or several without residual and gate, found 2",
    ),
    "more true rows than rows": ({"used": 4}, "expected 0 to 3 true rows, found 4"),
    "far more true rows": ({"used": 2**31 - 1}, "expected 0 to 3 true rows, found 2147483647"),
    "negative true rows": ({"used": -1}, "expected 0 to 3 true rows, found -1"),
    "unknown gate": (
        {"weights": [[W], [W]], "outs": [20, 20], "gate": "relu"},
        "expected gate '', 'silu' or 'gelu_tanh', found 'relu'",
    ),
    "gate in capitals": (
        {"weights": [[W], [W]], "outs": [20, 20], "gate": "SILU"},
        "expected gate '', 'silu' or 'gelu_tanh', found 'SILU'",
    ),
    "gate of three": (
        {"weights": [[W]] * 3, "outs": [20] * 3, "gate": "silu"},
        "more operands than weights, biases, norm and residual take",
    ),
    "gate of two widths": (
        {"weights": [[W], [W[:, :19]]], "outs": [20, 19], "gate": "silu"},
        "weights: expected float32 [L, 20, 40], found float32 [2, 19, 40]",
    ),
    "no weights": ({"weights": [], "outs": [20]}, "operand weights is missing"),
    "a weight too few": ({"weights": [[W]], "outs": [20, 20]}, "operand weights is missing"),
    "a weight too many": (
        {"weights": [[W], [W]]},
        "more operands than weights, biases, norm and residual take",
    ),
    "a bias too few": ({"weights": [[W], [W]], "outs": [20, 20], "biases": [ones(2, 20)]}, "operand bias"),
    "no scale": ({"weights": [stored("int8")[:1]]}, "operand scale is missing"),
    "no minimum": ({"weights": [stored("int4")[:2]]}, "operand minimum is missing"),
    "int8 with a minimum": ({"weights": [[*stored("int8"), stored("int8")[1]]]}, "more operands than"),
    "float16 x": ({"x": X.astype(np.float16)}, "F16"),
    "integer x": ({"x": X.astype(np.int32)}, "S32"),
    "x of three axes": ({"x": X[None]}, "rank"),
}


@pytest.mark.parametrize(("changed", "text"), BAD_LINEAR.values(), ids=BAD_LINEAR.keys())
def test_linear_refuses(
    linear: Callable[..., Any], refusal: Callable[..., str], changed: dict[str, Any], text: str
) -> None:
    good: dict[str, Any] = {"x": X, "layer": 1, "weights": [[W]], "outs": [20]}
    assert text in refusal(lambda: linear(**(good | changed)))


LINEAR = {"norm": False, "eps": F32(0), "residual": False, "bias": False, "gate": ""}


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([(2, 20)], "float32 results with as many rows as x [3, 40]"),
        ([(20,)], "float32 results with as many rows as x [3, 40]"),
        ([(3, 20, 1)], "float32 results with as many rows as x [3, 40]"),
        ([(3, 40)], "weights: expected float32 [L, 40, 40], found float32 [2, 20, 40]"),
        ([(3, 20), (3, 20)], "operand weights is missing"),
        ([], "expected one result, or several without residual and gate, found 0"),
    ],
)
def test_linear_refuses_results(
    jax: ModuleType, refusal: Callable[..., str], results: list[tuple[int, ...]], text: str
) -> None:
    shapes = [jax.ShapeDtypeStruct(shape, F32) for shape in results]
    # Nobody would use the results of a call without any: it must count as having an effect to be made at all.
    call = jax.ffi.ffi_call("precast.linear.v1", shapes, has_side_effect=True)
    assert text in refusal(lambda: call(X, np.int32(0), np.int32(3), W, **LINEAR))


def test_linear_refuses_bfloat16_results(jax: ModuleType, refusal: Callable[..., str]) -> None:
    call = jax.ffi.ffi_call("precast.linear.v1", [jax.ShapeDtypeStruct((3, 20), ml_dtypes.bfloat16)])
    text = refusal(lambda: call(X, np.int32(0), np.int32(3), W, **LINEAR))
    assert "expected float32 results with as many rows as x [3, 40]" in text


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_64_bit_x(jax: ModuleType, refusal: Callable[..., str], dtype: type) -> None:
    with jax.enable_x64(True):
        call = jax.ffi.ffi_call("precast.linear.v1", [jax.ShapeDtypeStruct((3, 20), F32)])
        found = "F64" if dtype is np.float64 else "S64"
        text = refusal(lambda: call(X.astype(dtype), np.int32(0), np.int32(3), W, **LINEAR))
        assert f"got {found}" in text


@pytest.mark.parametrize("place", [1, 2])
def test_64_bit_layer_and_rows(jax: ModuleType, refusal: Callable[..., str], place: int) -> None:
    given: list[Any] = [X, np.int32(0), np.int32(3), W]
    given[place] = np.int64(given[place])
    with jax.enable_x64(True):
        call = jax.ffi.ffi_call("precast.linear.v1", [jax.ShapeDtypeStruct((3, 20), F32)])
        assert "got S64" in refusal(lambda: call(*given, **LINEAR))


# --- embed --------------------------------------------------------------------------------------------------

TABLE = ones(1, 20, 40)
BAD_EMBED: dict[str, tuple[tuple[Any, ...], str]] = {
    "token too high": (
        (np.int32([0, 20]), [TABLE], 20, 40),
        "embed: token 20 is outside the vocabulary of 20",
    ),
    "token far too high": (
        (np.int32([2**31 - 1]), [TABLE], 20, 40),
        "embed: token 2147483647 is outside the vocabulary of 20",
    ),
    "token negative": (
        (np.int32([3, -1]), [TABLE], 20, 40),
        "embed: token -1 is outside the vocabulary of 20",
    ),
    "padding of a panel": (
        (np.int32([20]), [a[:1] for a in stored("int8")], 20, 40),
        "embed: token 20 is outside the vocabulary of 20",
    ),
    "vocabulary": (
        (np.int32([0]), [TABLE], 21, 40),
        "embed: weights: expected float32 [L, 21, 40], found float32 [1, 20, 40]",
    ),
    "width": (
        (np.int32([0]), [TABLE], 20, 41),
        "embed: weights: expected float32 [L, 20, 41], found float32 [1, 20, 40]",
    ),
    "negative vocabulary": (
        (np.int32([0]), [TABLE], -1, 40),
        "a result for each of 1 tokens and a vocabulary of at least 0, found [1, 40] and -1",
    ),
    "two axes": (
        (np.int32([0]), [TABLE[0]], 20, 40),
        "embed: weights: expected float32 [L, 20, 40], found float32 [20, 40]",
    ),
    "no entry": ((np.int32([0]), [TABLE[:0]], 20, 40), "embed: weights [0, 20, 40]: no entry 0"),
    "no weights": ((np.int32([0]), [], 20, 40), "operand weights is missing"),
    "no scale": ((np.int32([0]), stored("int8")[:1], 20, 40), "operand scale is missing"),
    "panels": (
        (np.int32([0]), stored("int8"), 33, 40),
        "int8 weights: expected int8 [L, 3, 32, 16, 2], found int8 [2, 2, 32, 16, 2]",
    ),
    "groups": (
        (np.int32([0]), stored("int4"), 20, 65),
        "int4 weights: expected uint8 [L, 2, 12, 16, 4], found uint8 [2, 2, 8, 16, 4]",
    ),
    "too many": ((np.int32([0]), [TABLE, TABLE], 20, 40), "embed: more operands than weights take"),
    "float16 weights": (
        (np.int32([0]), [TABLE.astype(np.float16)], 20, 40),
        "embed: weights: expected float32, bfloat16, int8 or uint8, found float16",
    ),
    "float tokens": ((F32([0]), [TABLE], 20, 40), "F32"),
    "tokens of two axes": ((np.int32([[0]]), [TABLE], 20, 40), "rank"),
}


@pytest.mark.parametrize(("given", "text"), BAD_EMBED.values(), ids=BAD_EMBED.keys())
def test_embed_refuses(
    embed: Callable[..., Any], refusal: Callable[..., str], given: tuple[Any, ...], text: str
) -> None:
    assert text in refusal(lambda: embed(*given))


@pytest.mark.parametrize(
    ("shape", "results", "text"),
    [
        (
            (2, 0),
            2,
            "argmax: expected rows of 1 to 2^31 - 1 numbers and a result for each, found x [2, 0] and result [2]",
        ),
        (
            (2, 3),
            1,
            "argmax: expected rows of 1 to 2^31 - 1 numbers and a result for each, found x [2, 3] and result [1]",
        ),
        ((6,), 6, "rank"),
    ],
)
def test_argmax_refuses(
    jax: ModuleType, refusal: Callable[..., str], shape: tuple[int, ...], results: int, text: str
) -> None:
    call = jax.ffi.ffi_call("precast.argmax.v1", jax.ShapeDtypeStruct((results,), np.int32))
    assert text in refusal(lambda: call(np.zeros(shape, F32)))


def test_argmax_refuses_other_numbers(jax: ModuleType, refusal: Callable[..., str]) -> None:
    call = jax.ffi.ffi_call("precast.argmax.v1", jax.ShapeDtypeStruct((2,), np.int32))
    assert "F32" in refusal(lambda: call(np.zeros((2, 3), np.int32)))
    call = jax.ffi.ffi_call("precast.argmax.v1", jax.ShapeDtypeStruct((2,), F32))
    assert "S32" in refusal(lambda: call(np.zeros((2, 3), F32)))


def test_embed_refuses_results(jax: ModuleType, refusal: Callable[..., str]) -> None:
    call = jax.ffi.ffi_call("precast.embed.v1", jax.ShapeDtypeStruct((3, 40), F32))
    text = refusal(lambda: call(np.int32([0, 1]), TABLE, vocab=np.int64(20)))
    assert (
        "embed: expected a result for each of 2 tokens and a vocabulary of at least 0, found [3, 40] and 20"
        in text
    )
    assert "S32" in refusal(lambda: call(np.int32([0, 1, 2]), TABLE, vocab=np.int32(21)))
