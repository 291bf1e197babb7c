"""Qwen3 (Yang et al. 2025): Qwen2's layers without biases, with a norm on each head of q and k."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..common_keys import read_common_keys
from ..config import ConfigReader
from ..rope import Rope, read_rope
from .qwen2 import late_windows


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: qwen3`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    config = read_common_keys(reader, max_positions=32768, kv_heads=32, head_dim=128, attention_bias=True)
    config = replace(
        config,
        windows=late_windows(reader, config.layers),
        qk_norm="head",
    )
    return config, (read_rope(reader, config.head_dim, config.max_positions),)
