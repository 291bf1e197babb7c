"""Tensors of GGUF files: names, values, quantised blocks and the order of rows."""

import tracemalloc

import numpy as np
import pytest

from precast.exporter.quantize import FORMATS
from precast.exporter.sources.open import open_source

EXACT = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    "blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
    "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
    "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Permute the rows of q or k one by one, as llama.cpp's converter does."""
    size = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                out[head * size + 2 * i + half] = rows[head * size + half * size // 2 + i]
    return out


def rotate_halves(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Apply RoPE to one head ``[H]``, as Hugging Face does."""
    first, second = np.split(x, 2)
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )


def rotate_neighbours(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Apply RoPE to one head ``[H]``, as llama.cpp does for the llama architecture."""
    pairs = (x[0::2] + 1j * x[1::2]) * np.exp(1j * angles)
    return np.stack([pairs.real, pairs.imag], axis=1).reshape(-1)


# --- tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_names_and_values(gguf_spec, tmp_path, architecture):
    spec = gguf_spec(architecture=architecture)
    source = open_source(str(spec.write(tmp_path)))
    assert len(source.tensors) == len(spec.tensors)
    for gguf_name, name in EXACT.items():
        tensor = source.tensors[name]
        assert tensor.shape == spec.tensors[gguf_name].shape
        assert tensor.dtype == "F32"
        np.testing.assert_array_equal(tensor.read(), spec.tensors[gguf_name], err_msg=name)


def test_rows_of_q_and_k_of_llama_are_reordered(gguf_spec, tiny, tmp_path):
    original = tiny.random_tensors(
        tiny.gguf_shapes() | {"blk.0.attn_q.bias": (256,), "blk.0.attn_k.bias": (128,)}
    )
    stored = dict(original)
    for name, tensor in original.items():
        if "attn_q" in name or "attn_k" in name:
            stored[name] = interleave(tensor, tiny.dims["N"] if "attn_q" in name else tiny.dims["K"])
            assert not np.array_equal(stored[name], tensor)
    tensors = open_source(str(gguf_spec(tensors=stored).write(tmp_path))).tensors
    for layer in range(tiny.dims["L"]):
        for part in "qk":
            np.testing.assert_array_equal(
                tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"].read(),
                original[f"blk.{layer}.attn_{part}.weight"],
            )
    for part in "qk":
        np.testing.assert_array_equal(
            tensors[f"model.layers.0.self_attn.{part}_proj.bias"].read(), original[f"blk.0.attn_{part}.bias"]
        )


def test_scores_with_either_rope_are_the_same(gguf_spec, tiny, tmp_path):
    """Reordering the rows is right because q·k is then the same under both forms of RoPE."""
    spec = gguf_spec()
    tensors = open_source(str(spec.write(tmp_path))).tensors
    x, y = np.random.default_rng(1).standard_normal((2, tiny.dims["D"]))
    size = tiny.dims["H"]
    angles = 5.0 * 10000.0 ** -(np.arange(0, size, 2) / size)
    for head in range(tiny.dims["K"]):
        rows = slice(head * size, (head + 1) * size)
        stored = [spec.tensors[f"blk.0.attn_{part}.weight"][rows] for part in "qk"]
        read = [tensors[f"model.layers.0.self_attn.{part}_proj.weight"].read()[rows] for part in "qk"]
        ours = rotate_halves(read[0] @ x, angles) @ rotate_halves(read[1] @ y, 2 * angles)
        theirs = rotate_neighbours(stored[0] @ x, angles) @ rotate_neighbours(stored[1] @ y, 2 * angles)
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_rows_of_qwen2_keep_their_order(gguf_spec, tiny, tmp_path):
    tensors = tiny.random_tensors(
        tiny.gguf_shapes()
        | {f"blk.0.attn_{part}.bias": (n,) for part, n in zip("qkv", (256, 128, 128), strict=True)}
    )
    source = open_source(str(gguf_spec(architecture="qwen2", tensors=tensors).write(tmp_path)))
    for part in "qkv":
        for kind in ("weight", "bias"):
            np.testing.assert_array_equal(
                source.tensors[f"model.layers.0.self_attn.{part}_proj.{kind}"].read(),
                tensors[f"blk.0.attn_{part}.{kind}"],
            )


def q4_0(blocks: np.ndarray) -> np.ndarray:
    """Decode 32 values in 18 bytes: a float16 scale, then 16 values in low nibbles and 16 in high ones."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
    return (np.concatenate([low, high], axis=1).astype(np.float32) - 8) * scale


def q4_1(blocks: np.ndarray) -> np.ndarray:
    """Decode Q4_1: Q4_0 with a float16 minimum after the scale in place of the offset of 8."""
    scale, least = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
    low, high = blocks[:, 4:] & 15, blocks[:, 4:] >> 4
    return np.concatenate([low, high], axis=1).astype(np.float32) * scale[:, None] + least[:, None]


def q8_0(blocks: np.ndarray) -> np.ndarray:
    """Decode 32 values in 34 bytes: a float16 scale, then int8."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * blocks[:, :2].copy().view(np.float16).astype(
        np.float32
    )


def q4_k(blocks: np.ndarray) -> np.ndarray:
    """Decode 256 values in 144 bytes: two float16 scales, 8 6-bit scales and minima, 128 bytes of nibbles."""
    out = np.empty((len(blocks), 256), np.float32)
    for row, block in enumerate(blocks):
        d, dmin = (float(value) for value in block[:4].copy().view(np.float16).astype(np.float32))
        six = block[4:16].astype(int)
        for j in range(8):
            if j < 4:
                scale, least = six[j] & 63, six[j + 4] & 63
            else:
                scale = (six[j + 4] & 15) | (six[j - 4] >> 6 << 4)
                least = (six[j + 4] >> 4) | (six[j] >> 6 << 4)
            nibbles = block[16 + j // 2 * 32 : 48 + j // 2 * 32] >> (4 * (j % 2)) & 15
            out[row, 32 * j : 32 * j + 32] = np.float32(d * scale) * nibbles - np.float32(dmin * least)
    return out


def random_blocks(rows: int, blocks: int, size: int, halves: int) -> np.ndarray:
    """Return random quantised bytes ``[rows, blocks * size]`` with moderate float16 coefficients in each block."""
    generator = np.random.default_rng(2)
    data = generator.integers(0, 256, (rows * blocks, size), np.uint8)
    scales = generator.uniform(0.01, 0.5, (rows * blocks, halves)).astype(np.float16)
    data[:, : 2 * halves] = scales.view(np.uint8)
    return data.reshape(rows, blocks * size)


@pytest.mark.parametrize(
    ("kind", "decode", "values", "size", "halves"),
    [
        ("Q4_0", q4_0, 32, 18, 1),
        ("Q4_1", q4_1, 32, 20, 2),
        ("Q8_0", q8_0, 32, 34, 1),
        ("Q4_K", q4_k, 256, 144, 2),
    ],
)
def test_quantised_values(gguf_spec, tiny, tmp_path, kind, decode, values, size, halves):
    """Values match decoders written from the layouts; rows of q are also reordered."""
    raw = {
        "blk.0.attn_q.weight": random_blocks(256, 256 // values, size, halves),
        "blk.0.ffn_up.weight": random_blocks(256, 256 // values, size, halves)[::-1].copy(),
    }
    tensors = {name: tensor for name, tensor in gguf_spec().tensors.items() if name not in raw}
    spec = gguf_spec(tensors=tensors, raw={name: (data, kind) for name, data in raw.items()})
    source = open_source(str(spec.write(tmp_path)))
    decoded = {name: decode(data.reshape(-1, size)).reshape(256, 256) for name, data in raw.items()}
    up, q = (
        source.tensors["model.layers.0.mlp.up_proj.weight"],
        source.tensors["model.layers.0.self_attn.q_proj.weight"],
    )
    assert (up.dtype, up.shape) == (kind, (256, 256))
    np.testing.assert_allclose(up.read(), decoded["blk.0.ffn_up.weight"], rtol=1e-6, atol=1e-6)
    again = interleave(q.read(), tiny.dims["N"])
    np.testing.assert_allclose(again, decoded["blk.0.attn_q.weight"], rtol=1e-6, atol=1e-6)


def in_format(name: str, tensor) -> np.ndarray:
    """Return a tensor's blocks in an artifact's format, dequantised."""
    return FORMATS[name].decode(FORMATS[name].repack(tensor.blocks()), *tensor.shape)


@pytest.mark.parametrize(
    ("kind", "size", "halves", "format_"),
    [
        ("Q8_0", 34, 1, "int8"),
        ("Q4_0", 18, 1, "int4"),
        ("Q4_0", 18, 1, "int4-symmetric"),
        ("Q4_0", 18, 1, "int8"),
        ("Q4_1", 20, 2, "int4"),
    ],
)
def test_blocks_equal_the_tensor(gguf_spec, tmp_path, kind, size, halves, format_):
    """Blocks equal the tensor to the bit, with reordered rows of q and k, over several slabs."""
    rows = {"token_embd": 1100, "blk.0.attn_q": 256, "blk.1.attn_k": 128, "blk.0.attn_v": 128}
    raw = {f"{name}.weight": random_blocks(count, 8, size, halves) for name, count in rows.items()}
    for data in raw.values():
        blocks = data.reshape(-1, size)
        blocks[::2, 1] |= 0x80  # half of the scales are negative, as in Q4_0
        if kind == "Q8_0":
            blocks[:, 2:][blocks[:, 2:] == 0x80] = 0x81  # no quantiser writes -128
    tensors = {name: tensor for name, tensor in gguf_spec().tensors.items() if name not in raw}
    spec = gguf_spec(tensors=tensors, raw={name: (data, kind) for name, data in raw.items()})
    source = open_source(str(spec.write(tmp_path)))
    names = (
        "embed_tokens",
        *(f"layers.{i}.self_attn.{part}_proj" for i, part in ((0, "q"), (1, "k"), (0, "v"))),
    )
    for name in names:
        tensor = source.tensors[f"model.{name}.weight"]
        found, read = in_format(format_, tensor), tensor.read()
        # Zeros may differ in sign: 0 · -d is -0, 8 · -d + 8d is +0.
        np.testing.assert_array_equal((found + 0).view(np.uint32), (read + 0).view(np.uint32), err_msg=name)


def test_rows_of_blocks_are_reordered(gguf_spec, tiny, tmp_path):
    """Compare with the tensor before quantisation, because both readers could make the same mistake."""
    original = gguf_spec().tensors["blk.0.attn_q.weight"]
    tensors = gguf_spec().tensors | {"blk.0.attn_q.weight": interleave(original, tiny.dims["N"])}
    spec = gguf_spec(tensors=tensors, types={"blk.0.attn_q.weight": "Q8_0"})
    tensor = open_source(str(spec.write(tmp_path))).tensors["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_allclose(in_format("int8", tensor), original, atol=0.03)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "TQ1_0", "TQ2_0"])
def test_other_types_have_no_blocks(gguf_spec, tmp_path, kind):
    spec = gguf_spec(types={"blk.0.ffn_up.weight": kind})
    tensor = open_source(str(spec.write(tmp_path))).tensors["model.layers.0.mlp.up_proj.weight"]
    assert tensor.block_format is None
    assert tensor.blocks is None


def test_a_quantised_vector_has_no_blocks(gguf_spec, tmp_path):
    spec = gguf_spec(types={"output_norm.weight": "Q8_0"})
    tensor = open_source(str(spec.write(tmp_path))).tensors["model.norm.weight"]
    assert tensor.block_format is None
    assert tensor.blocks is None


def test_blocks_with_minus_128_are_requantised(gguf_spec, tmp_path):
    """The format int8 holds -127 to 127, so blocks with -128 cannot be kept as they are stored."""
    data = random_blocks(256, 8, 34, 1)
    data.reshape(-1, 34)[5, 9] = 0x80
    tensors = {name: t for name, t in gguf_spec().tensors.items() if name != "blk.0.ffn_up.weight"}
    spec = gguf_spec(tensors=tensors, raw={"blk.0.ffn_up.weight": (data, "Q8_0")})
    tensor = open_source(str(spec.write(tmp_path))).tensors["model.layers.0.mlp.up_proj.weight"]
    assert tensor.blocks().codes.min() == -128
    assert FORMATS["int8"].repack(tensor.blocks()) is None


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"])
def test_every_other_type_that_can_be_written(gguf_spec, tiny, tmp_path, kind):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    spec = gguf_spec(
        types={"blk.0.attn_k.weight": kind, "blk.0.ffn_up.weight": kind, "output_norm.weight": "F32"}
    )
    tensors = open_source(str(spec.write(tmp_path))).tensors
    whole = {
        name: dequantize(quantize(spec.tensors[name], GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
        for name in ("blk.0.attn_k.weight", "blk.0.ffn_up.weight")
    }
    np.testing.assert_array_equal(
        tensors["model.layers.0.mlp.up_proj.weight"].read(), whole["blk.0.ffn_up.weight"]
    )
    again = interleave(tensors["model.layers.0.self_attn.k_proj.weight"].read(), tiny.dims["K"])
    np.testing.assert_array_equal(again, whole["blk.0.attn_k.weight"])


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_bias_of_half_precision(gguf_spec, tiny, tmp_path, kind):
    bias = np.arange(256, dtype=np.float32)
    spec = gguf_spec(
        tensors=gguf_spec().tensors | {"blk.0.attn_q.bias": bias}, types={"blk.0.attn_q.bias": kind}
    )
    read = open_source(str(spec.write(tmp_path))).tensors["model.layers.0.self_attn.q_proj.bias"].read()
    np.testing.assert_array_equal(interleave(read, tiny.dims["N"]), bias)


def test_the_caller_owns_what_it_reads(gguf_spec, tmp_path):
    tensors = open_source(str(gguf_spec().write(tmp_path))).tensors
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        first = tensors[name].read()
        before = first.copy()
        first[:] = 7
        np.testing.assert_array_equal(tensors[name].read(), before)


@pytest.mark.parametrize("part", ["embed_tokens", "layers.0.self_attn.q_proj"])
def test_reading_needs_little_more_than_the_result(gguf_spec, tiny, tmp_path, part):
    shapes = tiny.gguf_shapes() | {"token_embd.weight": (16384, 256), "blk.0.attn_q.weight": (16384, 256)}
    tensors = tiny.random_tensors(shapes)
    spec = gguf_spec(tensors=tensors, types={"token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q8_0"})
    tensor = open_source(str(spec.write(tmp_path))).tensors[f"model.{part}.weight"]
    tensor.read()
    tracemalloc.start()
    try:
        tensor.read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (4 + 34 / 32) * 16384 * 256
