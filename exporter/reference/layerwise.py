"""The reference, computed one layer at a time, for models whose float32 weights do not fit in memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from precast.loaders.text.tokenizer import Tokenizer

from ..devices import on_cpu_in_float32
from ..models.ops import Rotary
from ..models.parameters import LAYERS, Parameter, abstract_model
from ..models.registry import ModelSpec
from ..models.xla_ops import XLA_OPS
from ..sources.base import Source, SourceTensor
from ..weights import plan_weights, read_floats
from .output_head import EMBEDDING, blockwise_logits, head_of


class LayerwiseReference:
    """A scorer that runs the uncached float32 forward pass with the weights of one layer in memory at a time.

    The scorer reads all weights again for every window, so it is slow for many windows.

    Args:
        name: name in messages.
        spec: the model.
        source: the source of the model's tensors.
        tokenizer: the model's tokenizer.
        context: context of the artifact to compare with, which is also the maximum length of a window.
        tensors: the source's tensors, adapted to the model; None to adapt them here.

    Raises:
        PrecastError: the tensors do not fit the model.
    """

    def __init__(
        self,
        *,
        name: str,
        spec: ModelSpec,
        source: Source,
        tokenizer: Tokenizer,
        context: int,
        tensors: Mapping[str, SourceTensor] | None = None,
    ) -> None:
        self.name, self.tokenizer, self.context, self.vocab = name, tokenizer, context, spec.config.vocab
        c = spec.config
        parameters = abstract_model(spec).parameters
        if tensors is None:
            tensors = plan_weights(spec.adapt(source), parameters, tied=c.tied_embeddings).tensors
        self._tensors = tensors
        self._spec, self._parameters = spec, parameters
        self._one = replace(spec, config=replace(c, layers=1, windows=(), ropes=()))
        self.bind = abstract_model(self._one).bind
        self._layer = jax.jit(self.run_layer)

    def logits(self, window: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Yield the logits ``[V]`` of every position of the window, from `first` to the last but one."""
        with on_cpu_in_float32():
            x = self.embedded(window)
            for i in range(self._spec.config.layers):
                arrays = map(jnp.from_dlpack, self.read(LAYERS, layer=i))
                # JAX runs asynchronously. Wait, so that the weights of two layers are never in memory together.
                x = self._layer(x, *self.surroundings(i, x.shape), *arrays).block_until_ready()
            ends = self.read("model.norm", head_of(self._spec))
            yield from blockwise_logits(
                self._one,
                lambda spec: abstract_model(spec).bind,
                x[0, first : len(window) - 1],
                dict(zip((p.name for p in self._parameters), ends, strict=True)),
                panel_rows=None,
            )

    def embedded(self, window: Sequence[int]) -> Array:
        """Return the input ``[1, T, D]`` of the first layer; only the window's rows of the embedding are copied."""
        used, tokens = np.unique(np.array(window), return_inverse=True)
        arrays = [
            array[used] if p.name == EMBEDDING else array
            for p, array in zip(self._parameters, self.read("model.embed_"), strict=True)
        ]
        module = self.bind([*map(jnp.asarray, arrays)])
        return module.embed(jnp.asarray(tokens[None], jnp.int32), jnp.arange(len(window))[None], XLA_OPS)

    def surroundings(self, layer: int, shape: tuple[int, ...]) -> tuple[Rotary, np.int32]:
        """Return a layer's cosines and sines ``[B, T, P]``, and its window, for an input of the shape ``[B, T, D]``."""
        c, (batch, tokens, _) = self._spec.config, shape
        tables = (t[c.layer_ropes[layer], None, :tokens] for t in self._spec.tables(self.context))
        rotary = Rotary(*(jnp.asarray(np.broadcast_to(t, (batch, *t.shape[1:]))) for t in tables))
        return rotary, np.int32(c.layer_windows[layer])

    def run_layer(self, x: Array, rotary: Rotary, window: Array, *arrays: Array) -> Array:
        """Return a layer's output ``[B, T, D]``.

        Args:
            x: the layer's input ``[B, T, D]``.
            rotary, window: the result of `surroundings` for the layer.
            arrays: the result of `read` for the layer.
        """
        return self.bind(arrays).forward_layer(x, rotary, window, jnp.int32(0))

    def read(self, *prefixes: str, layer: int = 0) -> list[np.ndarray]:
        """Return an array for every parameter; read only parameters whose name begins with one of the prefixes.

        Of a stack over layers, only the matrices of `layer` are read. The array of a parameter that is not read
        contains a single zero.
        """
        return [
            self._array(p, layer)
            if p.name.startswith(prefixes)
            else np.zeros((1,) * len(p.shape), np.float32)
            for p in self._parameters
        ]

    def _array(self, parameter: Parameter, layer: int) -> np.ndarray:
        if not parameter.name.startswith(LAYERS):
            return read_floats(self._tensors, parameter, parameter.sources, parameter.shape)
        each = len(parameter.sources) // self._spec.config.layers
        names = parameter.sources[layer * each : (layer + 1) * each]
        return read_floats(self._tensors, parameter, names, (each, *parameter.source_shape))
