"""Invalid calls of precast.linear, precast.embed and precast.argmax: the handler names the error before it runs."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

F32 = np.float32


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, F32)


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


@pytest.mark.parametrize(("name", "place"), [("int8", 1), ("int4", 1)])
@pytest.mark.parametrize("dtype", [F32, ml_dtypes.bfloat16, np.uint16])
def test_linear_refuses_types_of_scales(
    linear: Callable[..., Any], refusal: Callable[..., str], name: str, place: int, dtype: Any
) -> None:
    arrays = stored(name)
    arrays[place] = arrays[place].astype(dtype)
    text = refusal(lambda: linear(X, 0, [arrays], [20]))
    assert f"linear: {expected_part(name, place)}, found {np.dtype(dtype)} [2, 2, 2, 16]" in text


@pytest.mark.parametrize("dtype", [F32, ml_dtypes.bfloat16, np.uint16])
def test_linear_refuses_types_of_minima(
    linear: Callable[..., Any], refusal: Callable[..., str], dtype: Any
) -> None:
    """Weights without minima are valid, so an array of another type is an operand too many."""
    arrays = stored("int4")
    arrays[2] = arrays[2].astype(dtype)
    text = refusal(lambda: linear(X, 0, [arrays], [20]))
    assert "linear: more operands than weights, biases, norm and residual take" in text


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
    "a minimum of other groups": (
        {"weights": [[*stored("int4")[:2], stored("int4")[2][:, :, :1]]]},
        "minimum: expected float16 [L, 2, 2, 16], found float16 [2, 2, 1, 16]",
    ),
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
    call = jax.ffi.ffi_call("precast.argmax.v2", jax.ShapeDtypeStruct((results,), np.int32))
    assert text in refusal(lambda: call(np.zeros(shape, F32), np.int32(0)))


@pytest.mark.parametrize("used", [-1, 3])
def test_argmax_refuses_more_or_less_rows(jax: ModuleType, refusal: Callable[..., str], used: int) -> None:
    call = jax.ffi.ffi_call("precast.argmax.v2", jax.ShapeDtypeStruct((2,), np.int32))
    text = refusal(lambda: call(np.zeros((2, 3), F32), np.int32(used)))
    assert f"argmax: expected 0 to 2 true rows, found {used}" in text


def test_argmax_refuses_other_numbers(jax: ModuleType, refusal: Callable[..., str]) -> None:
    call = jax.ffi.ffi_call("precast.argmax.v2", jax.ShapeDtypeStruct((2,), np.int32))
    assert "F32" in refusal(lambda: call(np.zeros((2, 3), np.int32), np.int32(2)))
    call = jax.ffi.ffi_call("precast.argmax.v2", jax.ShapeDtypeStruct((2,), F32))
    assert "S32" in refusal(lambda: call(np.zeros((2, 3), F32), np.int32(2)))


def test_embed_refuses_results(jax: ModuleType, refusal: Callable[..., str]) -> None:
    call = jax.ffi.ffi_call("precast.embed.v1", jax.ShapeDtypeStruct((3, 40), F32))
    text = refusal(lambda: call(np.int32([0, 1]), TABLE, vocab=np.int64(20)))
    assert (
        "embed: expected a result for each of 2 tokens and a vocabulary of at least 0, found [3, 40] and 20"
        in text
    )
    assert "S32" in refusal(lambda: call(np.int32([0, 1, 2]), TABLE, vocab=np.int32(21)))


# Each layer of 20 outputs of 40 inputs takes two panels: of 9 units in q4_0, and of 17 in q8_0.
@pytest.mark.parametrize(
    ("table", "what"),
    [
        ([[2, 18], [0, 0]], "entry 1 has the unknown format 0"),
        ([[2, 18], [13, 0]], "entry 1 has the unknown format 13; update precast"),
        ([[-1, 0], [2, 0]], "entry 0 has the unknown format -1"),
        ([[2, 19], [2, 0]], "entry 0 at unit 19 ends beyond the 36 units"),
        ([[2, -1], [2, 0]], "entry 0 at unit -1 ends beyond the 36 units"),
        ([[2, 0], [2, 2**31 - 1]], f"entry 1 at unit {2**31 - 1} ends beyond the 36 units"),
        ([[2, 0], [1, 3]], "entry 1 at unit 3 ends beyond the 36 units"),
    ],
)
def test_linear_refuses_tables_of_mixed_weights(
    linear: Callable[..., Any], refusal: Callable[..., str], table: list[list[int]], what: str
) -> None:
    values = np.zeros((36, 64), np.uint8)
    good = np.int32([[2, 18], [2, 0]])
    assert np.all(linear(X, 1, [[values, good]], [20])[0] == 0.0)
    text = refusal(lambda: linear(X, 1, [[values, np.int32(table)]], [20]))
    assert f"linear: table of mixed weights: {what}" in text


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ([np.zeros((36, 63), np.uint8)], "mixed weights: expected uint8 [L, 64], found uint8 [36, 63]"),
        ([np.zeros((0, 64), np.uint8)], "mixed weights [0, 64]: no entry -1"),
        ([np.zeros((36, 64), np.uint8)], "operand table of mixed weights is missing"),
        (
            [np.zeros((36, 64), np.uint8), np.zeros((2, 2), F32)],
            "table of mixed weights: expected int32 [L, 2], found float32 [2, 2]",
        ),
        (
            [np.zeros((36, 64), np.uint8), np.zeros((2, 3), np.int32)],
            "table of mixed weights: expected int32 [L, 2], found int32 [2, 3]",
        ),
        (
            [np.zeros((36, 64), np.uint8), np.ones((1, 2), np.int32)],
            "table of mixed weights [1, 2]: no entry 1",
        ),
    ],
)
def test_linear_refuses_operands_of_mixed_weights(
    linear: Callable[..., Any], refusal: Callable[..., str], arrays: list[np.ndarray], what: str
) -> None:
    assert f"linear: {what}" in refusal(lambda: linear(X, 1, [arrays], [20]))


@pytest.mark.parametrize("vocab", [2**63 - 1, 2**63 - 16, 2**60, 577, 0])
def test_embed_refuses_a_vocabulary_that_the_units_cannot_hold(
    embed: Callable[..., Any], refusal: Callable[..., str], vocab: int
) -> None:
    arrays = [np.zeros((36, 64), np.uint8), np.int32([[2, 0]])]
    assert embed(np.int32([19]), arrays, 20, 40).shape == (1, 40)
    text = refusal(lambda: embed(np.int32([19]), arrays, vocab, 40))
    beyond = "table of mixed weights: entry 0 at unit 0 ends beyond the 36 units"
    whole = f"mixed weights: 36 units cannot hold {vocab} outputs of 40 inputs"
    assert f"embed: {beyond if vocab == 577 else whole}" in text
