"""Quantise a model layer after layer, with the inputs that each matrix has when the model reads a text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.audit import evaluate
from precast.loaders.progress import Progress, Step, silent

from . import gptq
from .devices import on_cpu_in_float32
from .mixed import ParameterFormat
from .models.ops import LinearCall, Rotary
from .models.parameters import EXPERTS, LAYERS, Parameter
from .models.xla_ops import XLA_OPS, rms_norm
from .plan import ExportPlan
from .quantize import INT4, INT4_BLOCKS
from .reference.layerwise import LayerwiseReference
from .texts import read_tokenizer
from .weights import Encoded, check_array, repack

# Maximum number of tokens that calibration reads, and number of tokens in a window.
TOKENS, WINDOW = 8192, 512


def calibrated_parameters(
    parameters: Sequence[Parameter], formats: Mapping[str, ParameterFormat]
) -> list[Parameter]:
    """Return the parameters to calibrate: the int4 matrices of the layers, except those of experts.

    A token goes through only a few experts, so a text might not reach all of them.

    Args:
        parameters: the model's parameters.
        formats: the storage format of each parameter, by name.
    """
    return [
        p
        for p in parameters
        if formats[p.name] == INT4.name and p.name.startswith(LAYERS) and EXPERTS not in p.name
    ]


def quantised_layers(plan: ExportPlan, text: Path, progress: Progress = silent) -> Iterator[Encoded]:
    """Quantise the matrices of `calibrated_parameters` layer by layer; yield each matrix with its parameter's name.

    A matrix that the source stores in 4 bits keeps its values; `gptq.quantise` quantises all others. The inputs of a
    layer are computed by the quantised layers before it.

    Args:
        plan: the export.
        text: the text to read.
        progress: called with the number of layers quantised so far.

    Raises:
        PrecastError: the text is missing or too short, or a tensor has values that int4 cannot hold.
    """
    model = LayerwiseReference(
        name=plan.source.name,
        spec=plan.spec,
        source=plan.source,
        tokenizer=read_tokenizer(plan.source),
        context=plan.geometry.context,
    )
    windows = _windows(model, text)
    parameters = plan.stored.parameters
    chosen = {parameters.index(p): p for p in calibrated_parameters(parameters, plan.stored.formats)}
    layers = plan.spec.config.layers
    run, record = jax.jit(model.run_layer), jax.jit(partial(_grams, model))
    with on_cpu_in_float32():
        x = jnp.concatenate([model.embedded(window) for window in windows])
        for layer in range(layers):
            progress(Step(text="quantising", done=layer, total=layers, unit="layers"))
            arrays = model.read(LAYERS, layer=layer)
            for place, parameter in chosen.items():
                check_array(parameter.sources[layer], arrays[place][0], parameter.source_shape)
            around = model.surroundings(layer, x.shape)
            for places, gram in record(x, *around, *arrays).items():
                triangle = gptq.compensation(gram)
                if not np.isfinite(triangle).all():
                    raise PrecastError(
                        f"{text}: the inputs that this text gives to layer {layer} are too large to calibrate with;"
                        " leave out --calibrate."
                    )
                for parameter, place in ((p, i) for i in places if (p := chosen.get(i)) is not None):
                    matrix = arrays[place][0]
                    encoded = _encode(plan, parameter, layer, matrix, triangle)
                    matrix[...] = INT4.decode(encoded, *matrix.shape)
                    yield parameter.name, encoded
            # JAX runs asynchronously. Wait, so that the weights of two layers are never in memory together.
            x = run(x, *around, *arrays).block_until_ready()


def _windows(model: LayerwiseReference, text: Path) -> Sequence[Sequence[int]]:
    """Cut the text into windows of the same length; return the token ids of each."""
    width = min(WINDOW, model.context)
    tokens = evaluate.tokenize(model.tokenizer, evaluate.read_text(text, TOKENS))
    windows = [w for w in evaluate.cut(tokens, TOKENS, width) if len(w) == width]
    if not windows:
        raise PrecastError(
            f"{text}: expected at least {width} tokens of text to calibrate with, found fewer; name a longer text."
        )
    return windows


def _grams(
    model: LayerwiseReference, x: Array, rotary: Rotary, window: Array, *arrays: Array
) -> dict[tuple[int, ...], Array]:
    """Run a layer; return the Gram matrix ``[in, in]`` of the inputs of each of its products.

    The key of a product is the tuple of the indices of its matrices in `arrays`.
    """
    grams: dict[tuple[int, ...], Array] = {}

    def linear(x: Array, call: LinearCall, layer: Array, used: Array) -> list[Array]:
        inputs = x if call.norm is None else rms_norm(x, call.norm[layer], call.eps)
        places = tuple(i for i, array in enumerate(arrays) if any(array is w for w in call.weights))
        grams[places] = inputs.T @ inputs
        return XLA_OPS.linear(x, call, layer, used)

    model.bind(arrays).forward_layer(x, rotary, window, jnp.int32(0), ops=replace(XLA_OPS, linear=linear))
    return grams


def _encode(
    plan: ExportPlan, parameter: Parameter, layer: int, matrix: np.ndarray, triangle: np.ndarray
) -> tuple[np.ndarray, ...]:
    name = parameter.sources[layer]
    exact = repack(name, plan.weight_plan.tensors[name], INT4, parameter.source_shape)
    if exact is not None:
        return exact
    INT4.check(matrix, name)
    return INT4.pack(*gptq.quantise(matrix.copy(), triangle, INT4_BLOCKS))
