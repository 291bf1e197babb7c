"""Calls that do not make sense: the handlers say what is wrong, and never touch memory that is not theirs."""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

F32 = np.float32


@pytest.fixture(scope="module")
def refusal(jax: ModuleType) -> Callable[[Callable[[], object]], str]:
    """What a call was refused with."""

    def refused(call: Callable[[], object]) -> str:
        # Which of the two depends on whether jax has made this call before.
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="INVALID_ARGUMENT") as error:
            jax.block_until_ready(call())
        return str(error.value)

    return refused


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
CACHE = "expected float32, bfloat16 or int8 caches of 5 axes [L, B, K, S, H], keys and values alike"
ROWS = "expected slots, starts and lengths of shape [2]"
BAD_ATTENTION = {
    "layer too high": ({"layer": 2}, "layer 2 of caches of 2 layers"),
    "layer negative": ({"layer": -1}, "layer -1 of caches of 2 layers"),
    "slot too high": ({"slots": (2, 3)}, "sequence 1 of slot 3, start 0 and length 3 does not fit 3 slots"),
    "slot negative": ({"slots": (-1, 0)}, "sequence 0 of slot -1,"),
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
    "int8 without scales": ({"keys": INT8, "values": INT8}, "int8 caches come with key and value scales"),
    "scales without int8": ({"scales": SCALES}, "int8 caches come with key and value scales"),
    "one scale": ({"keys": INT8, "values": INT8, "scales": SCALES[:1]}, "found 7 operands and 3 results"),
    "scales of half precision": (
        {"keys": INT8, "values": INT8, "scales": [SCALES[0], np.ones((2, 3, 2, 9), np.float16)]},
        "expected float32 scales [L, B, K, S] of caches [2, 3, 2, 9, 8], found [2, 3, 2, 9]",
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
    found = f"{PARTS[name][place]} of shape {shape} or of its type does not fit the call"
    if axis == 0:
        found = f"layer 1 of {PARTS[name][place]} {shape}"
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
        assert (
            f"{PARTS[name][place]} of shape {list(arrays[place].shape)} or of its type does not fit" in text
        )


@pytest.mark.parametrize(("name", "place"), [("int8", 1), ("int4", 1), ("int4", 2)])
@pytest.mark.parametrize("dtype", [F32, ml_dtypes.bfloat16, np.uint16])
def test_linear_refuses_types_of_scales(
    linear: Callable[..., Any], refusal: Callable[..., str], name: str, place: int, dtype: Any
) -> None:
    arrays = stored(name)
    arrays[place] = arrays[place].astype(dtype)
    text = refusal(lambda: linear(X, 0, [arrays], [20]))
    assert f"linear: {PARTS[name][place]} of shape [2, 2, 2, 16] or of its type does not fit the call" in text


@pytest.mark.parametrize("dtype", [np.float16, np.int16, np.int32, np.uint16, np.bool_])
def test_linear_refuses_types_of_weights(
    linear: Callable[..., Any], refusal: Callable[..., str], dtype: Any
) -> None:
    text = refusal(lambda: linear(X, 0, [[np.ones((2, 20, 40), dtype)]], [20]))
    assert "linear: weights of a type that is not known" in text


BAD_LINEAR: dict[str, tuple[dict[str, Any], str]] = {
    "layer too high": ({"layer": 2}, "layer 2 of weights [2, 20, 40]"),
    "layer negative": ({"layer": -1}, "layer -1 of weights [2, 20, 40]"),
    "layer of the second": (
        {"layer": 1, "weights": [[W], [W[:1]]], "outs": [20, 20]},
        "layer 1 of weights [1, 20, 40]",
    ),
    "no layers": ({"layer": 0, "weights": [[W[:0]]]}, "layer 0 of weights [0, 20, 40]"),
    "layer of the norm": ({"layer": 1, "norm": ones(1, 40)}, "layer 1 of norm [1, 40]"),
    "layer of the bias": ({"layer": 1, "biases": [ones(1, 20)]}, "layer 1 of bias [1, 20]"),
    "width of the second": ({"weights": [[W], [W]], "outs": [20, 21]}, "weights of shape [2, 20, 40]"),
    "width of the norm": ({"norm": ones(2, 41)}, "norm of shape [2, 41] or of its type does not fit"),
    "norm of one axis": ({"norm": ones(40)}, "norm of shape [40]"),
    "bfloat16 norm": ({"norm": np.ones((2, 40), ml_dtypes.bfloat16)}, "norm of shape [2, 40]"),
    "width of the bias": ({"biases": [ones(2, 40)]}, "bias of shape [2, 40]"),
    "float16 bias": ({"biases": [np.ones((2, 20), np.float16)]}, "bias of shape [2, 20]"),
    "rows of the residual": ({"residual": ones(2, 20)}, "residual of shape [2, 20]"),
    "width of the residual": ({"residual": ones(3, 40)}, "residual of shape [3, 40]"),
    "residual of three axes": ({"residual": ones(1, 3, 20)}, "residual of shape [1, 3, 20]"),
    "integer residual": ({"residual": np.ones((3, 20), np.int32)}, "residual of shape [3, 20]"),
    "residual and two results": (
        {"weights": [[W], [W]], "outs": [20, 20], "residual": ones(3, 20)},
        "expected one result, or several without residual and gate, found 2",
    ),
    "more true rows than rows": ({"used": 4}, "4 true rows of x [3, 40]"),
    "far more true rows": ({"used": 2**31 - 1}, "2147483647 true rows of x [3, 40]"),
    "negative true rows": ({"used": -1}, "-1 true rows of x [3, 40]"),
    "unknown gate": ({"weights": [[W], [W]], "outs": [20, 20], "gate": "relu"}, "gate 'relu' is not known"),
    "gate in capitals": (
        {"weights": [[W], [W]], "outs": [20, 20], "gate": "SILU"},
        "gate 'SILU' is not known",
    ),
    "gate of one": ({"gate": "silu"}, "weights of a type that is not known, or too few operands"),
    "gate of three": (
        {"weights": [[W]] * 3, "outs": [20] * 3, "gate": "silu"},
        "more operands than weights, biases, norm and residual take",
    ),
    "gate of two widths": (
        {"weights": [[W], [W[:, :19]]], "outs": [20, 19], "gate": "silu"},
        "weights of shape [2, 19, 40]",
    ),
    "no weights": ({"weights": [], "outs": [20]}, "too few operands"),
    "a weight too few": ({"weights": [[W]], "outs": [20, 20]}, "too few operands"),
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
        ([(2, 20)], "float32 results of as many rows as x [3, 40]"),
        ([(20,)], "float32 results of as many rows as x [3, 40]"),
        ([(3, 20, 1)], "float32 results of as many rows as x [3, 40]"),
        ([(3, 40)], "weights of shape [2, 20, 40] or of its type does not fit the call"),
        ([(3, 20), (3, 20)], "too few operands"),
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
    assert "expected float32 results of as many rows as x [3, 40]" in text


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
    "token too high": ((np.int32([0, 20]), [TABLE], 20, 40), "embed: token 20 of 20"),
    "token far too high": ((np.int32([2**31 - 1]), [TABLE], 20, 40), "embed: token 2147483647 of 20"),
    "token negative": ((np.int32([3, -1]), [TABLE], 20, 40), "embed: token -1 of 20"),
    "padding of a panel": (
        (np.int32([20]), [a[:1] for a in stored("int8")], 20, 40),
        "embed: token 20 of 20",
    ),
    "vocabulary": ((np.int32([0]), [TABLE], 21, 40), "embed: weights of shape [1, 20, 40]"),
    "width": ((np.int32([0]), [TABLE], 20, 41), "embed: weights of shape [1, 20, 40]"),
    "negative vocabulary": ((np.int32([0]), [TABLE], -1, 40), "for 1 tokens of -1"),
    "two axes": ((np.int32([0]), [TABLE[0]], 20, 40), "embed: weights of shape [20, 40]"),
    "no entry": ((np.int32([0]), [TABLE[:0]], 20, 40), "embed: layer 0 of weights [0, 20, 40]"),
    "no weights": ((np.int32([0]), [], 20, 40), "too few operands"),
    "no scale": ((np.int32([0]), stored("int8")[:1], 20, 40), "operand scale is missing"),
    "panels": ((np.int32([0]), stored("int8"), 33, 40), "int8 weights of shape [2, 2, 32, 16, 2]"),
    "groups": ((np.int32([0]), stored("int4"), 20, 65), "int4 weights of shape [2, 2, 8, 16, 4]"),
    "too many": ((np.int32([0]), [TABLE, TABLE], 20, 40), "embed: more operands than weights take"),
    "float16 weights": ((np.int32([0]), [TABLE.astype(np.float16)], 20, 40), "a type that is not known"),
    "float tokens": ((F32([0]), [TABLE], 20, 40), "F32"),
    "tokens of two axes": ((np.int32([[0]]), [TABLE], 20, 40), "rank"),
}


@pytest.mark.parametrize(("given", "text"), BAD_EMBED.values(), ids=BAD_EMBED.keys())
def test_embed_refuses(
    embed: Callable[..., Any], refusal: Callable[..., str], given: tuple[Any, ...], text: str
) -> None:
    assert text in refusal(lambda: embed(*given))


def test_embed_refuses_results(jax: ModuleType, refusal: Callable[..., str]) -> None:
    call = jax.ffi.ffi_call("precast.embed.v1", jax.ShapeDtypeStruct((3, 40), F32))
    text = refusal(lambda: call(np.int32([0, 1]), TABLE, vocab=np.int64(20)))
    assert "embed: result [3, 40] for 2 tokens of 20" in text
    assert "S32" in refusal(lambda: call(np.int32([0, 1, 2]), TABLE, vocab=np.int32(21)))


# --- layers -------------------------------------------------------------------------------------------------

LAYERS_CACHE = (2, 3, 2, 9, 4)  # [L, B, K, S, H]
LAYERS_INT8 = [np.zeros(LAYERS_CACHE, np.int8)] * 2 + [ones(*LAYERS_CACHE[:-1])] * 2
LINEAR_QKV = (0, 0, -1, 1, 0, 0, 3, 0)
ATTENTION = (1, 1, 2, 3, 0, 0, 0, 0)
LINEAR_OUT = (0, 4, 0, 0, 1, 0, 1, 0)
GATED = (0, 5, -1, 0, 0, 1, 2, 0)
DOWN = (0, 6, 5, 0, 0, 0, 1, 0)
STEPS = (LINEAR_QKV, ATTENTION, LINEAR_OUT, GATED, DOWN)
OUTS = (24, 8, 8, 10, 14, 14, 10)
WEIGHTS = [
    *(ones(2, 10), ones(2, 24, 10), ones(2, 8, 10), ones(2, 8, 10)),
    *(ones(2, 10, 24), ones(2, 10), ones(2, 14, 10), ones(2, 14, 10), ones(2, 10, 14)),
]


@pytest.fixture(scope="module")
def layers(jax: ModuleType) -> Callable[..., Any]:
    """A good call of precast.layers, two sequences of four tokens, with what is given put in its place."""

    def run(**changed: Any) -> Any:
        good: dict[str, Any] = {
            "x": ones(8, 10),
            "used": np.int32(8),
            "cos": ones(2, 4, 2),
            "sin": np.zeros((2, 4, 2), F32),
            "caches": [np.zeros(LAYERS_CACHE, F32)] * 2,
            "slots": np.int32([2, 0]),
            "starts": np.int32([5, 0]),
            "lengths": np.int32([4, 3]),
            "weights": WEIGHTS,
            "layers": 2,
            "heads": (6, 2, 4),
            "steps": STEPS,
            "outs": OUTS,
            "numbers": (1e-5, 0, 0.5, 0, 0, 0, 0, 0, 0, 0),
            "y": (8, 10),
            "results": None,
            "aliases": None,
        }
        assert changed.keys() <= good.keys()
        c = SimpleNamespace(**(good | changed))
        shapes = [(a.shape, a.dtype) for a in c.caches] if c.results is None else c.results
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in ((c.y, F32), *shapes)]
        own = {4 + i: 1 + i for i in range(len(c.caches))}
        aliases = own if c.aliases is None else c.aliases
        call = jax.ffi.ffi_call("precast.layers.v1", results, input_output_aliases=aliases)
        return call(
            *(c.x, c.used, c.cos, c.sin, *c.caches, c.slots, c.starts, c.lengths, *c.weights),
            layers=np.int64(c.layers),
            heads=np.array(c.heads, np.int64),
            steps=np.array([code for step in c.steps for code in step], np.int64),
            outs=np.array(c.outs, np.int64),
            numbers=np.array(c.numbers, F32),
        )

    return run


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


HEADS = "expected heads to be N, K and H, N a multiple of K"
CODES = "expected layers, and steps of eight integers and two numbers each"
WIDTHS = "a linear step whose widths do not fit together"
SCALED = "int8 caches come with key and value scales, others without"
THESE = "are not of 2 layers and these heads"
BAD_LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    # Widths of nothing: no operand would bound the others.
    "no width": ({"x": ones(8, 0), "y": (8, 0)}, "x [8, 0], result [8, 0]"),
    "a width of nothing": ({"outs": [0, *OUTS[1:]]}, WIDTHS),
    "a huge width": ({"outs": [2**60, *OUTS[1:]]}, "weights of shape"),
    "no slots": (cache_of(2, 0, 2, 9, 4), "of no slots or no positions"),
    "no positions": (cache_of(2, 3, 2, 0, 4), "of no slots or no positions"),
    # Step codes, and the values they name.
    "unknown kind": (with_step(1, at0=2), "step of unknown kind 2"),
    "negative kind": (with_step(0, at0=-1), "step of unknown kind -1"),
    "no steps": ({"steps": [], "numbers": ()}, CODES),
    "seven integers": ({"steps": [*STEPS[:-1], DOWN[:-1]]}, CODES),
    "too few numbers": ({"numbers": (0,) * 9}, CODES),
    "too many numbers": ({"numbers": (0,) * 12}, CODES),
    "its own result": (with_step(0, at1=1), "value 1 is not known yet"),
    "a later value": (with_step(2, at1=6), "value 6 is not known yet"),
    "a negative value": (with_step(2, at1=-1), "value -1 is not known yet"),
    "a huge value": (with_step(2, at1=2**62), f"value {2**62} is not known yet"),
    "an unknown residual": (with_step(2, at2=5), "value 5 is not known yet"),
    "a negative residual": (with_step(2, at2=-2), "value -2 is not known yet"),
    "unknown q": (with_step(1, at1=4), "value 4 is not known yet"),
    "unknown v": (with_step(1, at3=-1), "value -1 is not known yet"),
    "q of k's width": (with_step(1, at1=2), "attention of values that are not heads wide"),
    "k of q's width": (with_step(1, at2=1), "attention of values that are not heads wide"),
    "v of x's width": (with_step(1, at3=0), "attention of values that are not heads wide"),
    "negative window": (with_step(1, at4=-1), "a window and a finite soft_cap of at least 0, found -1"),
    "negative cap": ({"numbers": (0, 0, 1, -2, *(0,) * 6)}, "finite soft_cap of at least 0, found 0 and -2"),
    "infinite cap": ({"numbers": (0, 0, 1, np.inf, *(0,) * 6)}, "finite soft_cap of at least 0"),
    "unknown gate": (with_step(3, at5=3), "a linear step with gate 3 and 2 weights"),
    "negative gate": (with_step(3, at5=-1), "a linear step with gate -1 and 2 weights"),
    "gate of one": (with_step(2, at5=1), "a linear step with gate 1 and 1 weights"),
    "gate of three": (with_step(0, at5=2), "a linear step with gate 2 and 3 weights"),
    "no weights": (with_step(2, at6=0), "a linear step with gate 0 and 0 weights"),
    "negative weights": (with_step(2, at6=-1), "a linear step with gate 0 and -1 weights"),
    "more weights than widths": (with_step(4, at6=2), "a linear step with gate 0 and 2 weights"),
    "more weights than any": ({**with_step(0, at6=65), "outs": (8,) * 99}, "gate 0 and 65 weights"),
    "residual of three": (with_step(0, at2=0), "a linear step with gate 0 and 3 weights"),
    # Widths.
    "too few widths": ({"outs": OUTS[:-1]}, "a linear step with gate 0 and 1 weights"),
    "too many widths": ({"outs": (*OUTS, 3)}, "more widths than the steps have weights"),
    "negative width": ({"outs": (24, -8, *OUTS[2:])}, WIDTHS),
    "gate of two widths": ({"outs": (*OUTS[:5], 15, 10)}, WIDTHS),
    "residual of another width": (with_step(2, at2=1), WIDTHS),
    "result of another width": (
        {**with_step(4, at2=-1), **with_weight(8, ones(2, 9, 14)), "outs": (*OUTS[:-1], 9)},
        "the last step's result is not as wide as what a layer is given",
    ),
    "weights of another width": ({"outs": (24, 8, 8, 10, 15, 15, 10)}, "weights of shape [2, 14, 10]"),
    # Operands.
    "norm of another width": (with_weight(0, ones(2, 11)), "norm of shape [2, 11]"),
    "norm of one layer": (with_weight(0, ones(1, 10)), "layer 1 of norm [1, 10]"),
    "weights of one layer": (with_weight(4, ones(1, 10, 24)), "layer 1 of weights [1, 10, 24]"),
    "weights of other inputs": (with_weight(8, ones(2, 10, 13)), "weights of shape [2, 10, 13]"),
    "bias of another width": (with_weight(5, ones(2, 9)), "bias of shape [2, 9]"),
    "float16 weights": (
        with_weight(4, np.ones((2, 10, 24), np.float16)),
        "weights of a type that is not known",
    ),
    "int8 without its scale": (with_weight(4, np.ones((2, 1, 16, 16, 2), np.int8)), "scale of shape [2, 10]"),
    "an operand too few": (with_weight(8, None), "too few operands"),
    "no operands": ({"weights": []}, "operand norm is missing"),
    "an operand too many": ({"weights": [*WEIGHTS, ones(2, 10)]}, "more operands than the steps take"),
    # Rows, angles and heads.
    "more true rows than rows": ({"used": np.int32(9)}, "9 true rows of x [8, 10]"),
    "negative true rows": ({"used": np.int32(-1)}, "-1 true rows of x [8, 10]"),
    "tokens behind the true rows": (
        {"used": np.int32(6)},
        "sequence 1 of length 3 ends behind the 6 true rows",
    ),
    "rows of the angles": ({"cos": ones(3, 4, 2), "sin": ones(3, 4, 2)}, "do not fit together"),
    "cos and sin that differ": (
        {"cos": ones(2, 4, 1)},
        "cos [2, 4, 1] and sin [2, 4, 2] do not fit together",
    ),
    "more pairs than half a head": ({"cos": ones(2, 4, 3), "sin": ones(2, 4, 3)}, "do not fit together"),
    "rows of the result": ({"y": (7, 10)}, "result [7, 10], cos"),
    "width of the result": ({"y": (8, 11)}, "result [8, 11], cos"),
    "two heads": ({"heads": (6, 2)}, HEADS),
    "heads not a multiple": ({"heads": (6, 4, 4)}, HEADS),
    "no key heads": ({"heads": (6, 0, 4)}, HEADS),
    "no query heads": ({"heads": (0, 2, 4)}, HEADS),
    "negative heads": ({"heads": (-6, -2, 4)}, HEADS),
    "negative head dimension": ({"heads": (6, 2, -4)}, HEADS),
    "other query heads": ({"heads": (4, 2, 4)}, "attention of values that are not heads wide"),
    "other key heads": ({"heads": (6, 3, 4)}, THESE),
    "other head dimension": ({"heads": (6, 2, 5)}, THESE),
    "other layers": ({"layers": 3}, "are not of 3 layers and these heads"),
    "no layers": ({"layers": 0, **cache_of(0, 3, 2, 9, 4)}, CODES),
    "negative layers": ({"layers": -1}, "are not of -1 layers"),
    # Caches.
    "layers of the caches": (cache_of(3, 3, 2, 9, 4), THESE),
    "heads of the caches": (cache_of(2, 3, 1, 9, 4), THESE),
    "head dimension of the caches": (cache_of(2, 3, 2, 9, 3), THESE),
    "fewer positions for values": (
        {"caches": [np.zeros(LAYERS_CACHE, F32), np.zeros((2, 3, 2, 8, 4), F32)]},
        "caches [2, 3, 2, 9, 4] and [2, 3, 2, 8, 4] " + THESE,
    ),
    "fewer slots for values": (
        {"caches": [np.zeros(LAYERS_CACHE, F32), np.zeros((2, 2, 2, 9, 4), F32)]},
        THESE,
    ),
    "shorter values": ({"caches": [np.zeros(LAYERS_CACHE, F32), np.zeros((2, 3, 2, 9, 3), F32)]}, THESE),
    "caches of four axes": (cache_of(3, 2, 9, 4), CACHE),
    "float16 caches": ({"caches": [np.zeros(LAYERS_CACHE, np.float16)] * 2}, CACHE),
    "bfloat16 keys alone": (
        {"caches": [np.zeros(LAYERS_CACHE, ml_dtypes.bfloat16), np.zeros(LAYERS_CACHE, F32)]},
        CACHE,
    ),
    "int8 without scales": ({"caches": LAYERS_INT8[:2]}, SCALED),
    "scales without int8": ({"caches": [np.zeros(LAYERS_CACHE, F32)] * 2 + LAYERS_INT8[2:]}, SCALED),
    "one cache": ({"caches": LAYERS_INT8[:1]}, "expected 2 caches, or 4 with scales, as results"),
    "one scale": ({"caches": LAYERS_INT8[:3]}, "expected 2 caches, or 4 with scales, as results"),
    "scales of another shape": (
        {"caches": [*LAYERS_INT8[:3], ones(2, 3, 2, 8)]},
        "expected float32 scales [L, B, K, S] of caches [2, 3, 2, 9, 4], found [2, 3, 2, 8]",
    ),
    "float16 scales": (
        {"caches": [*LAYERS_INT8[:3], np.ones(LAYERS_CACHE[:-1], np.float16)]},
        "expected float32 scales",
    ),
    "no aliases": ({"aliases": {}}, "the cache results must alias the cache arguments"),
    "keys alone aliased": ({"aliases": {4: 1}}, "the cache results must alias the cache arguments"),
    "scales not aliased": (
        {"caches": LAYERS_INT8, "aliases": {4: 1, 5: 2, 6: 3}},
        "the cache results must alias the cache arguments",
    ),
    "results of another shape": (
        {"results": [(LAYERS_CACHE, F32), ((2, 3, 2, 10, 4), F32)], "aliases": {4: 1}},
        "cache result 1 [2, 3, 2, 10, 4] is not as its argument [2, 3, 2, 9, 4]",
    ),
    "results of another type": (
        {"results": [(LAYERS_CACHE, np.int32), (LAYERS_CACHE, F32)], "aliases": {}},
        "cache result 0",
    ),
    # Places in the caches.
    "slot too high": ({"slots": np.int32([2, 3])}, "sequence 1 of slot 3, start 0 and length 3 does not fit"),
    "slot negative": ({"slots": np.int32([-1, 0])}, "sequence 0 of slot -1"),
    "slot twice": ({"slots": np.int32([2, 2])}, "two sequences in slot 2"),
    "behind the capacity": ({"starts": np.int32([6, 0])}, "start 6 and length 4 does not fit 3 slots of 9"),
    "start negative": ({"starts": np.int32([5, -1])}, "start -1 and length 3 does not fit"),
    "length negative": ({"lengths": np.int32([4, -1])}, "length -1 does not fit"),
    "more than its tokens": ({"lengths": np.int32([5, 3])}, "length 5 does not fit"),
    "too few slots": ({"slots": np.int32([2])}, "slots, starts or lengths of shape [1]"),
    "too many lengths": ({"lengths": np.int32([2, 1, 1])}, "slots, starts or lengths of shape [3]"),
    "float starts": ({"starts": F32([5, 0])}, "slots, starts or lengths of shape [2] or of its type"),
    # What comes first, whose types XLA checks.
    "bfloat16 x": ({"x": np.ones((8, 10), ml_dtypes.bfloat16)}, "BF16"),
    "x of three axes": ({"x": ones(2, 4, 10)}, "rank"),
    "cos of two axes": ({"cos": ones(8, 2)}, "rank"),
    "used of one axis": ({"used": np.int32([8])}, "rank"),
}


@pytest.mark.parametrize(("changed", "text"), BAD_LAYERS.values(), ids=BAD_LAYERS.keys())
def test_layers_refuse(
    layers: Callable[..., Any], refusal: Callable[..., str], changed: dict[str, Any], text: str
) -> None:
    assert text in refusal(lambda: layers(**changed))
