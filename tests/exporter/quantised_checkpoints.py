"""Weights of quantised checkpoints, packed number by number, as the documents of the formats describe."""

import json
from collections.abc import Sequence

import ml_dtypes
import numpy as np

FP8 = ml_dtypes.float8_e4m3fn
# The order in which AWQ stores eight consecutive outputs in the half bytes of an int32, from the lowest.
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)


def words(numbers: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Pack each row of numbers into int32, in the given order within a word, from the lowest bits."""
    per = 32 // bits
    order = range(per) if order is None else order
    rows = []
    for row in numbers:
        packed = []
        for start in range(0, len(row), per):
            part = [*(int(n) for n in row[start : start + per])]
            part += [0] * (per - len(part))
            packed.append(sum(part[k] << i * bits for i, k in enumerate(order)))
        rows.append(packed)
    return np.array(rows, np.uint64).astype(np.uint32).view(np.int32)


def random_affine(rng, outs: int, inputs: int, groups: int, bits: int):
    """Return numbers ``[out, in]``, zeros and scales ``[out, groups]``."""
    numbers = rng.integers(0, 1 << bits, (outs, inputs))
    zeros = rng.integers(1, 1 << bits, (outs, groups))
    scales = (rng.uniform(0.5, 2, (outs, groups)) / (8 << bits)).astype(np.float16)
    return numbers, zeros, scales


def affine(numbers, zeros, scales, group) -> np.ndarray:
    """Return the weights in float64."""
    return (numbers - zeros[:, group].astype(np.float64)) * scales[:, group].astype(np.float64)


def gptq(rng, outs, inputs, groups, bits, *, offset: int = 1, order: bool = False, size: int = 0):
    numbers, zeros, scales = random_affine(rng, outs, inputs, groups, bits)
    group = np.arange(inputs) // (size or inputs // groups)
    if order:
        group = rng.permutation(group)
    stored = {
        "qweight": np.ascontiguousarray(words(numbers, bits).T),
        "qzeros": words((zeros - offset).T, bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": group.astype(np.int32),
    }
    return stored, affine(numbers, zeros, scales, group)


def awq(rng, outs: int, inputs: int, groups: int):
    numbers, zeros, scales = random_affine(rng, outs, inputs, groups, 4)
    stored = {
        "qweight": words(numbers.T, 4, AWQ_OUTPUTS),
        "qzeros": words(zeros.T, 4, AWQ_OUTPUTS),
        "scales": np.ascontiguousarray(scales.T),
    }
    return stored, affine(numbers, zeros, scales, np.arange(inputs) // (inputs // groups))


def packed(
    rng,
    outs: int,
    inputs: int,
    groups: int,
    bits: int,
    *,
    symmetric: bool,
    order: bool = False,
    size: int = 0,
):
    numbers, zeros, scales = random_affine(rng, outs, inputs, groups, bits)
    group = np.arange(inputs) // (size or -(-inputs // groups))
    if symmetric:
        zeros[...] = 1 << bits - 1
    stored = {
        "weight_packed": words(numbers, bits),
        "weight_shape": np.array([outs, inputs], np.int64),
        "weight_scale": scales.astype(ml_dtypes.bfloat16),
    }
    if not symmetric:
        stored["weight_zero_point"] = np.ascontiguousarray(words(zeros.T, bits).T)
    if order:
        group = rng.permutation(group)
        stored["weight_g_idx"] = group.astype(np.int32)
    return stored, affine(numbers, zeros, stored["weight_scale"], group)


def fp8(rng, outs: int, inputs: int, block: tuple[int, int] | None, ending: str = "weight_scale_inv"):
    weight = rng.standard_normal((outs, inputs)).astype(FP8)
    rows, columns = block or (outs, inputs)
    scale = rng.uniform(0.5, 2, (-(-outs // rows), -(-inputs // columns))).astype(np.float32)
    each = np.repeat(np.repeat(scale, rows, 0), columns, 1)[:outs, :inputs]
    return {"weight": weight, ending: scale}, weight.astype(np.float64) * each


# The 16 values of NF4, from the QLoRA paper (https://arxiv.org/abs/2305.14314), as bitsandbytes stores them.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32)  # fmt: skip
BLOCK, NESTED_BLOCK = 64, 256


def nf4_state(outs: int, inputs: int, **others: object) -> np.ndarray:
    """Return the JSON that describes a weight in 4 bits, as uint8."""
    state = {"blocksize": BLOCK, "dtype": "bfloat16", "shape": [outs, inputs]} | others
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def nf4(rng, outs: int, inputs: int, *, nested: bool = False, kind: str = "nf4"):
    """Return the tensors of a weight in NF4, by the ends of their names, and the weight in float64."""
    codes = rng.integers(0, 16, outs * inputs + outs * inputs % 2)
    factors = rng.uniform(0.1, 2, -(-outs * inputs // BLOCK)).astype(np.float32)
    state: dict[str, object] = {"quant_type": kind}
    stored = {"weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None], "weight.quant_map": NF4}
    if nested:
        values, number = np.linspace(-1, 1, 256, dtype=np.float32), rng.integers(0, 256, len(factors))
        scales = rng.uniform(0.5, 1, -(-len(factors) // NESTED_BLOCK)).astype(np.float32)
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.125}
        factors = values[number] * np.repeat(scales, NESTED_BLOCK)[: len(factors)] + np.float32(0.125)
        stored |= {"weight.absmax": number.astype(np.uint8), "weight.nested_quant_map": values}
        stored["weight.nested_absmax"] = scales
    else:
        stored["weight.absmax"] = factors
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = nf4_state(outs, inputs, **state)
    count = outs * inputs
    weights = NF4[codes[:count]].astype(np.float64) * np.repeat(factors, BLOCK)[:count]
    return stored, weights.reshape(outs, inputs)
