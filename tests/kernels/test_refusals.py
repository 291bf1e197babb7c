"""Calls that do not make sense: the handlers say what is wrong, and never touch memory that is not theirs."""

from collections.abc import Callable
from types import ModuleType
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


def arrays(**changed: np.ndarray) -> list[np.ndarray]:
    """A good call of precast.attention: two sequences of four tokens, with what is given put in its place."""
    cache = (2, 3, 2, 9, 8)  # [L, B, K, S, H]
    good: dict[str, Any] = {
        "q": np.ones((2, 4, 6, 8), F32),
        "k": np.ones((2, 4, 2, 8), F32),
        "v": np.ones((2, 4, 2, 8), F32),
        "keys": np.zeros(cache, F32),
        "values": np.zeros(cache, F32),
        "layer": 1,
        "slots": (2, 0),
        "starts": (5, 0),
        "lengths": (4, 3),
    }
    assert changed.keys() <= good.keys()
    return [*(good | changed).values()]


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, F32)


def test_the_good_call_is_taken(attention: Callable[..., Any]) -> None:
    out, *_ = attention(*arrays(), scale=1.0)
    assert np.all(out[1, :3] == 1.0)


FIT = "do not fit together"
CACHE = "expected float32 caches of 5 axes [L, B, K, S, H]"
ROWS = "expected slots, starts and lengths of shape [2]"
BAD_ATTENTION = {
    "layer too high": ({"layer": 2}, "layer 2 of [2, 3, 2, 9, 8]"),
    "layer negative": ({"layer": -1}, "layer -1 of [2, 3, 2, 9, 8]"),
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
    "bfloat16 cache": ({"keys": np.zeros((2, 3, 2, 9, 8), ml_dtypes.bfloat16)}, CACHE),
    "integer cache": ({"values": np.zeros((2, 3, 2, 9, 8), np.int32)}, CACHE),
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


@pytest.mark.parametrize("aliases", [{}, {3: 1}, {4: 2}])
def test_attention_refuses_caches_that_are_not_aliased(
    attention: Callable[..., Any], refusal: Callable[..., str], aliases: dict[int, int]
) -> None:
    text = refusal(lambda: attention(*arrays(), scale=1.0, aliases=aliases))
    assert "the cache results must alias the cache arguments" in text


def test_attention_refuses_a_scale_that_is_not_float32(jax: ModuleType, refusal: Callable[..., str]) -> None:
    given = [a if isinstance(a, np.ndarray) else np.asarray(a, np.int32) for a in arrays()]
    results = [jax.ShapeDtypeStruct(given[i].shape, F32) for i in (0, 3, 4)]
    call = jax.ffi.ffi_call("precast.attention.v1", results, input_output_aliases={3: 1, 4: 2})
    assert "expected F32 but got F64" in refusal(lambda: call(*given, scale=np.float64(1.0)))
    # Another number: to jax an attribute of one is the same attribute, whatever its type.
    assert "expected F32 but got S32" in refusal(lambda: call(*given, scale=np.int32(2)))
    assert "scale" in refusal(lambda: call(*given, scal=np.float32(1.0)))
    assert "expected 1 but got 2" in refusal(
        lambda: call(*given, scale=np.float32(1.0), softcap=np.float32(1.0))
    )


BAD_MATMUL = {
    "layer too high": ((ones(3, 5), 2, [ones(2, 4, 5)]), "layer 2 of weights [2, 4, 5]"),
    "layer negative": ((ones(3, 5), -1, [ones(2, 4, 5)]), "layer -1 of weights [2, 4, 5]"),
    "layer of the second": ((ones(3, 5), 1, [ones(2, 4, 5), ones(1, 4, 5)]), "layer 1 of weights [1, 4, 5]"),
    "no layers": ((ones(3, 5), 0, [ones(0, 4, 5)]), "layer 0 of weights [0, 4, 5]"),
    "wrong in": ((ones(3, 5), 0, [ones(2, 4, 6)]), "x [3, 5], weights [2, 4, 6] and result [3, 4]"),
    "wrong in of the second": ((ones(3, 5), 0, [ones(2, 4, 5), ones(2, 4, 6)]), "weights [2, 4, 6]"),
    "weights of two axes": ((ones(3, 5), 0, [ones(4, 5)]), "expected float32 weights of 3 axes"),
    "bfloat16 weights": ((ones(3, 5), 0, [np.ones((2, 4, 5), ml_dtypes.bfloat16)]), "at place 0"),
    "int8 weights": ((ones(3, 5), 0, [ones(2, 4, 5), np.ones((2, 4, 5), np.int8)]), "at place 1"),
    "float16 x": ((np.ones((3, 5), np.float16), 0, [ones(2, 4, 5)]), "F16"),
    "x of three axes": ((ones(1, 3, 5), 0, [ones(2, 4, 5)]), "rank"),
    "more true rows than rows": ((ones(3, 5), 0, [ones(2, 4, 5)], 4), "4 true rows of x [3, 5]"),
    "negative true rows": ((ones(3, 5), 0, [ones(2, 4, 5)], -1), "-1 true rows of x [3, 5]"),
}


@pytest.mark.parametrize(("given", "text"), BAD_MATMUL.values(), ids=BAD_MATMUL.keys())
def test_matmul_refuses(
    matmul: Callable[..., Any], refusal: Callable[..., str], given: tuple[Any, ...], text: str
) -> None:
    assert text in refusal(lambda: matmul(*given))


@pytest.mark.parametrize(
    ("weights", "results", "text"),
    [
        (1, [(3, 5)], "x [3, 5], weights [2, 4, 5] and result [3, 5] do not fit together"),
        (1, [(2, 4)], "and result [2, 4] do not fit together"),
        (1, [(4,)], "results of 2 axes at place 0"),
        (1, [], "at least one, found 0 and 1"),
        (1, [(3, 4), (3, 4)], "at least one, found 2 and 1"),
        (0, [], "at least one, found 0 and 0"),
    ],
)
def test_matmul_refuses_results(
    jax: ModuleType, refusal: Callable[..., str], weights: int, results: list[tuple[int, ...]], text: str
) -> None:
    shapes = [jax.ShapeDtypeStruct(shape, F32) for shape in results]
    # Nobody would use the results of a call without any: it must count as having an effect to be made at all.
    call = jax.ffi.ffi_call("precast.matmul.v1", shapes, has_side_effect=True)
    assert text in refusal(lambda: call(ones(3, 5), np.int32(0), np.int32(3), *[ones(2, 4, 5)] * weights))


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_64_bit_x(jax: ModuleType, refusal: Callable[..., str], dtype: type) -> None:
    with jax.enable_x64(True):
        call = jax.ffi.ffi_call("precast.matmul.v1", [jax.ShapeDtypeStruct((3, 4), F32)])
        x = np.ones((3, 5), dtype)
        found = "F64" if dtype is np.float64 else "S64"
        assert f"got {found}" in refusal(lambda: call(x, np.int32(0), np.int32(3), ones(2, 4, 5)))
