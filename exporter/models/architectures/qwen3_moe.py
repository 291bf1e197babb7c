"""Qwen3's mixtures of experts (Yang et al. 2025)."""

from dataclasses import replace

from ..blocks import DecoderConfig
from ..common_keys import read_common_keys, read_mixture, uniform_windows
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..tensors import split_experts as adapt

__all__ = ["adapt", "read_config"]


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: qwen3_moe`` config.

    Raises:
        PrecastError: a key has a value that is not supported, such as layers without experts.
    """
    reader.expect("mlp_only_layers", [])
    reader.expect("decoder_sparse_step", 1)
    for training in ("output_router_logits", "router_aux_loss_coef"):
        reader.take(training)
    reader.take("max_window_layers")  # has an effect only in Qwen3; here all layers have the same window
    config = read_common_keys(reader, max_positions=32768, kv_heads=4, attention_bias=True)
    config = replace(
        config,
        ff_width=reader.take_size("moe_intermediate_size", 768),
        windows=_windows(reader, config.layers),
        qk_norm="head",
        mixture=read_mixture(
            reader, experts=128, experts_per_token=8, renormalised=reader.take_bool("norm_topk_prob", False)
        ),
    )
    return config, (read_rope(reader, config.head_dim, config.max_positions),)


def _windows(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    window = reader.take_nullable_size("sliding_window", 4096)
    return uniform_windows(window if reader.take_bool("use_sliding_window", False) else None, layers)
