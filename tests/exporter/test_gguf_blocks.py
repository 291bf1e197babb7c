"""Blocks of GGUF's quantised types: their weights equal those of the gguf library, bit for bit."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from precast.exporter.block_formats import BLOCK_FORMATS
from precast.exporter.models.tensors import split_rows
from precast.exporter.sources.gguf.blocks import read_blocks
from precast.exporter.sources.gguf.tensors import half_split_order
from precast.exporter.sources.open import open_source

# For each type, the offsets of the float16 coefficients in a block, in bytes.
HALVES = {
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "mxfp4": (),
}
KINDS = pytest.mark.parametrize("kind", HALVES)


def sizes(kind: str) -> tuple[int, int]:
    """Return the number of weights and the number of bytes in a block."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]


def random_rows(kind: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Return random bytes ``[rows, bytes]`` in which every float16 is finite; some are 0, subnormal or negative.

    The exponents of MXFP4 are 0 to 252, because greater ones can overflow float32.
    """
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * blocks, sizes(kind)[1]), np.uint8)
    for offset in HALVES[kind]:
        halves = rng.integers(0, 0x7C00, len(data)).astype("<u2")  # positive and finite
        halves[rng.random(len(data)) < 0.1] = 0
        subnormal = rng.random(len(data)) < 0.1
        halves[subnormal] &= 0x3FF
        halves |= rng.integers(0, 2, len(data)).astype("<u2") << 15
        data[:, offset : offset + 2] = halves[:, None].view(np.uint8)
    if kind == "mxfp4":
        data[:, 0] = rng.integers(0, 253, len(data))
        data[rng.random(len(data)) < 0.1, 0] = 0
    return data.reshape(rows, -1)


def expected(kind: str, data: np.ndarray) -> np.ndarray:
    return dequantize(data, GGMLQuantizationType[kind.upper()])


def assert_same_bits(found: np.ndarray, weights: np.ndarray) -> None:
    """Compare bits; the sum with 0 turns −0 into 0."""
    assert found.dtype == weights.dtype == np.float32
    np.testing.assert_array_equal((found + 0).view(np.uint32), (weights + 0).view(np.uint32))


@KINDS
@given(rows=st.integers(1, 40), blocks=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_random_bytes(decode_blocks, kind: str, rows: int, blocks: int, seed: int) -> None:
    data = random_rows(kind, rows, blocks, seed)
    order = np.random.default_rng(seed).permutation(rows)
    found = read_blocks(kind, data, blocks * sizes(kind)[0], order)
    assert found.format == kind
    assert_same_bits(decode_blocks(found), expected(kind, data[order]))


@KINDS
def test_arrays_are_as_the_format_takes_them(kind: str) -> None:
    columns = 3 * sizes(kind)[0]
    found = read_blocks(kind, random_rows(kind, 5, 3, 0), columns)
    form = BLOCK_FORMATS[kind]
    assert (found.codes.shape, found.codes.dtype) == ((5, columns), np.int8 if form.bits == 8 else np.uint8)
    assert [(c.shape, c.dtype) for c in found.coefficients] == [
        ((5, n), dtype) for n, dtype in form.coefficient_shapes(columns)
    ]


@KINDS
def test_more_rows_than_are_read_at_a_time(decode_blocks, kind: str) -> None:
    blocks = 4096 // sizes(kind)[0]
    data = random_rows(kind, 150, blocks, 1)
    assert_same_bits(decode_blocks(read_blocks(kind, data, 4096)), expected(kind, data))


@KINDS
def test_rows_of_q_are_reordered_and_rows_can_be_cut(gguf_spec, tiny, decode_blocks, tmp_path, kind: str):
    """The file has 256 inputs, because the blocks of the larger types contain 256 weights."""
    data = random_rows(kind, 256, 256 // sizes(kind)[0], 2)
    raw = {"blk.0.attn_q.weight": data}
    tensors = {name: tensor for name, tensor in gguf_spec().tensors.items() if name not in raw}
    spec = gguf_spec(tensors=tensors, raw={name: (each, kind.upper()) for name, each in raw.items()})
    tensor = open_source(str(spec.write(tmp_path))).tensors["model.layers.0.self_attn.q_proj.weight"]
    assert tensor.block_format == kind
    assert_same_bits(tensor.read(), expected(kind, data[half_split_order(256, tiny.dims["N"])]))
    assert_same_bits(decode_blocks(tensor.blocks()), tensor.read())
    parts = split_rows(tensor, {"first": 100, "second": 156})
    for part in parts.values():
        assert part.block_format == kind
        assert_same_bits(decode_blocks(part.blocks()), part.read())


def test_every_exponent(decode_blocks) -> None:
    """Exponents from 253 on overflow float32 in the same places; 0 and 1 are subnormal scales."""
    data = np.empty((256, 17), np.uint8)
    data[:, 0] = np.arange(256)
    data[:, 1:] = np.arange(16) * 17
    with np.errstate(over="ignore"):
        found = decode_blocks(read_blocks("mxfp4", data, 32))
        np.testing.assert_array_equal(found, expected("mxfp4", data))
    assert found[0].max() == 12 * 2.0**-128
    assert np.isfinite(found[:253]).all()


@KINDS
def test_blocks_of_zeros(decode_blocks, kind: str) -> None:
    data = np.zeros((3, 2 * sizes(kind)[1]), np.uint8)
    assert_same_bits(decode_blocks(read_blocks(kind, data, 2 * sizes(kind)[0])), expected(kind, data))


@pytest.mark.parametrize("kind", ["iq4_nl", "iq4_xs"])
def test_every_scale_with_every_code(decode_blocks, kind: str) -> None:
    """Every code, with each 6-bit scale of IQ4_XS."""
    data = np.zeros((64, sizes(kind)[1]), np.uint8)
    data[:, :2] = np.array([0.75], "<f2").view(np.uint8)
    data[:, -16:] = np.arange(16) * 16 + np.arange(16)[::-1]
    if kind == "iq4_xs":
        number = np.arange(64)
        data[:, 7], data[:, 3] = (number & 15) << 4, number >> 4 << 6  # of the last group
    found = decode_blocks(read_blocks(kind, data, sizes(kind)[0]))
    assert_same_bits(found, expected(kind, data))
    assert len(np.unique(found[:, -32:])) > (600 if kind == "iq4_xs" else 15)
