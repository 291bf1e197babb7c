"""Small checkpoints to read, written for each test: GGUF files and Hugging Face directories."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

# The tiny model: D, N, K, H, F, L. D and F are multiples of 256, the block of the k-quants.
D, N, K, H, F, L = 256, 4, 2, 64, 256, 2


def byte_alphabet() -> dict[int, str]:
    """Return the printable character that GPT-2's published code assigns to each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


MERGES = [
    "Ġ t",
    "h e",
    "Ġt he",
    "1 2",
    "12 3",
    "i n",
    "Ã ©",
    "Ċ Ċ",
    "Ġ Ġ",
    "ĠĠ ĠĠ",
    "l l",
    "e ll",
    "h ell",
    "hell o",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_vocabulary() -> dict[str, Any]:
    """Return the metadata of a small byte-level tokenizer with control, user-defined and unused tokens."""
    tokens = [*SPECIALS, *byte_alphabet().values(), *(merge.replace(" ", "") for merge in MERGES)]
    tokens += ["<tool>", "[PAD0]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 5) + [4, 5],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def gguf_metadata(architecture: str) -> dict[str, Any]:
    return {
        f"{architecture}.block_count": L,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": D,
        f"{architecture}.feed_forward_length": F,
        f"{architecture}.attention.head_count": N,
        f"{architecture}.attention.head_count_kv": K,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
        **byte_level_vocabulary(),
    }


def gguf_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tiny model's tensors, without biases, by GGUF name."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(byte_level_vocabulary()["tokenizer.ggml.tokens"]), D),
        "output_norm.weight": (D,),
    }
    for layer in range(L):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (D,),
            f"blk.{layer}.attn_q.weight": (N * H, D),
            f"blk.{layer}.attn_k.weight": (K * H, D),
            f"blk.{layer}.attn_v.weight": (K * H, D),
            f"blk.{layer}.attn_output.weight": (D, N * H),
            f"blk.{layer}.ffn_norm.weight": (D,),
            f"blk.{layer}.ffn_gate.weight": (F, D),
            f"blk.{layer}.ffn_up.weight": (F, D),
            f"blk.{layer}.ffn_down.weight": (D, F),
        }
    return shapes


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@dataclass(kw_only=True)
class GgufFile:
    """A GGUF file to write, by default of the tiny model.

    Attributes:
        architecture: its name in the metadata.
        metadata: changes of the metadata; a value of None drops the key.
        tensors: tensors by name.
        types: quantised types by tensor name.
        raw: further tensors as bytes, with their type.
        name: name of the file.
    """

    architecture: str = "llama"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, np.ndarray] = field(default_factory=lambda: random_tensors(gguf_shapes()))
    types: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[str, tuple[np.ndarray, str]] = field(default_factory=dict)
    name: str = "tiny-Q4_0.gguf"

    def write(self, folder: Path) -> Path:
        from gguf import GGMLQuantizationType, GGUFWriter
        from gguf.quants import quantize

        writer = GGUFWriter(folder / self.name, self.architecture)
        for key, value in (gguf_metadata(self.architecture) | dict(self.metadata)).items():
            _add(writer, key, value)
        for name, tensor in self.tensors.items():
            kind = GGMLQuantizationType[self.types.get(name, "F32")]
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
        for name, (data, kind_name) in self.raw.items():
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind_name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / self.name


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {
        bool: writer.add_bool,
        str: writer.add_string,
        int: writer.add_uint32,
        float: writer.add_float32,
    }
    if value is not None:
        adders.get(type(value), writer.add_array)(key, value)


@pytest.fixture
def tiny() -> SimpleNamespace:
    """Return the tiny model's numbers and helpers, because tests cannot import this file."""

    return SimpleNamespace(
        dims={"D": D, "N": N, "K": K, "H": H, "F": F, "L": L},
        alphabet=byte_alphabet,
        gguf_shapes=gguf_shapes,
        random_tensors=random_tensors,
        vocabulary=byte_level_vocabulary,
    )


@pytest.fixture
def gguf_spec() -> type[GgufFile]:
    """Return the class that describes a GGUF file to write."""
    return GgufFile


def tokenizer_json(tokens: Sequence[str] = ("<s>", "</s>", "a", "b")) -> dict[str, Any]:
    """Return a tokenizer.json whose first two tokens are added tokens."""
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **added} for i, token in enumerate(tokens[:2])],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a small Hugging Face directory; a value of None in `files` drops a file."""

    def write(
        files: Mapping[str, Any] | None = None, tensors: Mapping[str, np.ndarray] | None = None
    ) -> Path:
        import ml_dtypes  # noqa: F401 - safetensors writes its bfloat16
        from safetensors.numpy import save_file

        folder = tmp_path / "Tiny Model_v1.5"
        folder.mkdir()
        if tensors is not None:
            save_file(dict(tensors), folder / "model.safetensors")
        contents = {
            "config.json": {"model_type": "llama"},
            "tokenizer.json": tokenizer_json(),
            **(files or {}),
        }
        for name, content in contents.items():
            if content is not None:
                (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return write


@pytest.fixture
def export_refusal(tmp_path: Path) -> Callable[..., str]:
    """Run an export that must fail and leave no file; return its error."""
    from precast.exporter.export import export
    from precast.exporter.options import ExportOptions
    from precast.loaders.artifact.errors import PrecastError

    quick = ExportOptions(buckets=(8,), context=32, weights="float32", targets=("cpu",))

    def run(source: Any, options: ExportOptions = quick) -> str:
        with pytest.raises(PrecastError) as raised:
            export(source, tmp_path / "output" / "artifact", options)
        assert not (tmp_path / "output").exists() or os.listdir(tmp_path / "output") == []
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return run
