"""Mistral (Jiang et al. 2023): Llama's layers with sliding-window attention."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..common_keys import read_common_keys, uniform_windows
from ..config import ConfigReader
from ..rope import Rope, read_rope


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: mistral`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    config = read_common_keys(reader, max_positions=131_072, kv_heads=8)
    # The key is null in later models, which means no window. If it is absent, the window is 4096.
    window = reader.take_nullable_size("sliding_window", 4096)
    config = replace(config, windows=uniform_windows(window, config.layers))
    return config, (read_rope(reader, config.head_dim, config.max_positions),)
