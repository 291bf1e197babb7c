"""Write ``mutations.json``: transformers' logits after the change of one key in a tiny checkpoint's config.

Run by hand where torch is installed, after ``make_architectures.py``::

    python tests/reference/make_mutations.py            # write everything again
    python tests/reference/make_mutations.py gemma2     # write this architecture again

The script changes every key of every architecture's config in turn, and adds keys of other versions and models. It
records if transformers refuses a config, or would have to invent or drop weights.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import make_architectures
import make_reference
import numpy as np

# Keys that have no effect on the forward pass, or that select the architecture.
LEFT = ("architectures", "dtype", "model_type", "torch_dtype", "transformers_version")
# Replacements for null and for absent keys.
VALUES: Mapping[str, Any] = {
    "attention_bias": True,
    "attn_logit_softcapping": 2.0,
    "clip_qkv": 0.5,
    "final_logit_softcapping": 3.0,
    "head_dim": 20,
    "layer_types": ["sliding_attention"] * 3,
    "mlp_bias": True,
    "mlp_only_layers": [0],
    "n_inner": 76,
    "no_rope_layer_interval": 2,
    "no_rope_layers": [0, 1, 1],
    "partial_rotary_factor": 0.5,
    "qk_layernorm": True,
    "rope_interleaved": True,
    "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    "rope_theta": 500.0,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "use_bidirectional_attention": True,
    "use_qk_norm": True,
    "use_sliding_window": True,
    "quantization_config": {"quant_method": "fp8"},
}
ROPES: tuple[Mapping[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 3.0, "original_max_position_embeddings": 24},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 24,
    },
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    {"rope_type": "spiral", "rope_theta": 10000.0, "factor": 3.0},
)


def mutations(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Return changes of one key each."""
    for key in sorted(set(config) - set(LEFT)):
        value = config[key]
        if key == "rope_parameters":
            yield from ({key: rope} for rope in _ropes(value))
        elif value is None and key in VALUES:
            yield {key: VALUES[key]}
        else:
            yield from ({key: other} for other in _others(value))
    yield from ({key: VALUES[key]} for key in sorted(set(VALUES) - set(config)))


def _ropes(rope: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "full_attention" not in rope:
        yield from ROPES
        return
    for kind in ("full_attention", "sliding_attention"):
        yield from ({**rope, kind: other} for other in ROPES)


def _others(value: Any) -> list[Any]:
    """Return other values of the same type."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, max(value - 1, 0)]
        case float():
            return [value * 1.5 + 0.1, 0.0]
        case str():
            return ["relu", "gelu"] if "elu" in value or value.startswith("silu") else []
        case [*items] if items:
            return [items[1:] + items[:1], [_flipped(item) for item in items], items[:-1]]
        case _:
            return []


def _flipped(item: Any) -> Any:
    kinds = {"full_attention": "sliding_attention", "sliding_attention": "full_attention", 0: 1, 1: 0}
    return kinds.get(item, item)


def logits(record: Mapping[str, Any], config: Mapping[str, Any]) -> np.ndarray | None:
    """Return the logits after the last prompt and its answer, or None."""
    from transformers import AutoModelForCausalLM

    case = record["cases"][-1]
    with tempfile.TemporaryDirectory() as folder:
        make_architectures.write_checkpoint(Path(folder), record, config)
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype="float32", attn_implementation="eager", output_loading_info=True
            )
            if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
                return None
            found = make_reference.uncached_logits(model.eval(), case["prompt_token_ids"] + case["token_ids"])
        except Exception as error:
            print(f"  {type(error).__name__}: {str(error).splitlines()[0]:.100}")
            return None
    return found[-1, :: make_architectures.STRIDE]


def make(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Return each change with transformers' result: logits, "same", or nothing."""
    before = logits(record, record["config"])
    assert before is not None
    for change in mutations(record["config"]):
        print(record["name"], change)
        after = logits(record, {**record["config"], **change})
        if after is None or not np.isfinite(after).all():
            recorded: Any = None
        elif np.array_equal(before, after):
            recorded = "same"
        else:
            recorded = [round(float(x), 5) for x in after]
        yield {"name": record["name"], "change": change, "logits": recorded}


def main() -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    parser = argparse.ArgumentParser(description="Write what changed configs give.")
    parser.add_argument("model_types", nargs="*", help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    types = dict.fromkeys(tiny.model_type for tiny in make_architectures.tiny_checkpoints())
    rows = []
    for model_type in types:
        record = make_architectures.subject(model_type)
        if options.model_types and model_type not in options.model_types:
            rows += make_architectures.read_mutations(record["name"])
        else:
            rows += make(record)
    text = ",\n".join(map(json.dumps, rows))
    make_architectures.MUTATIONS.write_text(f"[\n{text}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
