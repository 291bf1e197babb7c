"""Invalid calls of precast.attention: the handler names the error before it runs."""

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
