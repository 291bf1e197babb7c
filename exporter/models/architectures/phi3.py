"""Phi-3 and Phi-4 mini (Abdin et al. 2024): Llama's shape, its projections fused."""

from dataclasses import replace

from ...sources.base import SourceTensor
from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..shape import read_shape, same_window
from ..tensors import Tensors, split_rows, take

# LongRoPE went by other names in the first configs, YaRN's among them; anything else transformers refuses.
_ROPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: phi3`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        config.expect(bias, False)
    # Of Phi-4 mini, for what other models of its kind do and it does not.
    config.expect("full_attn_mod", 1)
    config.expect("interpolate_factor", 1)
    # Published configs name code that came with them. transformers, which has this model itself, runs its own.
    config.take("auto_map")
    shape = read_shape(config, max_positions=4096, norm_eps=1e-5)
    window = config.take_nullable_size("sliding_window")
    shape = replace(shape, windows=same_window(window, shape.layers))
    rope = read_rope(
        config, shape.head_dim, shape.max_positions, partial=True, original_positions=4096, types=_ROPES
    )
    return shape, (rope,)


def adapt(tensors: Tensors, c: DecoderConfig) -> Tensors:
    """Cuts q, k and v apart, and gate and up."""
    left, made = dict(tensors), dict[str, SourceTensor]()
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i in range(c.layers):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        fused = take(left, f"{attn}qkv_proj.weight", (queries + 2 * keys, c.width))
        names = [f"{attn}{part}_proj.weight" for part in "qkv"]
        made |= split_rows(fused, dict(zip(names, (queries, keys, keys), strict=True)))
        fused = take(left, f"{mlp}gate_up_proj.weight", (2 * c.ff_width, c.width))
        made |= split_rows(fused, {f"{mlp}{part}_proj.weight": c.ff_width for part in ("gate", "up")})
    return left | made
