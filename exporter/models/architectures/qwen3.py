"""Qwen3 (Yang et al. 2025): Qwen2's shape without its biases, each head of q and k normed."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..shape import read_shape
from .qwen2 import late_windows


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: qwen3`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    attention_bias = config.take_bool("attention_bias", False)
    shape = read_shape(config, max_positions=32768, kv_heads=32, head_dim=128)
    shape = replace(
        shape,
        windows=late_windows(config, shape.layers),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        qk_norm="head",
    )
    return shape, (read_rope(config, shape.head_dim, shape.max_positions),)
