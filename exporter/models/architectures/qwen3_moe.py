"""Qwen3's mixtures of experts (Yang et al. 2025)."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..shape import read_mixture, read_shape, same_window
from ..tensors import with_experts_apart as adapt

__all__ = ["adapt", "read_config"]


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: qwen3_moe`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood, and for layers without experts.
    """
    config.expect("mlp_only_layers", [])
    config.expect("decoder_sparse_step", 1)
    for training in ("output_router_logits", "router_aux_loss_coef"):
        config.take(training)
    config.take("max_window_layers")  # of Qwen3; here all layers are alike
    attention_bias = config.take_bool("attention_bias", False)
    shape = read_shape(config, max_positions=32768, kv_heads=4)
    shape = replace(
        shape,
        ff_width=config.take_size("moe_intermediate_size", 768),
        windows=_windows(config, shape.layers),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        qk_norm="head",
        mixture=read_mixture(
            config, experts=128, chosen=8, renormalised=config.take_bool("norm_topk_prob", False)
        ),
    )
    return shape, (read_rope(config, shape.head_dim, shape.max_positions),)


def _windows(config: ConfigReader, layers: int) -> tuple[int, ...]:
    window = config.take_nullable_size("sliding_window", 4096)
    return same_window(window if config.take_bool("use_sliding_window", False) else None, layers)
