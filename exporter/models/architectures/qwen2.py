"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's layers with biases on q, k and v."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..common_keys import FULL, SLIDING, read_common_keys, read_windows
from ..config import ConfigReader
from ..rope import Rope, read_rope


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: qwen2`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    reader.expect("use_mrope", False)
    config = read_common_keys(reader, max_positions=32768, kv_heads=32)
    config = replace(config, windows=late_windows(reader, config.layers), qkv_bias=True)
    return config, (read_rope(reader, config.head_dim, config.max_positions),)


def late_windows(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    """Return the window of each layer.

    If ``use_sliding_window`` is true and ``layer_types`` is absent, all layers except the first ``max_window_layers``
    have a window.
    """
    if not reader.take_bool("use_sliding_window", False):
        reader.take("sliding_window")
        reader.take("max_window_layers")
        return read_windows(reader, None, [FULL] * layers)
    window = reader.take_nullable_size("sliding_window", 4096)
    first = reader.take_size("max_window_layers", 28, least=0)
    late = layers if window is None else first
    return read_windows(reader, window, [SLIDING if i >= late else FULL for i in range(layers)])
