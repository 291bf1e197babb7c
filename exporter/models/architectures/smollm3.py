"""SmolLM3 (Hugging Face 2025): Llama's shape, every fourth layer without positions (Yang et al. 2025, NoPE)."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, no_rope, read_rope
from ..shape import FULL, SLIDING, read_shape, read_windows


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: smollm3`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    # Both are in the published config, and neither is ever read.
    config.take("pretraining_tp")
    config.take("max_window_layers")
    attention_bias = config.take_bool("attention_bias", False)
    shape = read_shape(config, max_positions=32768, kv_heads=4, tied=True)
    turned = _turned(config, shape.layers)
    shape = replace(
        shape,
        windows=_windows(config, turned),
        ropes=() if all(turned) else tuple(0 if turns else 1 for turns in turned),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=config.take_bool("mlp_bias", False),
    )
    rope = read_rope(config, shape.head_dim, shape.max_positions, default_theta=2_000_000.0)
    return shape, (rope, no_rope(shape.head_dim)) if shape.ropes else (rope,)


def _turned(config: ConfigReader, layers: int) -> list[bool]:
    """Whether each layer turns its heads, which is what a 1 in ``no_rope_layers`` means."""
    interval = config.take_size("no_rope_layer_interval", 4)
    found = config.take("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])
    if not isinstance(found, list) or len(found) < layers or any(turns not in (0, 1) for turns in found):
        raise config.wrong("no_rope_layers", f"0 or 1 for each of {layers} layers", found)
    return [bool(turns) for turns in found[:layers]]


def _windows(config: ConfigReader, turned: list[bool]) -> tuple[int, ...]:
    """The window of each layer; where it is in use, layers without positions have one."""
    window = config.take_nullable_size("sliding_window")
    if not config.take_bool("use_sliding_window", False):
        window = None
    return read_windows(config, window, [FULL if turns or window is None else SLIDING for turns in turned])
