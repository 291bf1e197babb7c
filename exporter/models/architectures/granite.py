"""Granite 3 (IBM 2024): Llama's shape with four multipliers."""

from dataclasses import dataclass

from ..blocks import DecoderConfig
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..shape import read_shape
from ..tensors import Tensors, scaled

# Whose results are multiplied before they are added to what went in.
_ADDED = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(DecoderConfig):
    """A decoder's shape.

    Attributes:
        residual_scale: what the results of attention and MLP are multiplied by. `adapt` folds it into the weights.
    """

    residual_scale: float = 1.0


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: granite`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    attention_bias = config.take_bool("attention_bias", False)
    said = {
        **vars(read_shape(config, max_positions=2048)),
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": config.take_bool("mlp_bias", False),
        "attention_scale": config.take_positive("attention_multiplier", 1.0),
        "embedding_scale": config.take_positive("embedding_multiplier", 1.0),
        "logit_scale": 1.0 / config.take_positive("logits_scaling", 1.0),
        "residual_scale": config.take_positive("residual_multiplier", 1.0),
    }
    shape = GraniteConfig(**said)
    return shape, (read_rope(config, shape.head_dim, shape.max_positions),)


def adapt(tensors: Tensors, config: DecoderConfig) -> Tensors:
    """Multiplies what is added to the residual in its weights, once, rather than in every step."""
    assert isinstance(config, GraniteConfig)
    factor = config.residual_scale
    if factor == 1.0:
        return tensors
    return {name: scaled(t, factor) if name.endswith(_ADDED) else t for name, t in tensors.items()}
