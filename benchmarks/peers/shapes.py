"""Write GGUF files of real sizes with random weights and the demo model's tokenizer, for a given shape and mixture.

    python shapes.py SHAPE MIXTURE FILE     # in the interpreter "precast" of `derive`

The quantised blocks are random, so no float file has to be quantised. Each layer changes its input only a little. The
model therefore repeats the last token, and its largest logit leads clearly enough for an export to check the answers.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCAB = 49152
_CHUNK = 1 << 26  # bytes of random blocks made at a time


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a llama model: L layers, width D, N query heads, K key/value heads, feed-forward width F."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ff_width: int
    context: int = 2048

    def matrices(self, layer: int) -> Mapping[str, tuple[int, int]]:
        """Return the outputs and inputs of a layer's matrices, by their names in GGUF."""
        kv = self.width // self.heads * self.kv_heads
        return {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_q": (self.width, self.width),
                "attn_k": (kv, self.width),
                "attn_v": (kv, self.width),
                "attn_output": (self.width, self.width),
                "ffn_gate": (self.ff_width, self.width),
                "ffn_up": (self.ff_width, self.width),
                "ffn_down": (self.width, self.ff_width),
            }.items()
        }


SHAPES: Mapping[str, Shape] = {
    "1.2b": Shape(layers=16, width=2048, heads=32, kv_heads=8, ff_width=8192),
    "7b": Shape(layers=32, width=4096, heads=32, kv_heads=8, ff_width=14336),
}


def kind_of(mixture: str, name: str, layer: int, layers: int) -> str:
    """Return the GGUF type of a matrix in a mixture "q8_0", "q4_0" or "q4_k_m", as llama.cpp's quantiser chooses it."""
    if mixture == "q8_0":
        return "Q8_0"
    if "token_embd" in name:
        return "Q6_K"  # also the output head
    if mixture == "q4_0":
        return "Q4_0"
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return "Q6_K" if more and ("attn_v" in name or "ffn_down" in name) else "Q4_K"


# For each type: the offset in bytes of each float16 factor in a block, and the divisor of the factor. A factor of
# 1/divisor gives weights of about one. The second factor of Q4_K scales the minima, and makes the mean of the weights
# zero.
_FACTORS = {"Q8_0": ((0, 73),), "Q4_0": ((0, 4.6),), "Q4_K": ((0, 300), (2, 40)), "Q6_K": ((208, 1400),)}


def random_blocks(rng: np.random.Generator, kind: str, rows: int, columns: int, size: float) -> np.ndarray:
    """Return rows of random blocks, uint8 ``[rows, n]``, for weights of magnitude size/√columns."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = np.empty((rows * columns // weights, block_bytes), np.uint8)
    for start in range(0, len(blocks), max(1, _CHUNK // block_bytes)):
        part = blocks[start : start + max(1, _CHUNK // block_bytes)]
        part[:] = np.frombuffer(rng.bytes(part.size), np.uint8).reshape(part.shape)
    for place, divisor in _FACTORS[kind]:
        blocks[:, place : place + 2] = np.array([size / divisor / columns**0.5], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(shape: Shape, mixture: str, path: Path, like: Path) -> None:
    """Write a GGUF file of a shape and mixture, with the tokenizer of the GGUF file `like`."""
    from gguf import GGUFReader, GGUFWriter
    from gguf.constants import GGMLQuantizationType

    writer, rng = GGUFWriter(path, "llama"), np.random.default_rng(0)
    for key, entry in GGUFReader(like).fields.items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, entry.contents(), entry.types[0], entry.types[-1])
    writer.add_name("random")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ff_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.width, np.float32))

    def matrix(name: str, layer: int, rows: int, columns: int) -> None:
        kind = kind_of(mixture, name, layer, shape.layers)
        if name == "token_embd.weight":
            size = columns**0.5
        else:
            size = 0.1 if name.endswith(("attn_output.weight", "ffn_down.weight")) else 1.0
        blocks = random_blocks(rng, kind, rows, columns, size)
        writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType[kind])

    matrix("token_embd.weight", 0, VOCAB, shape.width)
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.matrices(layer).items():
            matrix(name, layer, rows, columns)
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
    norm("output_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    from precast.exporter.sources import demo
    from precast.loaders.artifact.cache_folder import cache_folder

    shape, mixture, path = sys.argv[1:]
    write(SHAPES[shape], mixture, Path(path), demo.fetch(demo.DEMO, cache_folder() / "demo"))


if __name__ == "__main__":
    main()
