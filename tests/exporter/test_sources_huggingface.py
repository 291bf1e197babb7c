"""Hugging Face directories: values, defaults and all error texts."""

import hashlib
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

W = np.arange(12, dtype=np.float32).reshape(3, 4) / 8 - 0.5
ONE = {"model.embed_tokens.weight": W}


def refusal(folder) -> str:
    with pytest.raises(PrecastError) as caught:
        open_source(str(folder))
    return str(caught.value)


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float32, "float32"), (np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")]
)
def test_tensors_come_as_float32(checkpoint, dtype, name):
    source = open_source(str(checkpoint(tensors={"w": W.astype(dtype), "v": W[0].astype(dtype)})))
    assert set(source.tensors) == {"w", "v"}
    assert source.tensors["w"].shape == (3, 4)
    assert source.tensors["w"].dtype == name
    read = source.tensors["w"].read()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, W)  # W is exact in all three types
    np.testing.assert_array_equal(source.tensors["v"].read(), W[0])


def test_bfloat16_keeps_every_bit(checkpoint):
    bits = np.arange(0, 65536, 7, dtype=np.uint16)
    bits = bits[~np.isnan(bits.view(ml_dtypes.bfloat16).astype(np.float32))]
    source = open_source(str(checkpoint(tensors={"w": bits.view(ml_dtypes.bfloat16)})))
    np.testing.assert_array_equal(source.tensors["w"].read().view(np.uint32), bits.astype(np.uint32) << 16)


def test_each_read_returns_a_new_array(checkpoint):
    tensor = open_source(str(checkpoint(tensors=ONE))).tensors["model.embed_tokens.weight"]
    first = tensor.read()
    first[:] = 7
    np.testing.assert_array_equal(tensor.read(), W)


def test_shards(checkpoint):
    folder = checkpoint(
        {"model.safetensors.index.json": {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}}
    )
    save_file({"a": W}, folder / "one.safetensors")
    save_file({"b": W + 1, "extra": W + 2}, folder / "two.safetensors")
    source = open_source(str(folder))
    assert {name: float(tensor.read()[0, 0]) for name, tensor in source.tensors.items()} == {
        "a": -0.5,
        "b": 0.5,
        "extra": 1.5,
    }
    assert [file.name for file in source.files[:4]] == [
        "config.json",
        "model.safetensors.index.json",
        "one.safetensors",
        "two.safetensors",
    ]


def test_reading_needs_memory_for_the_tensor_and_its_raw_bytes_only(checkpoint):
    big = np.ones((1024, 1024), ml_dtypes.bfloat16)
    tensor = open_source(str(checkpoint(tensors={"w": big}))).tensors["w"]
    tensor.read()
    tracemalloc.start()
    try:
        tensor.read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.05 * (4 + 2) * big.size


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int64, "I64"), (np.int8, "I8"), (np.float64, "F64"), (np.bool_, "BOOL")]
)
def test_other_types_are_refused(checkpoint, dtype, name):
    text = refusal(checkpoint(tensors={"w": np.ones((2, 2), dtype)}))
    assert text.endswith(
        f"expected w to be F32, F16 or BF16, found {name}; convert the checkpoint to one of these first."
    )


def test_types_may_differ_from_tensor_to_tensor_and_shard_to_shard(checkpoint):
    folder = checkpoint(
        {"model.safetensors.index.json": {"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}}
    )
    save_file({"a": W, "b": W.astype(np.float16)}, folder / "one.safetensors")
    save_file({"c": W.astype(ml_dtypes.bfloat16)}, folder / "two.safetensors")
    tensors = open_source(str(folder)).tensors
    assert {name: t.dtype for name, t in tensors.items()} == {"a": "float32", "b": "float16", "c": "bfloat16"}
    for tensor in tensors.values():
        np.testing.assert_array_equal(tensor.read(), W)


Q = "model.layers.0.self_attn.q_proj"
FP8, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({f"{Q}.weight": FP8}, ("(fp8)", "FineGrainedFP8Config(dequantize=True)")),
        ({f"{Q}.weight": E5M2}, ("(fp8)", "FineGrainedFP8Config(dequantize=True)")),
        ({f"{Q}.weight": FP8, f"{Q}.weight_scale_inv": np.float32}, ("(fp8)", "FineGrainedFP8Config")),
        ({f"{Q}.weight": FP8, f"{Q}.weight_scale": np.float32}, ("(compressed-tensors)", "dequantize=True")),
        (
            {f"{Q}.qweight": np.int32, f"{Q}.g_idx": np.int32, f"{Q}.scales": np.float16},
            ("(gptq or awq)", "with --weights int4"),
        ),
        ({f"{Q}.weight": np.uint8, f"{Q}.weight.absmax": np.uint8}, ("(bitsandbytes)", "model.dequantize()")),
        ({f"{Q}.weight": np.int8, f"{Q}.SCB": np.float32}, ("(bitsandbytes)", "model.dequantize()")),
        ({f"{Q}.weight_packed": np.int32}, ("(compressed-tensors)", "CompressedTensorsConfig")),
        ({"model.layers.0.mlp.experts.gate_up_proj_blocks": np.uint8}, ("(mxfp4)", "Mxfp4Config")),
    ],
)
def test_weights_that_are_already_quantised(checkpoint, stored, said):
    text = refusal(checkpoint(tensors={name: np.ones((2, 2), dtype) for name, dtype in stored.items()}))
    assert "to be F32, F16 or BF16, found " in text
    assert "; the weights seem to be already quantised " in text
    assert ": export the original checkpoint in bfloat16, float16 or float32" in text
    assert text.endswith(".")
    assert all(part in text for part in said)


def test_masks_and_tables_may_have_any_type_unless_read(checkpoint):
    tensors = {
        "h.0.attn.bias": np.ones((1, 1, 4, 4), np.bool_),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float64),
        "position_ids": np.arange(4),
    }
    source = open_source(str(checkpoint(tensors=ONE | tensors)))
    assert {source.tensors[name].dtype for name in tensors} == {"BOOL", "F64", "I64"}
    with pytest.raises(PrecastError, match=r"expected h\.0\.attn\.bias to be F32, F16 or BF16, found BOOL;"):
        source.tensors["h.0.attn.bias"].read()
    np.testing.assert_array_equal(source.tensors["model.embed_tokens.weight"].read(), W)


def test_a_bias_that_ends_like_a_mask_is_a_weight(checkpoint):
    text = refusal(checkpoint(tensors={"h.0.attn.c_attn.bias": np.ones(4, np.int8)}))
    assert "expected h.0.attn.c_attn.bias to be F32, F16 or BF16, found I8" in text


def test_a_truncated_shard(checkpoint):
    folder = checkpoint(tensors=ONE)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    text = refusal(folder)
    assert text.startswith(f"{path}: is not a complete safetensors file (")
    assert text.endswith("and may be truncated; fetch the file again.")


def test_an_index_that_names_a_missing_shard(checkpoint):
    folder = checkpoint({"model.safetensors.index.json": {"weight_map": {"a": "one.safetensors"}}})
    assert refusal(folder).endswith("lists the shard one.safetensors, but this file is missing; fetch it.")


def test_an_index_that_names_a_missing_tensor(checkpoint):
    folder = checkpoint({"model.safetensors.index.json": {"weight_map": {"a": "one.safetensors"}}})
    save_file({"b": W}, folder / "one.safetensors")
    assert refusal(folder).endswith(
        "one.safetensors: lacks the tensor a, which model.safetensors.index.json places in it; fetch both files again."
    )


def test_an_index_that_lists_a_file_outside(checkpoint):
    folder = checkpoint({"model.safetensors.index.json": {"weight_map": {"a": "../one.safetensors"}}})
    save_file({"a": W}, folder.parent / "one.safetensors")
    assert "lists a shard outside its own directory (../one.safetensors)" in refusal(folder)


def test_an_index_without_a_map(checkpoint):
    assert "expected a weight_map" in refusal(checkpoint({"model.safetensors.index.json": {"metadata": {}}}))


def test_a_tensor_in_two_shards(checkpoint):
    folder = checkpoint(
        {"model.safetensors.index.json": {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}}
    )
    save_file({"a": W}, folder / "one.safetensors")
    save_file({"a": W, "b": W}, folder / "two.safetensors")
    assert (
        "two.safetensors: contains the tensor a, as does an earlier shard; keep one of the two."
        in refusal(folder)
    )


# --- missing and broken files --------------------------------------------------------------------------------


def test_an_empty_directory(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected config.json, found an empty directory; name a Hugging Face model directory."
    )


def test_no_config(checkpoint):
    assert "expected config.json, found none" in refusal(checkpoint({"config.json": None}, ONE))


def test_no_weights(checkpoint):
    assert refusal(checkpoint()).endswith(
        "expected weights in model.safetensors or model.safetensors.index.json, found neither; fetch the "
        "files again."
    )


def test_pickled_weights(checkpoint):
    assert refusal(checkpoint({"pytorch_model.bin": "pickle"})).endswith(
        "found only a pickle (pytorch_model.bin), which can run code when it is loaded; convert it to"
        " model.safetensors first, with transformers' from_pretrained and save_pretrained."
    )


def test_no_tokenizer(checkpoint):
    assert "expected tokenizer.json, found none; save the tokenizer in its fast form" in refusal(
        checkpoint({"tokenizer.json": None}, ONE)
    )


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"]
)
def test_broken_json(checkpoint, name):
    folder = checkpoint({name: '{"model_type": '}, ONE)
    assert refusal(folder).startswith(f"{folder / name}: is not valid JSON (")


def test_a_tokenizer_that_does_not_load(checkpoint):
    folder = checkpoint(
        {"tokenizer.json": {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}}, ONE
    )
    assert refusal(folder).startswith(
        f"{folder / 'tokenizer.json'}: expected a tokenizer that the tokenizers library can read, found"
    )


def test_json_that_is_not_an_object(checkpoint):
    assert refusal(checkpoint({"config.json": "[]"}, ONE)).endswith(
        "expected a JSON object, found list; fetch the file again."
    )


def test_text_that_is_not_utf8(checkpoint):
    folder = checkpoint(tensors=ONE)
    (folder / "chat_template.jinja").write_bytes(b"abc\xff")
    assert "expected UTF-8 text, found the byte 0xff at offset 3" in refusal(folder)


@pytest.mark.parametrize(
    ("quantization", "method", "remedy"),
    [
        ({"quant_method": "gptq", "bits": 3}, "gptq", ", with --weights int4."),
        ({"quant_method": "awq", "version": "gemv"}, "awq", ", with --weights int4."),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            "compressed-tensors",
            "CompressedTensorsConfig(dequantize=True)",
        ),
        ({"quant_method": "mxfp4"}, "mxfp4", "Mxfp4Config(dequantize=True)"),
        ({"quant_method": "aqlm"}, "aqlm", "original checkpoint in bfloat16, float16 or float32."),
        ({"bits": 4}, "?", "original checkpoint in bfloat16, float16 or float32."),
        ("int4", "int4", "original checkpoint in bfloat16, float16 or float32."),
    ],
)
def test_quantised_checkpoints(checkpoint, quantization, method, remedy):
    text = refusal(checkpoint({"config.json": {"quantization_config": quantization}}, ONE))
    assert f"quantization_config says that the weights are already quantised ({method}); export the " in text
    assert remedy in text


def test_quantisation_in_other_keys_and_files(checkpoint):
    folder = checkpoint(
        {"config.json": {"compression_config": {"sparsity_config": {"format": "sparse-bitmask"}}}}, ONE
    )
    assert "compression_config says that the weights are already quantised (compressed-tensors)" in refusal(
        folder
    )
    (folder / "config.json").write_text("{}")
    (folder / "hf_quant_config.json").write_text("{}")
    assert refusal(folder).startswith(
        f"{folder / 'hf_quant_config.json'}: says that the weights are already quantised (modelopt); export"
    )


def test_an_adapter(checkpoint):
    text = refusal(checkpoint({"config.json": None, "adapter_config.json": {}}))
    assert "contains an adapter (adapter_config.json), which only modifies another model; merge it" in text


def test_shards_without_their_index(checkpoint):
    folder = checkpoint()
    save_file({"a": W}, folder / "model-00001-of-00002.safetensors")
    assert (
        "found only model-00001-of-00002.safetensors, a shard without its index; fetch model.safetensors.index"
        in refusal(folder)
    )


# --- tokens and templates -----------------------------------------------------------------------------------


def test_special_tokens_as_text_or_object(checkpoint):
    said = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    source = open_source(str(checkpoint({"tokenizer_config.json": said}, ONE)))
    assert (source.bos_token, source.eos_token) == ("<s>", "</s>")


def test_a_null_token_is_none_whatever_the_config_says(checkpoint):
    files = {
        "tokenizer_config.json": {"bos_token": None, "eos_token": "</s>"},
        "config.json": {"bos_token_id": 0},
    }
    assert open_source(str(checkpoint(files, ONE))).bos_token is None


def test_special_tokens_map_adds_missing_tokens(checkpoint):
    files = {
        "tokenizer_config.json": {"eos_token": "</s>"},
        "special_tokens_map.json": {"bos_token": {"content": "<s>"}},
    }
    assert open_source(str(checkpoint(files, ONE))).bos_token == "<s>"


def test_special_tokens_by_id_without_any_other_source(checkpoint):
    source = open_source(str(checkpoint({"config.json": {"bos_token_id": 0, "eos_token_id": [1, 3]}}, ONE)))
    assert (source.bos_token, source.eos_token) == ("<s>", "</s>")


def test_a_special_token_that_is_a_number(checkpoint):
    assert "expected eos_token to be text, found 2" in refusal(
        checkpoint({"tokenizer_config.json": {"eos_token": 2}}, ONE)
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"generation_config.json": {"eos_token_id": [1, 3, 1]}, "config.json": {"eos_token_id": 2}},
            (1, 3, 2),
        ),
        ({"generation_config.json": {"eos_token_id": 3}}, (3, 1)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 2}}, (2, 1)),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, (1,)),
        ({"tokenizer_config.json": {"eos_token": "b"}}, (3, 1)),
        ({}, (1,)),
    ],
)
def test_eos_token_ids(checkpoint, files, expected):
    """Expect the ids that the files name, and token 1, whose text is </s>."""
    assert open_source(str(checkpoint(files, ONE))).eos_token_ids == expected


def test_eos_token_ids_that_are_not_ids(checkpoint):
    assert "expected eos_token_id to be a token id or a list of token ids, found ['</s>']" in refusal(
        checkpoint({"config.json": {"eos_token_id": ["</s>"]}}, ONE)
    )


@pytest.mark.parametrize("said", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
@pytest.mark.parametrize("rule", ["<s> $A", "$A </s>", "$A"])
def test_tokenizer_json_alone_decides_what_is_added_to_a_prompt(checkpoint, said, rule):
    transformers = pytest.importorskip("transformers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=rule, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **said}
    folder = checkpoint({"tokenizer_config.json": config, "tokenizer.json": library.to_str()}, ONE)
    ours = tokenizers.Tokenizer.from_buffer(open_source(str(folder)).tokenizer_json).encode("aa").ids
    assert ours == library.encode("aa").ids
    assert ours == transformers.AutoTokenizer.from_pretrained(folder)("aa")["input_ids"]


# --- defaults, provenance -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None, "max_length": 9},
            {"temperature": 0.6, "top_k": 20, "max_length": 9},
        ),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_k": 50, "top_p": 0.9}),
        ({"do_sample": True, "temperature": None}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"temperature": 0.6}, {}),
    ],
)
def test_sampling(checkpoint, generation, expected):
    assert open_source(str(checkpoint({"generation_config.json": generation}, ONE))).sampling == expected


def test_sampling_that_is_not_a_number(checkpoint):
    files = {"generation_config.json": {"do_sample": True, "top_p": "high"}}
    assert 'expected top_p to be a number, found "high"' in refusal(checkpoint(files, ONE))


def test_sampling_that_is_neither_on_nor_off(checkpoint):
    files = {"generation_config.json": {"do_sample": "false"}}
    assert 'expected do_sample to be true or false, found "false"' in refusal(checkpoint(files, ONE))


def test_numbers_too_long_to_read(checkpoint):
    folder = checkpoint({"generation_config.json": '{"top_k": ' + "9" * 5000 + "}"}, ONE)
    assert refusal(folder).startswith(f"{folder / 'generation_config.json'}: is not valid JSON (")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n", "Apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "MIT"),
        ("---\nlicense: llama3.2\n---\n", "llama3.2"),
        ("---\nlicense: other\nlicense_name: our-own\n---\n", "our-own"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "MIT"),
        ("---\nlicense: other\n---\n", "other"),
        ("# license: mit\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\ntags: [x]\n---\n", None),
        ("---\nlicense: mit\ndate: 2024-02-31\n---\n", None),
        ("---\nlicense: mit\nsteps: !!int ''\n---\n", None),
        ("---\nlicense: mit\ntags: " + "[" * 5000 + "]" * 5000 + "\n---\n", None),
    ],
)
def test_licence(checkpoint, card, expected):
    assert open_source(str(checkpoint({"README.md": card}, ONE))).licence == expected


def test_a_card_that_is_not_utf8_has_no_licence(checkpoint):
    folder = checkpoint(tensors=ONE)
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\ncaf\xe9\n")
    assert open_source(str(folder)).licence is None


def test_the_files_read_are_hashed(checkpoint):
    folder = checkpoint({"README.md": "x", "notes.txt": "not read"}, ONE)
    files = {file.name: file for file in open_source(str(folder)).files}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    data = (folder / "model.safetensors").read_bytes()
    assert files["model.safetensors"].sha256 == hashlib.sha256(data).hexdigest()
    assert files["model.safetensors"].bytes == len(data)


def test_name_config_and_tokenizer_of_a_source(checkpoint):
    folder = checkpoint({"config.json": {"model_type": "llama", "rope_theta": 1e5}}, ONE)
    source = open_source(str(folder))
    assert source.name == "tiny-model_v1.5"
    assert source.config == {"model_type": "llama", "rope_theta": 1e5}
    assert source.tokenizer_json == (folder / "tokenizer.json").read_bytes()
    assert json.loads(source.tokenizer_json)["model"]["vocab"]["a"] == 2
