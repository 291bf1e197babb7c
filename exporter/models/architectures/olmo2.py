"""OLMo 2 (OLMo team 2024): norms after attention and MLP instead of before; norms of q and k over all heads."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..common_keys import read_common_keys
from ..config import ConfigReader
from ..rope import Rope, read_rope


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: olmo2`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    config = replace(
        read_common_keys(reader, max_positions=2048, norm_eps=1e-5, attention_bias=True),
        qk_norm="all",
    )
    return config, (read_rope(reader, config.head_dim, config.max_positions),)
