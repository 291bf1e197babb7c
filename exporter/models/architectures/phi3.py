"""Phi-3 and Phi-4 mini (Abdin et al. 2024): Llama's layers with fused projections."""

from dataclasses import replace

from ...sources.base import SourceTensor
from ..blocks import DecoderConfig
from ..common_keys import read_common_keys, uniform_windows
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..tensors import Tensors, split_rows, take

# Early configs call LongRoPE "su" or "yarn"; transformers refuses all other types.
_ROPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: phi3`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        reader.expect(bias, False)
    # Phi-4 mini's configs contain these keys to disable features of related models.
    reader.expect("full_attn_mod", 1)
    reader.expect("interpolate_factor", 1)
    # In published configs, auto_map names Python code in the checkpoint. transformers and precast ignore that code,
    # because transformers has its own class for phi3.
    reader.take("auto_map")
    config = read_common_keys(reader, max_positions=4096, norm_eps=1e-5)
    window = reader.take_nullable_size("sliding_window")
    config = replace(config, windows=uniform_windows(window, config.layers))
    rope = read_rope(
        reader, config.head_dim, config.max_positions, partial=True, original_positions=4096, types=_ROPES
    )
    return config, (rope,)


def adapt(tensors: Tensors, config: DecoderConfig) -> Tensors:
    """Split the fused projections into q, k and v, and into gate and up."""
    left, made = dict(tensors), dict[str, SourceTensor]()
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for i in range(config.layers):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        fused = take(left, f"{attn}qkv_proj.weight", (queries + 2 * keys, config.width))
        names = [f"{attn}{part}_proj.weight" for part in "qkv"]
        made |= split_rows(fused, dict(zip(names, (queries, keys, keys), strict=True)))
        fused = take(left, f"{mlp}gate_up_proj.weight", (2 * config.ff_width, config.width))
        made |= split_rows(fused, {f"{mlp}{part}_proj.weight": config.ff_width for part in ("gate", "up")})
    return left | made
