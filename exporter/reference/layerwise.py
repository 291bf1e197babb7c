"""The reference one layer at a time, for models whose float32 copy would not fit beside everything else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from precast.loaders.text.tokenizer import Tokenizer

from ..devices import precisely
from ..models.ops import Rotary
from ..models.parameters import LAYERS, Parameter, abstract_model
from ..models.registry import ModelSpec
from ..models.xla_ops import XLA_OPS
from ..sources.base import Source, SourceTensor
from ..weights import plan_weights, read_floats
from .output_head import EMBEDDING, blockwise_logits, head_of


class LayerwiseReference:
    """The uncached float32 forward pass as a scorer, of whose weights one layer is in memory at a time.

    Every window reads them again: for a few windows.

    Args:
        name: what messages call it.
        spec: of the model.
        source: of its tensors.
        tokenizer: of the model.
        context: positions that a window may have, and of the artifact that it is held against.

    Raises:
        PrecastError: when the tensors do not fit the model.
    """

    def __init__(
        self,
        *,
        name: str,
        spec: ModelSpec,
        source: Source,
        tokenizer: Tokenizer,
        context: int,
    ) -> None:
        self.name, self.tokenizer, self.context, self.vocab = name, tokenizer, context, spec.config.vocab
        c = spec.config
        parameters = abstract_model(spec).parameters
        plan = plan_weights(spec.adapt(source), parameters, tied=c.tied_embeddings)
        self._tensors: Mapping[str, SourceTensor] = plan.tensors
        self._spec, self._parameters = spec, parameters
        self._one = replace(spec, config=replace(c, layers=1, windows=(), ropes=()))
        self._bound = abstract_model(self._one).bind
        self._layer = jax.jit(self._run_layer)

    def logits(self, window: Sequence[int], first: int) -> Iterator[np.ndarray]:
        c = self._spec.config
        cos, sin = (table[:, None, : len(window)] for table in self._spec.tables(self.context))
        with precisely():
            x = self._embedded(window)
            for i, (seen, rope) in enumerate(zip(c.layer_windows, c.layer_ropes, strict=True)):
                arrays = map(jnp.from_dlpack, self._read(LAYERS, layer=i))
                # Waited for, so that no two layers' weights are in memory.
                x = self._layer(x, cos[rope], sin[rope], np.int32(seen), *arrays).block_until_ready()
            ends = self._read("model.norm", head_of(self._spec))
            yield from blockwise_logits(
                self._one,
                lambda spec: abstract_model(spec).bind,
                x[0, first : len(window) - 1],
                dict(zip((p.name for p in self._parameters), ends, strict=True)),
                packed=False,
            )

    def _embedded(self, window: Sequence[int]) -> Array:
        """What the first layer is given, ``[1, T, D]``. Of the embedding only the window's rows become JAX's."""
        used, tokens = np.unique(np.array(window), return_inverse=True)
        arrays = [
            array[used] if p.name == EMBEDDING else array
            for p, array in zip(self._parameters, self._read("model.embed_"), strict=True)
        ]
        module = self._bound([*map(jnp.asarray, arrays)])
        return module.embed(jnp.asarray(tokens[None], jnp.int32), jnp.arange(len(window))[None], XLA_OPS)

    def _run_layer(self, x: Array, cos: Array, sin: Array, window: Array, *arrays: Array) -> Array:
        return self._bound(arrays).forward_layer(x, Rotary(cos, sin), window, jnp.int32(0))

    def _read(self, *prefixes: str, layer: int = 0) -> list[np.ndarray]:
        """An array for every parameter of a layer and of what is around it; of those not asked for a single zero."""
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
