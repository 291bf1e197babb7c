"""Granite 3 (IBM 2024): Llama's layers with four multipliers."""

from dataclasses import dataclass

from ..blocks import DecoderConfig
from ..common_keys import read_common_keys
from ..config import ConfigReader
from ..rope import Rope, read_rope
from ..tensors import Tensors, scale

# Parameters of the projections that write to the residual stream.
_RESIDUAL = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(DecoderConfig):
    """A decoder's config with Granite's residual multiplier.

    Attributes:
        residual_scale: factor by which a layer multiplies the results of attention and MLP, before it adds them to
            the residual stream; `adapt` folds it into the weights.
    """

    residual_scale: float = 1.0


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: granite`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    fields = {
        **vars(read_common_keys(reader, max_positions=2048, attention_bias=True, mlp_bias=True)),
        "attention_scale": reader.take_positive("attention_multiplier", 1.0),
        "embedding_scale": reader.take_positive("embedding_multiplier", 1.0),
        "logit_scale": 1.0 / reader.take_positive("logits_scaling", 1.0),
        "residual_scale": reader.take_positive("residual_multiplier", 1.0),
    }
    config = GraniteConfig(**fields)
    return config, (read_rope(reader, config.head_dim, config.max_positions),)


def adapt(tensors: Tensors, config: DecoderConfig) -> Tensors:
    """Fold the residual multiplier into the weights, so that no layer has to scale a result."""
    assert isinstance(config, GraniteConfig)
    factor = config.residual_scale
    if factor == 1.0:
        return tensors
    return {name: scale(t, factor) if name.endswith(_RESIDUAL) else t for name, t in tensors.items()}
