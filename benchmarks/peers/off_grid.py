"""A float32 GGUF file of a quantised one, whose weights have left the quantised grid.

A published file in 4 bits already lies on the grid of a 4-bit format. A format that happens to share the grid loses
nothing, so such a file says little about the formats. There are two ways off the grid.

"off-grid" multiplies weights by factors that cancel each other, so the model computes the same:

- The weights of the norms before attention and before the feed-forward network are multiplied by random factors
  e^N(0, 0.3); the columns of the matrices behind each norm are divided by them.
- The rows of `ffn_up` and `attn_v` are multiplied by such factors; the columns of `ffn_down` and `attn_output` that
  read them are divided by them.

"dithered" adds noise, so the model becomes another one: each weight of a layer's matrix moves by at most half a step of
the 4-bit grid of its block of 32, uniformly. A method that only undoes factors gains nothing there.

The embedding keeps its values, because it is also the output head.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SPREAD, SEED = 0.3, 0
VARIANTS = ("off-grid", "dithered", "published")
_BLOCK, _LEVELS = 32, 16
# The matrices behind each norm of a layer, by their names in GGUF.
_BEHIND = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}


def change_layer(layer: dict[str, np.ndarray], heads: int, kv_heads: int, rng: np.random.Generator) -> None:
    """Change a layer's float32 arrays in place, so that the layer computes the same.

    Args:
        layer: the arrays by their names in GGUF ("attn_q"): norms ``[D]``, matrices ``[out, in]``.
        heads: N, the number of query heads.
        kv_heads: K, the number of key/value heads.
        rng: the source of the factors.
    """
    for norm, matrices in _BEHIND.items():
        factors = _factors(rng, len(layer[norm]))
        layer[norm] *= factors
        for name in matrices:
            layer[name] /= factors
    factors = _factors(rng, len(layer["ffn_up"]))
    layer["ffn_up"] *= factors[:, None]
    layer["ffn_down"] /= factors
    factors = _factors(rng, len(layer["attn_v"]))
    layer["attn_v"] *= factors[:, None]
    layer["attn_output"] /= np.repeat(factors.reshape(kv_heads, -1), heads // kv_heads, axis=0).reshape(-1)


def dither_layer(layer: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Add noise to a layer's matrices ``[out, in]`` in place: half a step of each block's grid at most."""
    for array in layer.values():
        if array.ndim == 2:
            blocks = array.reshape(len(array), -1, _BLOCK)
            steps = np.ptp(blocks, axis=2, keepdims=True) / (_LEVELS - 1)
            blocks += steps * rng.uniform(-0.5, 0.5, blocks.shape).astype(np.float32)


def _factors(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.exp(rng.normal(0, SPREAD, count)).astype(np.float32)


def write(source: Path, target: Path, variant: str) -> None:
    """Write the float32 GGUF file of a quantised one.

    Args:
        source: the quantised file.
        target: the file to write.
        variant: one of `VARIANTS`; "published" keeps the values.
    """
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(source)
    metadata = {key: entry.contents() for key, entry in reader.fields.items()}
    architecture = metadata["general.architecture"]
    writer = GGUFWriter(target, architecture, use_temp_file=True)
    for key, entry in reader.fields.items():
        # The writer adds the keys of the container and of the architecture itself. 0 means float32.
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = 0 if key == "general.file_type" else entry.contents()
            writer.add_key_value(key, value, entry.types[0], entry.types[-1])
    heads, kv_heads = (metadata[f"{architecture}.attention.head_count{suffix}"] for suffix in ("", "_kv"))
    rng = np.random.default_rng(SEED)
    for prefix, arrays in _groups(reader):
        if prefix and variant == "off-grid":
            change_layer(arrays, heads, kv_heads, rng)
        elif prefix and variant == "dithered":
            dither_layer(arrays, rng)
        for name, array in arrays.items():
            writer.add_tensor(f"{prefix}{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _groups(reader: Any) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield the float32 arrays of each layer with the layer's prefix ("blk.0."), and all others with an empty one."""
    from gguf.quants import dequantize

    by_prefix: dict[str, list] = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        if kind != "weight":
            raise SystemExit(f"{tensor.name}: expected weights alone, found another kind of tensor.")
        prefix = stem[: stem.rindex(".") + 1] if stem.startswith("blk.") else ""
        by_prefix.setdefault(prefix, []).append((stem.removeprefix(prefix), tensor))
    for prefix, tensors in by_prefix.items():
        yield (
            prefix,
            {
                name: np.array(dequantize(t.data, t.tensor_type), np.float32).reshape(t.shape[::-1])
                for name, t in tensors
            },
        )
