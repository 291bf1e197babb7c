"""The reference one layer at a time, for models whose float32 copy would not fit beside everything else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from precast.loaders.tokenizer import Tokenizer

from .devices import precisely
from .models import ModelSpec
from .models.decoder import Decoder
from .models.ops import Rotary
from .models.parameters import LAYERS, Parameter, abstract_model
from .models.xla_ops import XLA_OPS
from .sources.base import Source, SourceTensor
from .weights import plan_weights, read_floats


class LayerwiseReference:
    """The uncached float32 forward pass as a scorer, of whose weights one layer is in memory at a time.

    Every window reads them again: for a few windows.

    Args:
        name: what messages call it.
        spec: of the model.
        source: of its tensors.
        tokenizer: of the model.
        capacity: positions that a window may have, and of the artifact that it is held against.

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
        capacity: int,
    ) -> None:
        self.name, self.tokenizer, self.capacity, self.vocab = name, tokenizer, capacity, spec.config.vocab
        c = spec.config
        parameters = abstract_model(spec).parameters
        plan = plan_weights(spec.adapted(source), parameters, tied=c.tied_embeddings)
        self._tensors: Mapping[str, SourceTensor] = plan.tensors
        self._spec, self._parameters = spec, parameters
        self._one = abstract_model(replace(spec, config=replace(c, layers=1, windows=(), ropes=())))
        self._layer = jax.jit(self._run_layer)
        self._ends = jax.jit(lambda x, *arrays: self._bound(arrays).logits(x, XLA_OPS))

    def logits(self, window: Sequence[int], first: int) -> Iterator[np.ndarray]:
        c = self._spec.config
        cos, sin = (table[:, None, : len(window)] for table in self._spec.tables(self.capacity))
        tokens = np.array([window], np.int32)
        with precisely():
            x = self._bound(self._read("model.embed_")).embed(
                jnp.asarray(tokens), jnp.arange(len(window))[None], XLA_OPS
            )
            for i, (seen, rope) in enumerate(zip(c.layer_windows, c.layer_ropes, strict=True)):
                x = self._layer(x, cos[rope], sin[rope], np.int32(seen), *self._read(LAYERS, layer=i))
            rows = np.asarray(self._ends(x[0], *self._read("model.norm", "lm_head", "model.embed_tokens")))
        yield from rows[first : len(window) - 1]

    def _run_layer(self, x: Array, cos: Array, sin: Array, window: Array, *arrays: Array) -> Array:
        return self._bound(arrays).forward_layer(x, Rotary(cos, sin), window, jnp.int32(0))

    def _bound(self, arrays: Sequence[Array]) -> Decoder:
        return self._one.bind(arrays)

    def _read(self, *prefixes: str, layer: int = 0) -> list[Array]:
        """An array for every parameter of a layer and of what is around it; of those not asked for a single zero."""
        return [
            jnp.from_dlpack(self._array(p, layer))
            if p.name.startswith(prefixes)
            else jnp.zeros((1,) * len(p.shape))
            for p in self._parameters
        ]

    def _array(self, parameter: Parameter, layer: int) -> np.ndarray:
        if not parameter.name.startswith(LAYERS):
            return read_floats(self._tensors, parameter, parameter.sources, parameter.shape)
        each = len(parameter.sources) // self._spec.config.layers
        names = parameter.sources[layer * each : (layer + 1) * each]
        return read_floats(self._tensors, parameter, names, (each, *parameter.source_shape))
