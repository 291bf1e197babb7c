"""Llama 1 to 3 and the many models of its shape (Touvron et al. 2023; SmolLM2 among them)."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..shape import read_shape


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: llama`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    config.expect("rope_interleaved", False)
    config.expect("pretraining_tp", 1)
    attention_bias = config.take_bool("attention_bias", False)
    shape = replace(
        read_shape(config, max_positions=2048),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=config.take_bool("mlp_bias", False),
    )
    return shape, (read_rope(config, shape.head_dim, shape.max_positions),)
