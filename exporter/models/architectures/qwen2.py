"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's shape with biases on q, k and v."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..shape import FULL, SLIDING, read_shape, read_windows


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: qwen2`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    config.expect("use_mrope", False)
    shape = read_shape(config, max_positions=32768, kv_heads=32)
    shape = replace(shape, windows=late_windows(config, shape.layers), qkv_bias=True)
    return shape, (read_rope(config, shape.head_dim, shape.max_positions),)


def late_windows(config: ConfigReader, layers: int) -> tuple[int, ...]:
    """The window of each layer: only layers from ``max_window_layers`` on have one, and only where it is in use."""
    if not config.take_bool("use_sliding_window", False):
        config.take("sliding_window")
        config.take("max_window_layers")
        return read_windows(config, None, [FULL] * layers)
    window = config.take_nullable_size("sliding_window", 4096)
    first = config.take_size("max_window_layers", 28, least=0)
    late = layers if window is None else first
    return read_windows(config, window, [SLIDING if i >= late else FULL for i in range(layers)])
