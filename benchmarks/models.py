"""Compute the disk space, memory and speed of models of 135M to 8B parameters from their published shapes.

A decode step reads every weight and the filled part of the KV cache once. The number of steps per second is therefore
at most the memory bandwidth divided by these bytes. The table shows this limit, multiplied by the share of the limit
that precast reached in peers.json. The sizes of weights are exact.

    python benchmarks/models.py

Prints a Markdown table.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precast.exporter.models.registry import read_model
from precast.exporter.programs import Geometry, cache_arrays, stored_model
from precast.exporter.weights import stored_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
CONFIGS = ROOT / "tests" / "exporter" / "published_configs.json"

# Positions of the KV cache, and the number of filled positions halfway through 64 steps after a prompt of 128 tokens.
CONTEXT, FILLED = 2048, 160
# Memory of Python, jaxlib, NumPy and XLA's buffers, without weights and KV cache.
PROCESS_BYTES = 150e6

# Changes that turn the published config of Llama-3.1-70B, which has the same keys, into that of a smaller model.
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
MODELS: tuple[tuple[str, str, Mapping[str, object]], ...] = (
    ("SmolLM2-135M", "SmolLM2-135M", {}),
    ("Qwen2.5-0.5B", "Qwen2.5-0.5B", {}),
    ("Llama-3.2-1B", "Llama-3.1-70B", _LLAMA_1B),
    ("gemma-2-2b", "gemma-2-2b", {}),
    ("SmolLM3-3B", "SmolLM3-3B", {}),
    ("Mistral-7B", "Mistral-7B-v0.1", {}),
    ("Llama-3.1-8B", "Llama-3.1-70B", _LLAMA_8B),
)


def sizes(config: Mapping[str, Any], name: str, weights: str) -> tuple[int, int, int]:
    """Return three sizes in bytes: a model's weights, its whole KV cache, and the data that a decode step reads."""
    spec = read_model(config, name)
    model = stored_model(spec, weights)
    stored = stored_bytes(model.parameters, model.formats)
    embedding = [p for p in model.parameters if p.name == "model.embed_tokens.weight"]
    has_head = any(p.name.startswith("lm_head.") for p in model.parameters)
    # If the output head has separate weights, a step reads only one row of the embedding.
    skipped = stored_bytes(embedding, model.formats) if has_head else 0
    geometry = Geometry(context=CONTEXT, slots=1, buckets=(64, 128, 512), kv_cache="bfloat16")
    cache = [
        (array.bytes, array.shape[array.axes.index("S")]) for array in cache_arrays(spec.config, geometry)
    ]
    filled = sum(taken * FILLED // positions for taken, positions in cache)
    return stored, sum(taken for taken, _ in cache), stored - skipped + filled


def row(name: str, config: Mapping[str, Any], measured: Mapping) -> str:
    """Return a model's row of the table."""
    cells = []
    for weights in ("int8", "int4"):
        disk, cache, read = sizes(config, name, weights)
        share = measured["contenders"][f"precast-{weights}"]["prompts"]["128"]["decode_share"]["median"]
        speed = share * measured["machine"]["read_bytes_per_s"]["median"] / read
        memory = disk + cache + PROCESS_BYTES
        cells.append((f"{disk / 1e9:.2f}", f"{memory / 1e9:.1f}", f"{speed:.{int(speed < 10)}f}"))
    return f"| {name} | " + " | ".join(f"{a} / {b}" for a, b in zip(*cells, strict=True)) + " |"


def table() -> str:
    """Return the README's table of models."""
    measured = json.loads(RESULTS.read_text())
    published = json.loads(CONFIGS.read_text())
    head = (
        "| model | disk, GB | memory, GB | decode, tokens/s |",
        "|---|---:|---:|---:|",
    )
    rows = (row(name, published[base]["config"] | dict(changes), measured) for name, base, changes in MODELS)
    return "\n".join((*head, *rows))


if __name__ == "__main__":
    print(table())
