"""GGUF files: config keys, RoPE scaling, other metadata, and every refusal."""

import hashlib
import json
import math

import numpy as np
import pytest

from precast.exporter.sources.gguf.rope import llama3_divisors
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError


def refusal(path) -> str:
    with pytest.raises(PrecastError) as caught:
        open_source(str(path))
    return str(caught.value)


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
        ({"split.count": 3}, "is one of 3 parts of a model; join the parts with llama-gguf-split --merge."),
        (
            {"general.type": "adapter"},
            "expected general.type to be model, found adapter; name the model's own GGUF file.",
        ),
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
        ("tokenizer.ggml.merges", [1, 2], "a list of strings", "[1, 2]"),
        ("tokenizer.ggml.model", ["gpt2"], "text", "['gpt2']"),
        ("tokenizer.ggml.pre", ["smollm"], "text", "['smollm']"),
        ("tokenizer.ggml.scores", ["a"], "a list of numbers", "['a']"),
        ("tokenizer.ggml.token_type", 3, "a list of whole numbers", "3"),
        ("tokenizer.ggml.tokens", 49152, "a list of strings", "49152"),
        ("tokenizer.ggml.tokens", [1], "a list of strings", "[1]"),
    ],
)
def test_metadata_of_another_type(gguf_spec, tmp_path, key, value, expected, found):
    path = gguf_spec(metadata={key: value}).write(tmp_path)
    assert (
        refusal(path) == f"{path}: expected {key} to be {expected}, found {found}; convert the model again."
    )


def test_an_architecture_that_is_a_list(gguf_spec, tmp_path):
    """The gguf library writes this key itself, as text, so the test writes a list and then renames it in the file."""
    path = gguf_spec(metadata={"general.architectur_": ["llama"]}).write(tmp_path)
    data = path.read_bytes().replace(b"general.architecture", b"general.architect_re")
    path.write_bytes(data.replace(b"general.architectur_", b"general.architecture"))
    assert refusal(path).startswith(f"{path}: expected general.architecture to be text, found ['llama'];")


def test_other_architectures(gguf_spec, tmp_path):
    assert refusal(gguf_spec(architecture="mamba").write(tmp_path)).endswith(
        "expected general.architecture to be one of llama, qwen2, qwen3, gemma2, gemma3, phi3, granite, olmo2, smollm3,"
        " qwen3moe, found mamba; use the model's Hugging Face checkpoint."
    )


# --- Llama 3's RoPE -----------------------------------------------------------------------------------------


def divisors(
    theta: float, size: int, factor: float, original: float = 8192, low: float = 1.0, high: float = 4.0
):
    """Compute the divisors one by one in float32, as llama.cpp's converter does."""
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
        "expected the RoPE factors of Llama 3.x (rope_freqs.weight), found other factors, which cannot be"
        in refusal(spec.write(tmp_path))
    )


# --- broken files -------------------------------------------------------------------------------------------


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    assert (
        refusal(path)
        == f"{path}: is not a GGUF file (expected it to begin with b'GGUF', found b'PK\\x03\\x04'); fetch it again, or"
        " name another file."
    )
    path.write_bytes(b"")
    assert refusal(path).endswith("found b''); fetch it again, or name another file.")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_a_truncated_header(gguf_spec, tmp_path, kept):
    path = gguf_spec().write(tmp_path)
    data = path.read_bytes()
    header = len(data) - sum(tensor.nbytes for tensor in gguf_spec().tensors.values())
    path.write_bytes(data[: 4 + int(kept * header)])
    text = refusal(path)
    assert text.startswith(f"{path}: at byte ")
    assert text.endswith("so the file is truncated or damaged; fetch it again.")


@pytest.mark.parametrize("missing", [1, 1000, 100_000])
def test_tensor_data_beyond_the_end(gguf_spec, tmp_path, missing):
    path = gguf_spec().write(tmp_path)
    path.write_bytes(path.read_bytes()[:-missing])
    assert refusal(path).endswith("so the file is truncated or damaged; fetch it again.")


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
            f"contains the unknown tensor {name}, which may change the maths; use the model's Hugging Face checkpoint."
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


def test_defaults_of_missing_metadata(gguf_spec, tmp_path):
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
    """<|endoftext|> is token 0 and <|im_end|> is token 2; the tokens that the file names come before them."""
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
        f"{path}: general.sampling.mirostat is 2, but precast does not have this sampler; remove the key"
        " (gguf_new_metadata.py --remove-metadata general.sampling.mirostat)."
    )


def test_a_special_token_beyond_the_vocabulary(gguf_spec, tmp_path):
    path = gguf_spec(metadata={"tokenizer.ggml.eos_token_id": 999}).write(tmp_path)
    assert "tokenizer.ggml.eos_token_id is 999, beyond the vocabulary of 275" in refusal(path)


# --- names of files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sha256-0123abcd", "model", "model.bin", "model.GGUF"])
def test_a_gguf_file_is_known_by_its_first_bytes(gguf_spec, tmp_path, name):
    """Other programs name model files after their hashes, without an ending."""
    path = gguf_spec().write(tmp_path).rename(tmp_path / name)
    assert open_source(str(path)).config["model_type"] == "llama"


def test_a_file_of_a_checkpoint_is_refused_with_its_directory(tmp_path):
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
    assert text.endswith(
        "convert the model again with a current converter, or use the model's Hugging Face checkpoint."
    )


def test_without_token_types_all_tokens_of_a_byte_level_tokenizer_are_normal(gguf_spec, tmp_path):
    """This is llama.cpp's rule."""
    path = gguf_spec(metadata={"tokenizer.ggml.token_type": None}).write(tmp_path)
    assert len(json.loads(open_source(str(path)).tokenizer_json)["model"]["vocab"]) == 275
