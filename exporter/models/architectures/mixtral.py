"""Mixtral (Jiang et al. 2024): Mistral's shape, the MLP a mixture of experts."""

from dataclasses import replace

from ...sources.base import SourceTensor
from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..shape import read_mixture, read_shape, same_window
from ..tensors import Tensors, take, with_experts_apart


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: mixtral`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    for training in ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"):
        config.take(training)
    shape = read_shape(config, max_positions=131_072, norm_eps=1e-5, kv_heads=8)
    shape = replace(
        shape,
        windows=same_window(config.take_nullable_size("sliding_window"), shape.layers),
        mixture=read_mixture(config, experts=8, chosen=2, renormalised=True),
    )
    return shape, (read_rope(config, shape.head_dim, shape.max_positions, default_theta=1_000_000.0),)


def adapt(tensors: Tensors, c: DecoderConfig) -> Tensors:
    """The names that Qwen3's mixtures have; newer checkpoints have them already."""
    assert c.mixture is not None
    if not any(".block_sparse_moe." in name for name in tensors):
        return with_experts_apart(tensors, c)
    left, made = dict(tensors), dict[str, SourceTensor]()
    inner, outer = (c.ff_width, c.width), (c.width, c.ff_width)
    parts = (("w1", "gate_proj", inner), ("w3", "up_proj", inner), ("w2", "down_proj", outer))
    for i in range(c.layers):
        old, new = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp."
        made[f"{new}gate.weight"] = take(left, f"{old}gate.weight", (c.mixture.experts, c.width))
        for e in range(c.mixture.experts):
            for theirs, ours, shape in parts:
                tensor = take(left, f"{old}experts.{e}.{theirs}.weight", shape)
                made[f"{new}experts.{e}.{ours}.weight"] = tensor
    return left | made
