"""OLMo 2 (OLMo team 2024): norms behind attention and MLP instead of before them, and over all heads of q and of k."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..shape import read_shape


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: olmo2`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    attention_bias = config.take_bool("attention_bias", False)
    shape = replace(
        read_shape(config, max_positions=2048, norm_eps=1e-5),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        qk_norm="all",
    )
    return shape, (read_rope(config, shape.head_dim, shape.max_positions),)
