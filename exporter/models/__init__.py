"""Decoder architectures, one file each, named after the checkpoint's ``model_type``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from ..sources.base import Source
from .architectures import (
    gemma2,
    gemma3_text,
    gpt2,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from .blocks import DecoderConfig, LayerNorm, PostNormLayers, PreNormLayers, SandwichLayers
from .config import ConfigReader
from .decoder import Decoder
from .names import Names
from .rope import Rope
from .shape import check_layer_types
from .tensors import Tensors


def _as_they_are(tensors: Tensors, _: DecoderConfig) -> Tensors:
    return tensors


_NAMES = Names()


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a ``model_type`` is read and built.

    Attributes:
        read_config: returns the shape and the RoPE of the layers (indexed by ``shape.ropes``) for a config; raises
            PrecastError for keys that it does not understand.
        module: the Flax module, built from the shape.
        adapt: a checkpoint's tensors under the module's names, cut and folded as it takes them.
        names: names that its checkpoints have.
    """

    read_config: Callable[[ConfigReader], tuple[DecoderConfig, tuple[Rope, ...]]]
    module: Callable[[DecoderConfig], Decoder]
    adapt: Callable[[Tensors, DecoderConfig], Tensors] = _as_they_are
    names: Names = _NAMES


_PRE_NORM = partial(Decoder, layers=PreNormLayers)
_POST_NORM = partial(Decoder, layers=PostNormLayers)
_SANDWICH = partial(Decoder, layers=SandwichLayers)
_GPT2 = partial(Decoder, layers=gpt2.GPT2Layers, norm=LayerNorm)

ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma2": Architecture(read_config=gemma2.read_config, module=_SANDWICH, adapt=gemma2.adapt),
    "gemma3_text": Architecture(
        read_config=gemma3_text.read_config, module=_SANDWICH, adapt=gemma3_text.adapt
    ),
    "gpt2": Architecture(
        read_config=gpt2.read_config,
        module=_GPT2,
        adapt=gpt2.adapt,
        names=Names(body="transformer", embedding="wte", bare=True),
    ),
    "granite": Architecture(read_config=granite.read_config, module=_PRE_NORM, adapt=granite.adapt),
    "llama": Architecture(read_config=llama.read_config, module=_PRE_NORM),
    "mistral": Architecture(read_config=mistral.read_config, module=_PRE_NORM),
    "mixtral": Architecture(read_config=mixtral.read_config, module=_PRE_NORM, adapt=mixtral.adapt),
    "olmo2": Architecture(read_config=olmo2.read_config, module=_POST_NORM),
    "phi3": Architecture(read_config=phi3.read_config, module=_PRE_NORM, adapt=phi3.adapt),
    "qwen2": Architecture(read_config=qwen2.read_config, module=_PRE_NORM),
    "qwen3": Architecture(read_config=qwen3.read_config, module=_PRE_NORM),
    "qwen3_moe": Architecture(read_config=qwen3_moe.read_config, module=_PRE_NORM, adapt=qwen3_moe.adapt),
    "smollm3": Architecture(read_config=smollm3.read_config, module=_PRE_NORM),
}

# What to do about architectures that hold a supported one.
_HINTS = {
    "gemma3": "; this checkpoint reads pictures too: save its text model alone with transformers'"
    " Gemma3ForCausalLM (model_type gemma3_text)",
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's architecture and shape, before any weights; attributes as in `Architecture`."""

    model_type: str
    config: DecoderConfig
    ropes: tuple[Rope, ...]
    module: Callable[[DecoderConfig], Decoder]
    adapt: Callable[[Tensors, DecoderConfig], Tensors] = _as_they_are
    names: Names = _NAMES

    def tables(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of every position by every RoPE, each ``[Z, context, P]`` float32."""
        cos, sin = zip(*(rope.tables(context) for rope in self.ropes), strict=True)
        return np.stack(cos), np.stack(sin)

    def within(self, context: int) -> "ModelSpec":
        """The model for so many positions: a window that is no smaller is none."""
        windows = tuple(w if w < context else 0 for w in self.config.windows)
        return replace(self, config=replace(self.config, windows=windows))

    def adapted(self, source: Source) -> Source:
        """The source with its tensors under the module's names.

        Raises:
            PrecastError: when one that has to be cut or folded is missing, or has another shape.
        """
        try:
            tensors = self.names.complete(source.tensors, tied=self.config.tied_embeddings)
            return replace(source, tensors=self.adapt(tensors, self.config))
        except PrecastError as error:
            raise PrecastError(f"{source.name}: {error}") from error


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
            f" {', '.join(sorted(ARCHITECTURES))}{_HINTS.get(str(model_type), '')}."
        )
    reader = ConfigReader(config, where)
    shape, ropes = architecture.read_config(reader)
    if (
        reader.peek("auto_map") is not None
    ):  # published files of some architectures have it, and theirs take it
        raise PrecastError(
            f"{where}: auto_map asks for Python code that came with the checkpoint, which is never run; use a"
            " checkpoint of an architecture that transformers itself has."
        )
    check_layer_types(reader, shape)
    reader.finish()
    _check_shape(shape, where)
    return ModelSpec(
        model_type=str(model_type),
        config=shape,
        ropes=ropes,
        module=architecture.module,
        adapt=architecture.adapt,
        names=architecture.names,
    )


def _check_shape(shape: DecoderConfig, where: str) -> None:
    if shape.heads % shape.kv_heads:
        raise PrecastError(
            f"{where}: expected num_attention_heads to be a multiple of num_key_value_heads, found"
            f" {shape.heads} and {shape.kv_heads}."
        )
    if shape.head_dim % 2 and not shape.learned_positions:
        raise PrecastError(
            f"{where}: expected an even head_dim for rotary positions, found {shape.head_dim}."
        )
