"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's shape with biases on q, k and v."""

from .blocks import DecoderConfig
from .config import ConfigReader
from .rope import Rope, read_rope


def read_config(config: ConfigReader) -> tuple[DecoderConfig, Rope]:
    """Reads a ``model_type: qwen2`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood, and for sliding windows.
    """
    config.expect("hidden_act", "silu")
    config.expect("use_mrope", False)
    # Without use_sliding_window the window's other two keys say nothing.
    config.expect("use_sliding_window", False)
    config.take("sliding_window")
    config.take("max_window_layers")
    heads = config.take_size("num_attention_heads")
    width = config.take_size("hidden_size")
    layers = config.take_size("num_hidden_layers")
    config.expect("layer_types", ["full_attention"] * layers)
    shape = DecoderConfig(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=_kv_heads(config, heads),
        head_dim=config.take_size("head_dim", max(width // heads, 1)),
        ff_width=config.take_size("intermediate_size"),
        vocab=config.take_size("vocab_size"),
        max_positions=config.take_size("max_position_embeddings", 32768),
        norm_eps=config.take_number("rms_norm_eps", 1e-6),
        tied_embeddings=config.take_bool("tie_word_embeddings", False),
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
    )
    return shape, read_rope(config, shape.head_dim)


def _kv_heads(config: ConfigReader, heads: int) -> int:
    """transformers has 32 where the key is absent, and one for each query head where it is null."""
    return config.take_size("num_key_value_heads", heads if config.is_null("num_key_value_heads") else 32)
