"""SmolLM3 (Hugging Face 2025): Llama's layers, every fourth without RoPE (Yang et al. 2025, NoPE)."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..common_keys import FULL, SLIDING, read_common_keys, read_windows
from ..config import ConfigReader
from ..rope import Rope, no_rope, read_rope


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: smollm3`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    # The published config has these two keys, but transformers reads neither.
    reader.take("pretraining_tp")
    reader.take("max_window_layers")
    config = read_common_keys(
        reader, max_positions=32768, kv_heads=4, tied=True, attention_bias=True, mlp_bias=True
    )
    has_rope = _layers_with_rope(reader, config.layers)
    config = replace(
        config,
        windows=_windows(reader, has_rope),
        ropes=() if all(has_rope) else tuple(0 if rotated else 1 for rotated in has_rope),
    )
    rope = read_rope(reader, config.head_dim, config.max_positions, default_theta=2_000_000.0)
    return config, (rope, no_rope(config.head_dim)) if config.ropes else (rope,)


def _layers_with_rope(reader: ConfigReader, layers: int) -> list[bool]:
    """Return a boolean for each layer: True if it uses RoPE.

    Despite its name, ``no_rope_layers`` has a 1 for layers with RoPE and a 0 for layers without it.
    """
    interval = reader.take_size("no_rope_layer_interval", 4)
    found = reader.take("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])
    if not isinstance(found, list) or len(found) < layers or any(flag not in (0, 1) for flag in found):
        raise reader.wrong("no_rope_layers", f"0 or 1 for each of {layers} layers", found)
    return [bool(flag) for flag in found[:layers]]


def _windows(reader: ConfigReader, has_rope: list[bool]) -> tuple[int, ...]:
    """Return the window of each layer.

    If ``use_sliding_window`` is true and ``layer_types`` is absent, the layers without RoPE have a window.
    """
    window = reader.take_nullable_size("sliding_window")
    if not reader.take_bool("use_sliding_window", False):
        window = None
    return read_windows(
        reader, window, [FULL if rotated or window is None else SLIDING for rotated in has_rope]
    )
