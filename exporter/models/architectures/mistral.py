"""Mistral (Jiang et al. 2023): Llama's shape, every layer with a window."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..shape import read_shape, same_window


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: mistral`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    shape = read_shape(config, max_positions=131_072, kv_heads=8)
    # Later models say null, which is not the same as nothing.
    window = config.take_nullable_size("sliding_window", 4096)
    shape = replace(shape, windows=same_window(window, shape.layers))
    return shape, (read_rope(config, shape.head_dim, shape.max_positions),)
