"""Pipes, folders, links, other formats and hostile contents in place of a checkpoint's files."""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

W = np.arange(12, dtype=np.float32).reshape(3, 4)
ONE = {"model.embed_tokens.weight": W}
# All files that the readers open, with valid contents.
FILES = {
    "config.json": {"model_type": "llama"},
    "tokenizer_config.json": {},
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "generation_config.json": {},
    "chat_template.jinja": "{{ bos_token }}",
    "README.md": "a model",
}
NAMES = [*FILES, "tokenizer.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json"]


def refusal(path: Path) -> str:
    with pytest.raises(PrecastError) as caught:
        open_source(str(path))
    text = str(caught.value)
    assert text.endswith(".")
    return text


def test_valid_files_are_read(checkpoint):
    assert open_source(str(checkpoint(FILES, ONE))).chat_template == "{{ bos_token }}"


# --- no files at all ----------------------------------------------------------------------------------------


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to("not-fetched")


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (make_pipe, "expected a file, found a FIFO; replace it with the file."),
        (make_folder, "expected a file, found a folder; replace it with the file."),
        (make_device, "expected a file, found a device; replace it with the file."),
        (make_loop, "cannot be read ("),
        (make_link_to_nothing, "is a symlink to not-fetched, which does not exist; fetch the file again."),
    ],
)
def test_something_else_in_place_of_a_file(checkpoint, name, make, found):
    """Anything that is not a file is refused at once, in a sentence that names it."""
    folder = checkpoint(FILES, ONE)
    path = folder / name
    path.unlink(missing_ok=True)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    make(path)
    assert refusal(folder).startswith(f"{path}: {found}")


def test_a_pipe_in_place_of_a_shard(checkpoint):
    folder = checkpoint({"model.safetensors.index.json": {"weight_map": {"a": "one.safetensors"}}})
    make_pipe(folder / "one.safetensors")
    assert refusal(folder).startswith(f"{folder / 'one.safetensors'}: expected a file, found a FIFO")


@pytest.mark.parametrize("name", ["model.gguf", "model"])
def test_a_pipe_in_place_of_a_gguf_file(tmp_path, name):
    make_pipe(tmp_path / name)
    assert refusal(tmp_path / name) == (
        f"{tmp_path / name}: expected a file, found a FIFO; replace it with the file."
    )


# --- other files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (
            "model.fp16.safetensors",
            "found only the variant model.fp16.safetensors; rename it to model.safetensors.",
        ),
        (
            "model.safetensors.index.fp16.json",
            "rename it to model.safetensors.index.json, and keep the names",
        ),
        (
            "model.fp16-00001-of-00002.safetensors",
            "a shard without its index; fetch model.safetensors.index.json too.",
        ),
        (
            "model-00001-of-00002.safetensors",
            "a shard without its index; fetch model.safetensors.index.json too.",
        ),
        (
            "consolidated.safetensors",
            "whose tensors have the publisher's own names; fetch the files model*",
        ),
        (
            "adapter_model.safetensors",
            "found only an adapter (adapter_model.safetensors); merge it into its model",
        ),
        (
            "weights.safetensors",
            "found only weights.safetensors; rename it to model.safetensors if it contains the whole",
        ),
        ("tiny-Q8_0.gguf", "found only tiny-Q8_0.gguf; export that file itself, "),
        (
            "pytorch_model.bin",
            "found only a pickle (pytorch_model.bin), which can run code when it is loaded;",
        ),
        ("model.pth", "found only a pickle (model.pth)"),
        ("tf_model.h5", "found only tf_model.h5, from another framework; load it with transformers 4"),
        ("flax_model.msgpack", "found only flax_model.msgpack, from another framework"),
    ],
)
def test_weights_of_another_name_or_format(checkpoint, name, found):
    folder = checkpoint()
    (folder / name).write_bytes(b"")
    text = refusal(folder)
    assert text.startswith(
        f"{folder}: expected weights in model.safetensors or model.safetensors.index.json, found "
    )
    assert found in text


def test_shards_that_are_missing(checkpoint):
    shards = {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"}
    folder = checkpoint({"model.safetensors.index.json": {"weight_map": shards}})
    save_file({"a": W}, folder / "one.safetensors")
    assert refusal(folder).endswith(
        "lists the shard three.safetensors and 1 more, but these files are missing; fetch them."
    )


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"]
)
@pytest.mark.parametrize(
    ("contents", "found"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a Git LFS pointer; run `git lfs pull`",
        ),
        ("<!DOCTYPE html>\n<html>", "a web page; fetch the file itself, with a token if the model is gated"),
    ],
)
def test_stand_ins_of_downloads(checkpoint, name, contents, found):
    folder = checkpoint(FILES, ONE)
    (folder / name).write_text(contents)
    assert refusal(folder).startswith(f"{folder / name}: expected the model's file, found {found}")


def test_a_gguf_file_that_was_not_fetched(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert refusal(path).startswith(f"{path}: expected the model's file, found a Git LFS pointer")


def test_line_ends_are_universal(checkpoint):
    folder = checkpoint(FILES, ONE)
    (folder / "chat_template.jinja").write_bytes(b"a\r\nb\rc\n")
    assert open_source(str(folder)).chat_template == "a\nb\nc\n"


# --- contents made to do harm -------------------------------------------------------------------------------

JSON = [name for name in NAMES if name.endswith(".json") and name != "adapter_config.json"]
VALUES = [
    None,
    True,
    -1,
    10**400,
    1.5,
    float("inf"),
    "x",
    "\ud800",
    [],
    [[]],
    [None],
    {},
    {"a": None},
    [["a", 1]],
    {"content": 3},
]


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"a": NaN', "", "\ufeff{}", "null", "1" * 5000]
)
def test_invalid_json(checkpoint, name, text):
    folder = checkpoint(FILES, ONE)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(text)
    assert refusal(folder).startswith(f"{folder / name}: ")


def paths(value: object, above: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Yield the path of every value in a JSON document."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(path for key, inner in below for path in paths(inner, (*above, key)))][
        0 if above else 1 :
    ]


def replaced(value: object, path: tuple[object, ...], new: object) -> object:
    if not path:
        return new
    copy: dict = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy if isinstance(value, dict) else list(copy.values())


MODELS = {
    "BPE": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
    "Unigram": {"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["a", -1.0], ["b", -2.0]]},
    "WordPiece": {
        "type": "WordPiece",
        "unk_token": "<s>",
        "vocab": {"<s>": 0, "a": 1},
        "max_input_chars_per_word": 9,
    },
    "WordLevel": {"type": "WordLevel", "unk_token": "<s>", "vocab": {"<s>": 0, "a": 1}},
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_value_of_a_tokenizer_in_another_type(checkpoint, kind):
    """The changed file is read, or refused in a sentence."""
    folder = checkpoint(FILES, ONE)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text()) | {"model": MODELS[kind]}
    places = paths(whole)
    assert len(places) > 15
    refused = 0
    for place in places:
        for value in VALUES:
            path.write_text(json.dumps(replaced(whole, place, value)))
            try:
                open_source(str(folder))
            except PrecastError:
                refused += 1
    assert refused > len(places)


@pytest.mark.parametrize("name", [name for name in JSON if name != "tokenizer.json"])
def test_every_value_of_a_config_in_another_type(checkpoint, name):
    recorded = {
        "config.json": {
            "model_type": "llama",
            "bos_token_id": 0,
            "eos_token_id": [1],
            "quantization_config": {},
        },
        "tokenizer_config.json": {"bos_token": "<s>", "added_tokens_decoder": {"0": {"content": "<s>"}}},
        "special_tokens_map.json": {"eos_token": {"content": "</s>"}},
        "added_tokens.json": {"<s>": 0},
        "generation_config.json": {
            "eos_token_id": [1],
            "do_sample": True,
            "temperature": 0.5,
            "bad_words_ids": [[1]],
        },
        "model.safetensors.index.json": {"weight_map": {"a": "one.safetensors"}},
    }[name]
    folder = checkpoint(FILES, ONE)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
        save_file({"a": W}, folder / "one.safetensors")
    for place in paths(recorded):
        for value in VALUES:
            (folder / name).write_text(json.dumps(replaced(recorded, place, value)))
            try:
                open_source(str(folder))
            except PrecastError as error:
                text = str(error)
                assert text.startswith(str(folder))


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_every_value_of_an_id_that_no_file_of_the_tokenizer_replaces(checkpoint, key):
    folder = checkpoint({}, ONE)
    for value in (*VALUES, [{}], [[1]]):
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", key: value}))
        try:
            open_source(str(folder))
        except PrecastError as error:
            text = str(error)
            assert text.startswith(str(folder))


def header(document: object, length: int | None = None) -> bytes:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        header({}, 1 << 63),
        header({}, (1 << 64) - 1),
        header({}, 1 << 40),
        header(b"[" * 100_000),
        header(b'{"a":' * 100_000),
        header(b"\xff" * 8),
        header({"a": 1}),
        header({"a": TENSOR | {"shape": [1 << 62, 1 << 62]}}),
        header({"a": TENSOR | {"shape": [-1]}}),
        header({"a": TENSOR | {"dtype": "F33"}}),
        header({"a": TENSOR | {"data_offsets": [8, 0]}}),
        header({"a": TENSOR | {"data_offsets": [0, 1 << 60]}}),
        header({"a": TENSOR, "b": TENSOR}),
        header({"__metadata__": {"format": 1}, "a": TENSOR}),
    ],
)
def test_malicious_weight_files(checkpoint, data):
    folder = checkpoint(FILES)
    path = folder / "model.safetensors"
    path.write_bytes(data + bytes(8))
    tracemalloc.start()
    try:
        assert refusal(folder).startswith(f"{path}: is not a complete safetensors file (")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_tensor_with_a_name_of_many_levels(checkpoint):
    folder = checkpoint(FILES, {"model." + ".".join(["a"] * 2000): W})
    assert len(open_source(str(folder)).tensors) == 1
