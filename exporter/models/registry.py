"""The supported architectures by ``model_type``, and the reader of their configs."""

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
from .common_keys import check_layer_types
from .config import ConfigReader
from .decoder import Decoder
from .rope import Rope
from .tensor_names import TensorNames
from .tensors import Tensors


def _unchanged(tensors: Tensors, _: DecoderConfig) -> Tensors:
    return tensors


_LLAMA_NAMES = TensorNames()


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The functions for one ``model_type``: they read its configs, build its module and adapt its tensors.

    Attributes:
        read_config: returns the decoder's config and its RoPEs, to which ``config.ropes`` refers by index; raises
            PrecastError for a value that is not supported.
        module: builds the Flax module from the decoder's config.
        adapt: returns a checkpoint's tensors under the module's names, split and scaled to fit its parameters.
        names: tensor names in the architecture's checkpoints.
    """

    read_config: Callable[[ConfigReader], tuple[DecoderConfig, tuple[Rope, ...]]]
    module: Callable[[DecoderConfig], Decoder]
    adapt: Callable[[Tensors, DecoderConfig], Tensors] = _unchanged
    names: TensorNames = _LLAMA_NAMES


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
        names=TensorNames(body="transformer", embedding="wte", allows_bare=True),
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

# Remedies for unsupported architectures that contain a supported architecture.
_HINTS = {
    "gemma3": "; this checkpoint also reads images: save its text model alone with transformers'"
    " Gemma3ForCausalLM (model_type gemma3_text)",
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model without its weights: architecture, config and RoPE.

    Attributes:
        model_type: key of the architecture in `ARCHITECTURES`.
        ropes: the different RoPEs of the layers; ``config.ropes`` contains, for each layer, an index into `ropes`.
    """

    model_type: str
    architecture: Architecture
    config: DecoderConfig
    ropes: tuple[Rope, ...]

    def tables(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosines and sines of every RoPE at every position, each ``[Z, context, P]`` float32."""
        cos, sin = zip(*(rope.tables(context) for rope in self.ropes), strict=True)
        return np.stack(cos), np.stack(sin)

    def with_context(self, context: int) -> "ModelSpec":
        """Return the model for a context length; a window of at least that length becomes full attention."""
        windows = tuple(w if w < context else 0 for w in self.config.windows)
        return replace(self, config=replace(self.config, windows=windows))

    def adapt(self, source: Source) -> Source:
        """Return the source with its tensors under the module's names.

        Raises:
            PrecastError: a tensor to be split or scaled is missing or has the wrong shape.
        """
        try:
            tensors = self.architecture.names.canonicalise(source.tensors, tied=self.config.tied_embeddings)
            return replace(source, tensors=self.architecture.adapt(tensors, self.config))
        except PrecastError as error:
            raise PrecastError(f"{source.name}: {error}") from error


def read_model(config: Mapping[str, object], where: str) -> ModelSpec:
    """Read a Hugging Face config.

    Args:
        config: the keys of config.json.
        where: name of the config in messages.

    Raises:
        PrecastError: the architecture is not supported, or a key that could change the maths is not understood.
    """
    model_type = config.get("model_type")
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise PrecastError(
            f"{where}: expected model_type to be one of {', '.join(sorted(ARCHITECTURES))}, found"
            f" {model_type!r}{_HINTS.get(str(model_type), '')}."
        )
    reader = ConfigReader(config, where)
    decoder_config, ropes = architecture.read_config(reader)
    # If an architecture's published configs have this key, as phi3's do, `read_config` has already removed it.
    if reader.peek("auto_map") is not None:
        raise PrecastError(
            f"{where}: auto_map names Python code in the checkpoint, and precast never runs such code; use a"
            " checkpoint of an architecture that transformers itself implements."
        )
    check_layer_types(reader, decoder_config)
    reader.finish()
    _check_heads(decoder_config, where)
    return ModelSpec(
        model_type=str(model_type), architecture=architecture, config=decoder_config, ropes=ropes
    )


def _check_heads(config: DecoderConfig, where: str) -> None:
    if config.heads % config.kv_heads:
        raise PrecastError(
            f"{where}: expected num_attention_heads to be a multiple of num_key_value_heads, found"
            f" {config.heads} and {config.kv_heads}."
        )
    if config.head_dim % 2 and not config.learned_positions:
        raise PrecastError(
            f"{where}: expected an even head_dim for rotary positions, found {config.head_dim}."
        )
