"""Dequantise weights in the formats of bitsandbytes.

- 4 bits (NF4, FP4): ``weight`` is uint8 ``[n/2, 1]``. A byte contains two indices into ``quant_map [16]``, the first in
  the high half. Blocks of consecutive weights, across rows, have a factor each: ``absmax``, float32 ``[blocks]``. The
  tensor ``quant_state.bitsandbytes__nf4`` contains JSON with the shape and the size of a block. With double
  quantisation, ``absmax`` is uint8: indices into ``nested_quant_map [256]``, whose values are multiplied by a factor
  for each block of ``nested_absmax``; then ``nested_offset`` is added.
- 8 bits: ``weight`` is int8 ``[out, in]``, and ``SCB [out]`` is the largest magnitude of each row.

The library rounds each weight to float16 or bfloat16; precast does not.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np

from ..base import SourceTensor
from .parts import Parts, RawTensor

_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
_INT8_MAX = 127


def four_bits(parts: Parts) -> SourceTensor:
    """Return a weight in NF4 or FP4.

    Raises:
        PrecastError: a tensor is missing, or has the wrong type or shape.
    """
    weight, absmax = parts.take(".weight", ("U8",), None), parts.take(".weight.absmax", ("F32", "U8"), 1)
    values = parts.take(".weight.quant_map", ("F32",), 1)
    found = [each for name in _STATES if (each := parts.find(name, ("U8",), 1)) is not None]
    outs, inputs, size, state = _read_state(parts, found)
    count = outs * inputs
    if (
        absmax.shape != (-(-count // size),)
        or int(np.prod(weight.shape)) != -(-count // 2)
        or values.shape != (16,)
    ):
        raise parts.fail(
            f"expected {-(-count // 2)} bytes in blocks of {size} weights, found {int(np.prod(weight.shape))} bytes and"
            f" {absmax.shape[0]} blocks"
        )
    factors = absmax.read if absmax.dtype == "F32" else _nested(parts, absmax, state)

    def read() -> np.ndarray:
        packed = weight.read().reshape(-1)
        numbers = values.read()[np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]]
        numbers *= np.repeat(factors(), size)[:count]
        return numbers.reshape(outs, inputs)

    return SourceTensor(shape=(outs, inputs), dtype="bitsandbytes, 4 bits", read=read)


def _read_state(parts: Parts, found: list[RawTensor]) -> tuple[int, int, int, Mapping[str, object]]:
    """Return the outputs, the inputs and the size of a block that the JSON states, and the whole JSON."""
    state: Mapping[str, object] = {}
    if found:
        with suppress(ValueError):
            state = json.loads(found[0].read().tobytes())
    match state:
        case {"shape": [int(outs), int(inputs)], "blocksize": int(size)} if min(outs, inputs, size) > 0:
            return outs, inputs, size, state
    raise parts.fail("expected quant_state to contain the shape of a matrix and a blocksize, found neither")


def _nested(parts: Parts, absmax: RawTensor, state: Mapping[str, object]) -> Callable[[], np.ndarray]:
    """Return a function that returns the factors, which are quantised too."""
    values, scales = (
        parts.take(f".weight.{name}", ("F32",), 1) for name in ("nested_quant_map", "nested_absmax")
    )
    match state:
        case {"nested_blocksize": int(size), "nested_offset": float(offset) | int(offset)} if (
            size > 0 and scales.shape == (-(-absmax.shape[0] // size),) and values.shape == (256,)
        ):
            return lambda: (
                values.read()[absmax.read()] * np.repeat(scales.read(), size)[: absmax.shape[0]]
                + np.float32(offset)
            )
    raise parts.fail(
        "expected nested_absmax, nested_blocksize and nested_offset for all factors, found others"
    )


def eight_bits(parts: Parts) -> SourceTensor:
    """Return a weight in 8 bits.

    Raises:
        PrecastError: a tensor is missing, or has the wrong type or shape.
    """
    weight, largest = parts.take(".weight", ("I8",)), parts.take(".SCB", ("F32",), 1)
    order = parts.find(".weight_format", ("U8",), None)
    if largest.shape != weight.shape[:1] or (order is not None and order.read().any()):
        raise parts.fail(f"expected SCB [{weight.shape[0]}] and rows in order, found {list(largest.shape)}")

    def read() -> np.ndarray:
        scales = largest.read() * np.float32(1 / _INT8_MAX)
        return weight.read().astype(np.float32) * scales[:, None]

    return SourceTensor(shape=weight.shape, dtype="bitsandbytes, 8 bits", read=read)
