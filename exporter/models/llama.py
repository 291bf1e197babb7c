"""Llama 1 to 3 and the many models of its shape (Touvron et al. 2023; SmolLM2 among them)."""

from .blocks import DecoderConfig
from .config import ConfigReader
from .rope import Rope, read_rope


def read_config(config: ConfigReader) -> tuple[DecoderConfig, Rope]:
    """Reads a ``model_type: llama`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    config.expect("hidden_act", "silu")
    config.expect("rope_interleaved", False)
    config.expect("pretraining_tp", 1)
    heads = config.take_size("num_attention_heads")
    width = config.take_size("hidden_size")
    attention_bias = config.take_bool("attention_bias", False)
    shape = DecoderConfig(
        layers=config.take_size("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=config.take_size("num_key_value_heads", heads),
        head_dim=config.take_size("head_dim", max(width // heads, 1)),
        ff_width=config.take_size("intermediate_size"),
        vocab=config.take_size("vocab_size"),
        max_positions=config.take_size("max_position_embeddings", 2048),
        norm_eps=config.take_number("rms_norm_eps", 1e-6),
        tied_embeddings=config.take_bool("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=config.take_bool("mlp_bias", False),
    )
    return shape, read_rope(config, shape.head_dim)
