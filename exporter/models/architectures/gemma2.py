"""Gemma 2 (Gemma team 2024): every other layer with a window, scores and logits capped, norms before and behind."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..shape import ACTIVATIONS, FULL, SLIDING, read_shape, read_windows
from ..tensors import Tensors, with_norms_plus_one


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: gemma2`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    shape = read_gemma(config, max_positions=8192)
    window = config.take_nullable_size("sliding_window", 4096)
    types = [FULL if i % 2 else SLIDING for i in range(shape.layers)]
    shape = replace(
        shape,
        windows=read_windows(config, window, types),
        attention_cap=config.take_nullable_positive("attn_logit_softcapping", 50.0) or 0.0,
        logit_cap=config.take_nullable_positive("final_logit_softcapping", 30.0) or 0.0,
    )
    return shape, (read_rope(config, shape.head_dim, shape.max_positions),)


def read_gemma(config: ConfigReader, *, max_positions: int) -> DecoderConfig:
    """What Gemma 2 and 3 have in common."""
    config.expect("use_bidirectional_attention", False)
    # The activation of Gemma 1, which hidden_activation has taken the place of.
    config.expect("hidden_act", "gelu_pytorch_tanh", "gelu")
    attention_bias = config.take_bool("attention_bias", False)
    shape = read_shape(config, max_positions=max_positions, kv_heads=4, head_dim=256, tied=True)
    return replace(
        shape,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        activation=config.take_choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        attention_scale=config.take_positive("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=shape.width**0.5,
    )


def adapt(tensors: Tensors, _: DecoderConfig) -> Tensors:
    """Norms multiply by 1 + their weight."""
    return with_norms_plus_one(tensors)
