"""Decoder architectures, one file each, named after the checkpoint's ``model_type``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from precast.loaders.artifact.errors import PrecastError

from . import llama, qwen2
from .blocks import DecoderConfig
from .config import ConfigReader
from .decoder import Decoder
from .rope import Rope


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a ``model_type`` is read and built.

    Attributes:
        read_config: from a config to its shape and RoPE; raises PrecastError for what it does not understand.
        module: the Flax module, built from the shape.
    """

    read_config: Callable[[ConfigReader], tuple[DecoderConfig, Rope]]
    module: Callable[[DecoderConfig], Decoder]


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(read_config=llama.read_config, module=Decoder),
    "qwen2": Architecture(read_config=qwen2.read_config, module=Decoder),
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's architecture and shape, before any weights."""

    model_type: str
    config: DecoderConfig
    rope: Rope
    module: Callable[[DecoderConfig], Decoder]


def read_model(config: Mapping[str, object], where: str) -> ModelSpec:
    """Reads a Hugging Face config.

    Args:
        config: its keys.
        where: what messages call it.

    Raises:
        PrecastError: for an unsupported architecture, and for any key that could change the maths and is not
            understood.
    """
    model_type = config.get("model_type")
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise PrecastError(
            f"{where}: architecture {model_type!r} is not supported; expected model_type to be one of"
            f" {', '.join(sorted(ARCHITECTURES))}."
        )
    reader = ConfigReader(config, where)
    shape, rope = architecture.read_config(reader)
    reader.finish()
    _check_shape(shape, where)
    return ModelSpec(model_type=str(model_type), config=shape, rope=rope, module=architecture.module)


def _check_shape(shape: DecoderConfig, where: str) -> None:
    if shape.heads % shape.kv_heads:
        raise PrecastError(
            f"{where}: expected num_attention_heads to be a multiple of num_key_value_heads, found"
            f" {shape.heads} and {shape.kv_heads}."
        )
    if shape.head_dim % 2:
        raise PrecastError(
            f"{where}: expected an even head_dim for rotary positions, found {shape.head_dim}."
        )
