"""GGUF files: values, names, the order of rows, config keys, and every refusal."""

import hashlib
import json
import math
import tracemalloc

import numpy as np
import pytest

from precast.exporter.quantize import FORMATS
from precast.exporter.sources.gguf.rope import llama3_divisors
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

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


def refusal(path) -> str:
    with pytest.raises(PrecastError) as caught:
        open_source(str(path))
    return str(caught.value)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k, row by row."""
    size = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                out[head * size + 2 * i + half] = rows[head * size + half * size // 2 + i]
    return out


def rotate_halves(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """RoPE as Hugging Face does it, on one head ``[H]``."""
    first, second = np.split(x, 2)
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )


def rotate_neighbours(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """RoPE as llama.cpp does it for the llama architecture, on one head ``[H]``."""
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


def test_llama_rows_of_q_and_k_are_put_back(gguf_spec, tiny, tmp_path):
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
    """The point of putting rows back: q·k is the same under llama.cpp's RoPE and Hugging Face's."""
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


def test_qwen2_rows_stay_where_they_are(gguf_spec, tiny, tmp_path):
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
    """32 values in 18 bytes: a float16 scale, then 16 values in low nibbles and 16 in high ones."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
    return (np.concatenate([low, high], axis=1).astype(np.float32) - 8) * scale


def q4_1(blocks: np.ndarray) -> np.ndarray:
    """As Q4_0, with a float16 minimum after the scale in place of the offset of 8."""
    scale, least = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
    low, high = blocks[:, 4:] & 15, blocks[:, 4:] >> 4
    return np.concatenate([low, high], axis=1).astype(np.float32) * scale[:, None] + least[:, None]


def q8_0(blocks: np.ndarray) -> np.ndarray:
    """32 values in 34 bytes: a float16 scale, then int8."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * blocks[:, :2].copy().view(np.float16).astype(
        np.float32
    )


def q4_k(blocks: np.ndarray) -> np.ndarray:
    """256 values in 144 bytes: two float16 scales, 8 6-bit scales and minima, 128 bytes of nibbles."""
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
    """Quantised bytes with tame float16 numbers in front of each block, ``[rows, blocks * size]``."""
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
    """Against decoders written from the layouts; q also has its rows put back."""
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
    """A tensor's blocks as an artifact would store them, multiplied out."""
    return FORMATS[name].decode(FORMATS[name].repack(tensor.blocks()), *tensor.shape)


@pytest.mark.parametrize(
    ("kind", "size", "halves", "format_"),
    [("Q8_0", 34, 1, "int8"), ("Q4_0", 18, 1, "int4"), ("Q4_0", 18, 1, "int8"), ("Q4_1", 20, 2, "int4")],
)
def test_blocks_are_what_is_read(gguf_spec, tmp_path, kind, size, halves, format_):
    """To the bit, rows of q and k put back alike, and over more rows than are read at a time."""
    rows = {"token_embd": 1100, "blk.0.attn_q": 256, "blk.1.attn_k": 128, "blk.0.attn_v": 128}
    raw = {f"{name}.weight": random_blocks(count, 8, size, halves) for name, count in rows.items()}
    for data in raw.values():
        blocks = data.reshape(-1, size)
        blocks[::2, 1] |= 0x80  # half of the scales are negative, as Q4_0 has them
        if kind == "Q8_0":
            blocks[:, 2:][blocks[:, 2:] == 0x80] = 0x81  # -128, which no quantiser writes
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
        # Zeros may differ in their sign: 0 · -d is -0, 8 · -d + 8d is +0.
        np.testing.assert_array_equal((found + 0).view(np.uint32), (read + 0).view(np.uint32), err_msg=name)


def test_blocks_of_rows_that_differ_are_put_back(gguf_spec, tiny, tmp_path):
    """Against the tensor that was quantised, so that a mistake common to both ways of reading shows."""
    original = gguf_spec().tensors["blk.0.attn_q.weight"]
    tensors = gguf_spec().tensors | {"blk.0.attn_q.weight": interleave(original, tiny.dims["N"])}
    spec = gguf_spec(tensors=tensors, types={"blk.0.attn_q.weight": "Q8_0"})
    tensor = open_source(str(spec.write(tmp_path))).tensors["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_allclose(in_format("int8", tensor), original, atol=0.03)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q5_0", "Q5_1"])
def test_other_types_have_no_blocks(gguf_spec, tmp_path, kind):
    spec = gguf_spec(types={"blk.0.ffn_up.weight": kind})
    assert open_source(str(spec.write(tmp_path))).tensors["model.layers.0.mlp.up_proj.weight"].blocks is None


def test_a_quantised_vector_has_no_blocks(gguf_spec, tmp_path):
    spec = gguf_spec(types={"output_norm.weight": "Q8_0"})
    assert open_source(str(spec.write(tmp_path))).tensors["model.norm.weight"].blocks is None


def test_the_least_byte_is_not_taken_as_it_is(gguf_spec, tmp_path):
    """int8 is symmetric; -128 would not fit a negated value."""
    data = random_blocks(256, 8, 34, 1)
    data.reshape(-1, 34)[5, 9] = 0x80
    tensors = {name: t for name, t in gguf_spec().tensors.items() if name != "blk.0.ffn_up.weight"}
    spec = gguf_spec(tensors=tensors, raw={"blk.0.ffn_up.weight": (data, "Q8_0")})
    tensor = open_source(str(spec.write(tmp_path))).tensors["model.layers.0.mlp.up_proj.weight"]
    assert tensor.blocks().values.min() == -128
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


# --- config -------------------------------------------------------------------------------------------------


def test_llama_config(gguf_spec, tmp_path):
    source = open_source(str(gguf_spec().write(tmp_path)))
    assert source.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 275,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    }


def test_qwen2_config(gguf_spec, tmp_path):
    metadata = {
        "qwen2.attention.key_length": 64,
        "qwen2.attention.value_length": 64,
        "qwen2.rope.freq_base": 1e6,
    }
    config = open_source(str(gguf_spec(architecture="qwen2", metadata=metadata).write(tmp_path))).config
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert (config["head_dim"], config["rope_theta"]) == (64, 1e6)
    assert "attention_bias" not in config


@pytest.mark.parametrize(
    ("metadata", "key", "expected"),
    [
        ({"llama.attention.head_count_kv": None}, "num_key_value_heads", 4),
        ({"llama.attention.head_count_kv": [2, 2]}, "num_key_value_heads", 2),
        ({"llama.rope.freq_base": None}, "rope_theta", 10000.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, "rope_scaling", None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            "rope_scaling",
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scaling.factor": 2.0}, "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ({"llama.rope.scale_linear": 2.0}, "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ({"llama.rope.scaling.type": "linear"}, "rope_scaling", None),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 128,
            },
            "rope_scaling",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        ({"llama.attention.layer_norm_rms_epsilon": 1e-6}, "rms_norm_eps", 1e-6),
        ({"llama.vocab_size": 275}, "vocab_size", 275),
        ({"llama.expert_count": 0}, "num_hidden_layers", 2),
    ],
)
def test_config_keys(gguf_spec, tmp_path, metadata, key, expected):
    assert open_source(str(gguf_spec(metadata=metadata).write(tmp_path))).config[key] == expected


def test_output_weight_means_untied(gguf_spec, tmp_path):
    spec = gguf_spec()
    head = spec.tensors["token_embd.weight"] + 1
    source = open_source(str(gguf_spec(tensors=spec.tensors | {"output.weight": head}).write(tmp_path)))
    assert source.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(source.tensors["lm_head.weight"].read(), head)


def test_biases_show_in_the_config(gguf_spec, tmp_path):
    biases = {"blk.0.attn_q.bias": np.ones(256, np.float32), "blk.0.ffn_gate.bias": np.ones(256, np.float32)}
    config = open_source(str(gguf_spec(tensors=gguf_spec().tensors | biases).write(tmp_path))).config
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is True


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.attention.head_count": None}, "lacks the metadata key llama.attention.head_count"),
        (
            {"llama.attention.head_count_kv": [2, 4]},
            "expected llama.attention.head_count_kv to be one positive whole number, found [2, 4]",
        ),
        ({"llama.attention.key_length": 32}, "expected llama.rope.dimension_count"),
        (
            {"llama.attention.value_length": 32},
            "expected llama.attention.value_length to be the head dimension 64, found 32",
        ),
        (
            {"llama.rope.dimension_count": 32},
            "expected llama.rope.dimension_count to be the head dimension 64, found 32",
        ),
        ({"llama.vocab_size": 300}, "expected llama.vocab_size to be the embedding's 275 rows, found 300"),
        (
            {"llama.rope.scaling.type": "su"},
            "expected llama.rope.scaling.type to be none, linear or yarn, found 'su'",
        ),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
            "lacks the metadata key llama.rope.scaling.original_context_length",
        ),
        (
            {"llama.rope.scaling.attn_factor": 1.5},
            "has the metadata key llama.rope.scaling.attn_factor = 1.5",
        ),
        (
            {"llama.expert_group_count": 8},
            "has the metadata key llama.expert_group_count = 8, which is not understood and may change the maths",
        ),
        (
            {"llama.attention.sliding_window": 4096},
            "has the metadata key llama.attention.sliding_window = 4096",
        ),
        ({"llama.logit_scale": 0.5}, "has the metadata key llama.logit_scale = 0.5"),
        ({"llama.brand_new": "x"}, "has the metadata key llama.brand_new = 'x'"),
        ({"split.count": 3}, "is one of 3 parts of a model; join them with llama-gguf-split --merge first."),
        ({"general.type": "adapter"}, "holds a adapter, not a model"),
    ],
)
def test_refused_metadata(gguf_spec, tmp_path, metadata, expected):
    if "llama.attention.key_length" in metadata:
        metadata = metadata | {"llama.rope.dimension_count": 64}
    assert expected in refusal(gguf_spec(metadata=metadata).write(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "expected", "found"),
    [
        ("general.sampling.temp", "hot", "a number", "'hot'"),
        ("general.sampling.top_k", 20.5, "a whole number", "20.5"),
        ("general.sampling.top_p", True, "a number", "True"),
        ("general.type", ["model"], "text", "['model']"),
        ("split.count", "three", "a whole number", "'three'"),
        ("tokenizer.chat_template", 7, "text", "7"),
        ("tokenizer.ggml.add_bos_token", "yes", "true or false", "'yes'"),
        ("tokenizer.ggml.bos_token_id", "<s>", "a whole number", "'<s>'"),
        ("tokenizer.ggml.eos_token_id", [2], "a whole number", "[2]"),
        ("tokenizer.ggml.eot_token_id", "</s>", "a whole number", "'</s>'"),
        ("tokenizer.ggml.merges", [1, 2], "a list of texts", "[1, 2]"),
        ("tokenizer.ggml.model", ["gpt2"], "text", "['gpt2']"),
        ("tokenizer.ggml.pre", ["smollm"], "text", "['smollm']"),
        ("tokenizer.ggml.scores", ["a"], "a list of numbers", "['a']"),
        ("tokenizer.ggml.token_type", 3, "a list of whole numbers", "3"),
        ("tokenizer.ggml.tokens", 49152, "a list of texts", "49152"),
        ("tokenizer.ggml.tokens", [1], "a list of texts", "[1]"),
    ],
)
def test_metadata_of_another_type(gguf_spec, tmp_path, key, value, expected, found):
    path = gguf_spec(metadata={key: value}).write(tmp_path)
    assert (
        refusal(path) == f"{path}: expected {key} to be {expected}, found {found}; convert the model again."
    )


def test_an_architecture_that_is_a_list(gguf_spec, tmp_path):
    """The library writes this key itself, so it is renamed, which moves the list behind it to its place."""
    path = gguf_spec(metadata={"general.architectur_": ["llama"]}).write(tmp_path)
    data = path.read_bytes().replace(b"general.architecture", b"general.architect_re")
    path.write_bytes(data.replace(b"general.architectur_", b"general.architecture"))
    assert refusal(path).startswith(f"{path}: expected general.architecture to be text, found ['llama'];")


def test_other_architectures(gguf_spec, tmp_path):
    assert refusal(gguf_spec(architecture="mamba").write(tmp_path)).endswith(
        "holds a model of architecture mamba, and only llama, qwen2, qwen3, gemma2, gemma3, phi3, granite, olmo2, "
        "smollm3 and qwen3moe are supported as GGUF; use the model's Hugging Face checkpoint."
    )


# --- Llama 3's RoPE -----------------------------------------------------------------------------------------


def divisors(
    theta: float, size: int, factor: float, original: float = 8192, low: float = 1.0, high: float = 4.0
):
    """As llama.cpp's converter writes them, one frequency after the other, in float32."""
    out = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * float(np.float32(theta) ** np.float32(i / size))
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("size", [64, 128])
def test_llama3_divisors(factor, size):
    expected = divisors(500000.0, size, factor)
    assert len(set(expected.tolist())) > 3
    np.testing.assert_allclose(llama3_divisors(500000.0, size, factor), expected, rtol=1e-5)


def test_llama3_scaling_is_recovered(gguf_spec, tmp_path):
    factors = divisors(500000.0, 64, 32.0)
    spec = gguf_spec(
        metadata={"llama.rope.freq_base": 500000.0},
        tensors=gguf_spec().tensors | {"rope_freqs.weight": factors},
    )
    source = open_source(str(spec.write(tmp_path)))
    assert source.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in source.tensors


def test_factors_of_one_scale_nothing(gguf_spec, tmp_path):
    spec = gguf_spec(tensors=gguf_spec().tensors | {"rope_freqs.weight": np.ones(32, np.float32)})
    assert open_source(str(spec.write(tmp_path))).config["rope_scaling"] is None


@pytest.mark.parametrize(
    "factors",
    [
        divisors(500000.0, 64, 8.0, original=4096),
        divisors(500000.0, 64, 8.0, high=2.0),
        divisors(500000.0, 64, 8.0)[:-1],
        np.full(32, 2, np.float32),
        np.full(32, np.nan, np.float32),
    ],
    ids=["context", "high", "length", "constant", "nan"],
)
def test_other_factors_are_refused(gguf_spec, tmp_path, factors):
    spec = gguf_spec(
        metadata={"llama.rope.freq_base": 500000.0},
        tensors=gguf_spec().tensors | {"rope_freqs.weight": factors},
    )
    assert (
        "expected the RoPE factors of Llama 3.x (rope_freqs.weight), the only ones that can be converted exactly"
        in refusal(spec.write(tmp_path))
    )


# --- broken files -------------------------------------------------------------------------------------------


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    assert (
        refusal(path)
        == f"{path}: is not a GGUF file (expected it to begin with b'GGUF', found b'PK\\x03\\x04')."
    )
    path.write_bytes(b"")
    assert refusal(path).endswith("found b'').")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_a_truncated_header(gguf_spec, tmp_path, kept):
    path = gguf_spec().write(tmp_path)
    data = path.read_bytes()
    header = len(data) - sum(tensor.nbytes for tensor in gguf_spec().tensors.values())
    path.write_bytes(data[: 4 + int(kept * header)])
    text = refusal(path)
    assert text.startswith(f"{path}: at byte ")
    assert text.endswith("so it is truncated or damaged; fetch it again.")


@pytest.mark.parametrize("missing", [1, 1000, 100_000])
def test_tensor_data_beyond_the_end(gguf_spec, tmp_path, missing):
    path = gguf_spec().write(tmp_path)
    path.write_bytes(path.read_bytes()[:-missing])
    assert refusal(path).endswith("so it is truncated or damaged; fetch it again.")


def test_an_unknown_version(gguf_spec, tmp_path):
    path = gguf_spec().write(tmp_path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + path.read_bytes()[8:])
    assert refusal(path) == (
        f"{path}: at byte 4, expected GGUF version 2 or 3, found 9; convert the model again with a current converter."
    )


def test_an_unknown_tensor(gguf_spec, tmp_path):
    for name in ("blk.0.attn_q_norm.weight", "rope_factors_long.weight", "blk.0.ffn_gate_exps.weight", "odd"):
        spec = gguf_spec(tensors=gguf_spec().tensors | {name: np.ones(4, np.float32)})
        assert (
            f"holds the unknown tensor {name}, which may change the maths; use the model's Hugging Face checkpoint."
            in refusal(spec.write(tmp_path))
        )


def test_a_type_that_cannot_be_dequantised(gguf_spec, tmp_path):
    spec = gguf_spec(raw={"output.weight": (np.ones((4, 4), np.int32), "I32")})
    assert "output.weight is stored as I32, which the gguf library cannot dequantise" in refusal(
        spec.write(tmp_path)
    )


def test_no_embedding(gguf_spec, tmp_path):
    tensors = {name: tensor for name, tensor in gguf_spec().tensors.items() if name != "token_embd.weight"}
    assert "lacks the tensor token_embd.weight" in refusal(gguf_spec(tensors=tensors).write(tmp_path))


def test_more_tokens_than_rows(gguf_spec, tmp_path):
    spec = gguf_spec()
    rows = spec.tensors["token_embd.weight"][:-1]
    assert "has 275 tokens, but an embedding of 274 rows" in refusal(
        gguf_spec(tensors=spec.tensors | {"token_embd.weight": rows}).write(tmp_path)
    )


# --- the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Qwen2.5-0.5B-Instruct-Q4_K_M.gguf", "qwen2.5-0.5b-instruct"),
        ("tinyllama.Q8_0.gguf", "tinyllama"),
        ("model-f16.gguf", "model"),
        ("Llama 3.2 1B.BF16.gguf", "llama-3.2-1b"),
        ("x-IQ4_XS.gguf", "x"),
        ("plain.gguf", "plain"),
        ("model-UD-Q4_K_XL.gguf", "model"),
    ],
)
def test_name(gguf_spec, tmp_path, file, name):
    assert open_source(str(gguf_spec(name=file).write(tmp_path))).name == name


def test_tokens_template_licence_and_provenance(gguf_spec, tmp_path):
    metadata = {
        "general.license": "apache-2.0",
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.eom_token_id": 2,
    }
    path = gguf_spec(metadata=metadata).write(tmp_path)
    source = open_source(str(path))
    assert (source.licence, source.chat_template) == ("Apache-2.0", "{{ messages }}")
    assert (source.bos_token, source.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert source.eos_token_ids == (2, 0)
    assert [(file.name, file.sha256) for file in source.files] == [
        (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    ]


def test_what_the_file_does_not_say(gguf_spec, tmp_path):
    metadata = {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.eos_token_id": None}
    source = open_source(str(gguf_spec(metadata=metadata).write(tmp_path)))
    assert (source.licence, source.chat_template, source.bos_token, source.eos_token) == (None,) * 4
    assert source.sampling == {}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"eos_token_id": None}, (0, 2)),
        ({"eos_token_id": 0}, (0, 2)),
        ({"eos_token_id": 2}, (2, 0)),
        ({"eos_token_id": 0, "eot_token_id": 1}, (0, 1, 2)),
    ],
)
def test_ends_that_are_not_named_are_known_by_their_text(gguf_spec, tmp_path, metadata, expected):
    """<|endoftext|> is token 0 and <|im_end|> token 2; tokens named by the file come first."""
    spec = gguf_spec(metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    assert open_source(str(spec.write(tmp_path))).eos_token_ids == expected


def test_recommended_sampling(gguf_spec, tmp_path):
    metadata = {
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.5,
    }
    sampling = open_source(str(gguf_spec(metadata=metadata).write(tmp_path))).sampling
    assert sampling == {"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.5}


def test_a_recommended_penalty_counts_without_a_temperature(gguf_spec, tmp_path):
    metadata = {"general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.5}
    assert open_source(str(gguf_spec(metadata=metadata).write(tmp_path))).sampling == {
        "repetition_penalty": 1.5
    }


def test_a_recommended_sampler_that_precast_does_not_have(gguf_spec, tmp_path):
    path = gguf_spec(metadata={"general.sampling.mirostat": 2}).write(tmp_path)
    assert refusal(path) == (
        f"{path}: general.sampling.mirostat is 2, a sampler that precast does not have; remove the key"
        " (gguf_new_metadata.py --remove-metadata general.sampling.mirostat)."
    )


def test_a_special_token_beyond_the_vocabulary(gguf_spec, tmp_path):
    path = gguf_spec(metadata={"tokenizer.ggml.eos_token_id": 999}).write(tmp_path)
    assert "tokenizer.ggml.eos_token_id is 999, beyond the vocabulary of 275" in refusal(path)


# --- names of files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sha256-0123abcd", "model", "model.bin", "model.GGUF"])
def test_a_gguf_file_is_known_by_its_first_bytes(gguf_spec, tmp_path, name):
    """Other programs store models in files named by their hash."""
    path = gguf_spec().write(tmp_path).rename(tmp_path / name)
    assert open_source(str(path)).config["model_type"] == "llama"


def test_a_file_out_of_a_checkpoint_is_named_by_its_directory(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(16))
    assert refusal(path).endswith(f"found one file of a directory; name the directory, {tmp_path}.")


def test_without_token_types_a_sentencepiece_tokenizer_cannot_be_made(gguf_spec, tmp_path):
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.token_type": None,
    }
    text = refusal(gguf_spec(metadata=metadata).write(tmp_path))
    assert (
        "lacks the metadata key tokenizer.ggml.token_type, which tells bytes and control tokens from words"
        in text
    )
    assert text.endswith("convert the model again with a current one, or use its Hugging Face checkpoint.")


def test_without_token_types_all_tokens_of_a_byte_level_tokenizer_are_normal(gguf_spec, tmp_path):
    """As llama.cpp has it."""
    path = gguf_spec(metadata={"tokenizer.ggml.token_type": None}).write(tmp_path)
    assert len(json.loads(open_source(str(path)).tokenizer_json)["model"]["vocab"]) == 275
