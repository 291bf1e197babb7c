"""Lower bounds on times, from the bytes that a decode step reads and the operations of a prompt."""

from collections.abc import Mapping
from math import prod

DTYPE_BYTES = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}


def decode_program(manifest: Mapping) -> Mapping:
    """Return the decode program of an artifact's first compiled target."""
    target = next(t for t in manifest["targets"] if t["runtime"] == "pjrt")
    return next(p for p in target["programs"] if p["kind"] == "decode")


def weight_bytes(manifest: Mapping) -> int:
    """Return the number of bytes of weights that a decode step reads.

    If the output head has separate weights, the embedding counts as 0, because a step reads only one row of it.
    """
    arguments = [a for a in decode_program(manifest)["arguments"] if a["role"] == "weight"]
    untied = any(a["name"].startswith("lm_head.") for a in arguments)
    read = [a for a in arguments if not (untied and a["name"].startswith("model.embed_tokens."))]
    return sum(prod(a["shape"]) * DTYPE_BYTES[a["dtype"]] for a in read)


def cache_bytes(manifest: Mapping, filled: float) -> float:
    """Return the number of bytes that a step of one sequence reads from a KV cache with `filled` positions."""
    return sum(_cache_array_bytes(array, filled) for array in manifest["cache"])


def _cache_array_bytes(array: Mapping, filled: float) -> float:
    sizes = dict(zip(array["axes"], array["shape"], strict=True))
    return array["bytes"] / sizes["B"] / sizes["S"] * min(filled, array.get("window") or sizes["S"])


def decode_share(manifest: Mapping, step_s: float, filled: float, bytes_per_s: float) -> float:
    """Return the minimum time to read the weights and the filled cache, as a share of the measured time `step_s`."""
    return (weight_bytes(manifest) + cache_bytes(manifest, filled)) / bytes_per_s / step_s


def prompt_operations(model: Mapping, tokens: int) -> int:
    """Count the multiplications and additions for a prompt: projections, causal attention, and the last logits."""
    attention, key_values = model["heads"] * model["head_dim"], model["kv_heads"] * model["head_dim"]
    projections = model["width"] * (2 * attention + 2 * key_values) + 3 * model["width"] * model["ff_width"]
    scores = 2 * attention * (tokens + 1) // 2
    return 2 * (model["layers"] * tokens * (projections + scores) + model["vocab"] * model["width"])


def int8_peak(peak: Mapping[str, float]) -> float:
    """Return the operations per second of the fastest int8 loop."""
    return max(value for name, value in peak.items() if name.startswith("int8_"))


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the minimum, the maximum and the number of the values."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {"median": median, "min": ordered[0], "max": ordered[-1], "rounds": len(ordered)}
