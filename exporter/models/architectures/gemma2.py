"""Gemma 2 (Gemma team 2024): windows in every other layer, capped scores and logits, four norms per layer."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..common_keys import ACTIVATIONS, FULL, SLIDING, read_common_keys, read_windows
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..tensors import Tensors, add_one_to_norms


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: gemma2`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    config = read_gemma(reader, max_positions=8192)
    window = reader.take_nullable_size("sliding_window", 4096)
    types = [FULL if i % 2 else SLIDING for i in range(config.layers)]
    config = replace(
        config,
        windows=read_windows(reader, window, types),
        attention_cap=reader.take_nullable_positive("attn_logit_softcapping", 50.0) or 0.0,
        logit_cap=reader.take_nullable_positive("final_logit_softcapping", 30.0) or 0.0,
    )
    return config, (read_rope(reader, config.head_dim, config.max_positions),)


def read_gemma(reader: ConfigReader, *, max_positions: int) -> DecoderConfig:
    """Read the keys that Gemma 2 and 3 share."""
    reader.expect("use_bidirectional_attention", False)
    # The key of Gemma 1; hidden_activation replaces it.
    reader.expect("hidden_act", "gelu_pytorch_tanh", "gelu")
    config = read_common_keys(
        reader, max_positions=max_positions, kv_heads=4, head_dim=256, tied=True, attention_bias=True
    )
    return replace(
        config,
        activation=reader.take_choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        attention_scale=reader.take_positive("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=config.width**0.5,
    )


def adapt(tensors: Tensors, _: DecoderConfig) -> Tensors:
    """Add one to the weights of norms, because checkpoints store each weight minus one."""
    return add_one_to_norms(tensors)
