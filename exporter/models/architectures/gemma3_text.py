"""Gemma 3 (Gemma team 2025), text only: every sixth layer has full attention and a larger RoPE base."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..common_keys import FULL, SLIDING, read_windows
from ..config import ConfigReader
from ..rope import Rope, read_rope_by_layer_type
from .gemma2 import adapt, read_gemma

__all__ = ["adapt", "read_config"]


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: gemma3_text`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    config = read_gemma(reader, max_positions=131_072)
    windows = _windows(reader, config.layers)
    config = replace(
        config,
        windows=windows,
        ropes=tuple(int(window > 0) for window in windows),
        qk_norm="head",
        logit_cap=reader.take_nullable_positive("final_logit_softcapping") or 0.0,
    )
    thetas = {FULL: 1_000_000.0, SLIDING: 10_000.0}
    ropes = read_rope_by_layer_type(reader, config.head_dim, config.max_positions, default_thetas=thetas)
    return config, (ropes[FULL], ropes[SLIDING])


def _windows(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    """Return the window of each layer.

    Without ``layer_types``, every layer whose number is a multiple of ``sliding_window_pattern`` has full attention.
    """
    window = reader.take_nullable_size("sliding_window", 4096)
    pattern = reader.take_size("sliding_window_pattern", 6)
    reader.take("_sliding_window_pattern")  # a key that transformers writes beside layer_types
    return read_windows(reader, window, [SLIDING if (i + 1) % pattern else FULL for i in range(layers)])
