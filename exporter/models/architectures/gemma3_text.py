"""Gemma 3 (Gemma team 2025), its text alone: every sixth layer sees everything, and turns its heads more slowly."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope_by_layer_type
from ..shape import FULL, SLIDING, read_windows
from .gemma2 import adapt, read_gemma

__all__ = ["adapt", "read_config"]


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: gemma3_text`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    shape = read_gemma(config, max_positions=131_072)
    windows = _windows(config, shape.layers)
    shape = replace(
        shape,
        windows=windows,
        ropes=tuple(int(window > 0) for window in windows),
        qk_norm="head",
        logit_cap=config.take_nullable_positive("final_logit_softcapping") or 0.0,
    )
    thetas = {FULL: 1_000_000.0, SLIDING: 10_000.0}
    ropes = read_rope_by_layer_type(config, shape.head_dim, shape.max_positions, default_thetas=thetas)
    return shape, (ropes[FULL], ropes[SLIDING])


def _windows(config: ConfigReader, layers: int) -> tuple[int, ...]:
    """The window of each layer; the last of as many as the pattern says has none."""
    window = config.take_nullable_size("sliding_window", 4096)
    pattern = config.take_size("sliding_window_pattern", 6)
    config.take("_sliding_window_pattern")  # as transformers writes it, beside the layer_types made of it
    return read_windows(config, window, [SLIDING if (i + 1) % pattern else FULL for i in range(layers)])
