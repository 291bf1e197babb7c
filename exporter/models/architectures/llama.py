"""Llama 1 to 3 (Touvron et al. 2023), and the many models with the same layers, such as SmolLM2."""

from ..blocks import DecoderConfig
from ..common_keys import read_common_keys
from ..config import ConfigReader
from ..rope import Rope, read_rope


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: llama`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    reader.expect("rope_interleaved", False)
    reader.expect("pretraining_tp", 1)
    config = read_common_keys(reader, max_positions=2048, attention_bias=True, mlp_bias=True)
    return config, (read_rope(reader, config.head_dim, config.max_positions),)
