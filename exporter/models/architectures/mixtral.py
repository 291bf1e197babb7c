"""Mixtral (Jiang et al. 2024): Mistral's layers with a mixture of experts as MLP."""

from dataclasses import replace

from ...sources.base import SourceTensor
from ..blocks import DecoderConfig
from ..common_keys import read_common_keys, read_mixture, uniform_windows
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..tensors import Tensors, split_experts, take


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: mixtral`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    for training in ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"):
        reader.take(training)
    config = read_common_keys(reader, max_positions=131_072, norm_eps=1e-5, kv_heads=8)
    config = replace(
        config,
        windows=uniform_windows(reader.take_nullable_size("sliding_window"), config.layers),
        mixture=read_mixture(reader, experts=8, experts_per_token=2, renormalised=True),
    )
    return config, (read_rope(reader, config.head_dim, config.max_positions, default_theta=1_000_000.0),)


def adapt(tensors: Tensors, config: DecoderConfig) -> Tensors:
    """Give the experts' tensors the names of Qwen3 MoE, which newer Mixtral checkpoints already use."""
    assert config.mixture is not None
    if not any(".block_sparse_moe." in name for name in tensors):
        return split_experts(tensors, config)
    left, renamed = dict(tensors), dict[str, SourceTensor]()
    inner, outer = (config.ff_width, config.width), (config.width, config.ff_width)
    parts = (("w1", "gate_proj", inner), ("w3", "up_proj", inner), ("w2", "down_proj", outer))
    for i in range(config.layers):
        old, new = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp."
        renamed[f"{new}gate.weight"] = take(left, f"{old}gate.weight", (config.mixture.experts, config.width))
        for e in range(config.mixture.experts):
            for old_part, new_part, shape in parts:
                tensor = take(left, f"{old}experts.{e}.{old_part}.weight", shape)
                renamed[f"{new}experts.{e}.{new_part}.weight"] = tensor
    return left | renamed
