"""Estimate on a text how much a model loses when each of its matrices is quantised.

Let the weights W of a matrix change by ΔW. To second order, the divergence KL(float32 model ‖ changed model), summed
over the predictions, is ½ ΔWᵀ F ΔW with the Fisher information F. The diagonal of F is the mean square of the gradient
of −log p for tokens that the model itself samples (Kunstner et al. 2019, https://arxiv.org/abs/1905.12558). One
backward pass, layer by layer, computes these gradients for all matrices.

GPTQ shifts errors to inputs that are small on average, which the diagonal does not account for. The error of the
outputs after GPTQ can be predicted: it is the sum of the squared rounding errors, each divided by U_jj² for input j,
where U is the result of `gptq.compensation`. The ratio of the Fisher information to the mean square of the inputs
converts this error to a divergence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from precast.loaders.progress import Progress, Step, silent

from . import gptq
from .block_formats import BlockFormat
from .block_quantise import quantise
from .calibration import grams, product_input
from .devices import on_cpu_in_float32
from .models.ops import LinearCall, Rotary
from .models.parameters import LAYERS, Parameter
from .models.registry import ModelSpec
from .models.xla_ops import XLA_OPS
from .reference.layerwise import LayerwiseReference
from .reference.output_head import EMBEDDING, head_of

# Rounding errors are measured on about this many rows of a matrix.
_ROWS = 256
# The seed of the tokens that the model samples.
_SEED = 0
_MATRIX_AXES = 3  # a stack [L, out, in]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The divergence that each format would cause if some matrices were stored in it.

    Attributes:
        parameter: the parameter.
        sources: indices of the matrices in `Parameter.sources`.
        losses: expected divergence per prediction in each format, in nats.
        triangle: the result of `gptq.compensation` for the embedding or the output head; None for other matrices.
    """

    parameter: Parameter
    sources: range
    losses: tuple[float, ...]
    triangle: np.ndarray | None = None


def measure(
    model: LayerwiseReference,
    spec: ModelSpec,
    parameters: Sequence[Parameter],
    windows: Sequence[Sequence[int]],
    formats: Sequence[BlockFormat],
    progress: Progress = silent,
) -> list[Sensitivity]:
    """Measure the sensitivity of the model's matrices. The experts of a layer count as one matrix.

    The inputs of all layers are in memory together: float32 ``[L, windows, T, D]``.

    Args:
        model: the model in float32.
        spec: the description of the same model.
        parameters: all parameters of the model, in the order of `AbstractModel.parameters`. Parameters of rank
            3, the embedding and the output head are measured.
        windows: token ids of the text's windows, which have the same length.
        formats: the formats to measure.
        progress: receives the number of layers run so far, forward and backward.
    """
    layers = spec.config.layers
    step = partial(Step, text="measuring sensitivity", total=2 * layers, unit="layers")
    tokens = sum(map(len, windows))
    found: list[Sensitivity] = []
    with on_cpu_in_float32():
        run, back = jax.jit(model.run_layer), jax.jit(partial(_layer_gradients, model))
        record = jax.jit(partial(grams, model))
        states = [[model.embedded(window) for window in windows]]
        for layer in range(layers):
            progress(step(done=layer))
            arrays, around = model.read(LAYERS, layer=layer), model.surroundings(layer, states[0][0].shape)
            states.append([run(x, *around, *arrays).block_until_ready() for x in states[-1]])
        slopes, head_gram = _head_gradients(model, head_of(spec), states.pop())
        for layer in reversed(range(layers)):
            progress(step(done=2 * layers - 1 - layer))
            arrays, around = model.read(LAYERS, layer=layer), model.surroundings(layer, states[0][0].shape)
            inputs = states.pop()
            pulled = [back(x, dy, *around, *arrays) for x, dy in zip(inputs, slopes, strict=True)]
            slopes = [dx for dx, _ in pulled]
            squares = np.sum([[float(square) for square in each] for _, each in pulled], axis=0)
            of_inputs = record(jnp.concatenate(inputs), *around, *arrays)
            grams_of = {place: np.asarray(gram) for places, gram in of_inputs.items() for place in places}
            for place, parameter in enumerate(parameters):
                if parameter.name.startswith(LAYERS) and len(parameter.shape) == _MATRIX_AXES:
                    gram, square = grams_of.get(place), squares[place] / tokens
                    losses = _layer_losses(arrays[place], square, gram, formats)
                    each = len(arrays[place])
                    sources = range(layer * each, (layer + 1) * each)
                    found.append(Sensitivity(parameter=parameter, sources=sources, losses=losses))
        uses = ((head_of(spec), head_gram), (EMBEDDING, _embedding_gram(spec, windows, slopes)))
        for place, parameter in enumerate(parameters):
            own = [gram / tokens for name, gram in uses if name == parameter.name]
            if own:
                array = model.read(parameter.name)[place]
                matrix = array.reshape(-1, array.shape[-1])
                triangle = gptq.compensation(sum(own[1:], start=own[0]))
                losses = _losses(matrix, 1 / np.diag(triangle) ** 2, formats, 0.5 / len(matrix))
                found.append(
                    Sensitivity(parameter=parameter, sources=range(1), losses=losses, triangle=triangle)
                )
    return found


def _layer_losses(
    matrices: np.ndarray, square: float, gram: np.ndarray | None, formats: Sequence[BlockFormat]
) -> tuple[float, ...]:
    """Return the losses of one layer's matrices ``[E, out, in]`` of a parameter.

    Args:
        matrices: the matrices; E is 1 except for experts.
        square: the sum of the squared gradients of the matrices, per prediction.
        gram: the Gram matrix of the matrices' inputs; None for experts, because GPTQ does not round them.
        formats: the formats to measure.
    """
    inputs = matrices.shape[-1]
    importance: np.ndarray = np.ones(inputs, np.float32)
    total = float(inputs)
    if gram is not None:
        importance, total = 1 / np.diag(gptq.compensation(jnp.asarray(gram))) ** 2, float(np.trace(gram))
    rows = matrices.reshape(-1, inputs)
    return _losses(rows, importance, formats, square / (2 * len(rows) * total))


def _losses(
    matrix: np.ndarray, importance: np.ndarray, formats: Sequence[BlockFormat], factor: float
) -> tuple[float, ...]:
    """Return, for each format, the sum of the squared rounding errors times `factor`.

    Args:
        matrix: float32 ``[out, in]``.
        importance: the weight of the squared errors of each input ``[in]``.
        formats: the formats to measure.
        factor: a factor of the result.
    """
    rows = np.ascontiguousarray(matrix[:: max(1, len(matrix) // _ROWS)])
    losses = []
    for each in formats:
        codes, *coefficients = quantise(each, rows, importance)
        errors = np.square(each.decode(each.pack(codes, *coefficients), *rows.shape) - rows)
        losses.append(factor * len(matrix) / len(rows) * float((errors * importance).sum(dtype=np.float64)))
    return tuple(losses)


# --- gradients ----------------------------------------------------------------------------------------------


def _layer_gradients(
    model: LayerwiseReference, x: Array, slope: Array, rotary: Rotary, window: Array, *arrays: Array
) -> tuple[Array, list[Array]]:
    """Return the gradient ``[1, T, D]`` at a layer's input, and the sum of squares of each array's gradient.

    Args:
        model: the model.
        x: the layer's input ``[1, T, D]``.
        slope: the gradient at the layer's output.
        rotary, window: the result of `LayerwiseReference.surroundings` for the layer.
        arrays: the result of `LayerwiseReference.read` for the layer.
    """
    _, pull = jax.vjp(lambda x, *arrays: model.run_layer(x, rotary, window, *arrays), x, *arrays)
    own, *others = pull(slope)
    return own, [jnp.sum(jnp.square(other)) for other in others]


def _head_gradients(
    model: LayerwiseReference, head: str, states: Sequence[Array]
) -> tuple[list[Array], Array]:
    """Return the gradients at the last layer's outputs, and the Fisher information of the output head.

    Args:
        model: the model.
        head: name of the output head's parameter.
        states: the outputs of the last layer ``[1, T, D]`` for each window.

    Returns:
        The gradients of −log p for tokens that the model samples, in the shapes of the states; and the Fisher
        information of the output head, summed over its rows, ``[D, D]``.
    """
    ends = model.read("model.norm", head)

    def run(x: Array, added: Array, *ends: Array) -> tuple[Array, Array]:
        inputs: list[Array] = []

        def linear(x: Array, call: LinearCall, layer: Array, used: Array) -> list[Array]:
            inputs.append(product_input(x, call, layer))
            return [y + added for y in XLA_OPS.linear(x, call, layer, used)]

        logits = model.bind(ends).logits(x, replace(XLA_OPS, linear=linear))
        return logits, inputs[0]

    @jax.jit
    def gradients(x: Array, key: Array, *ends: Array) -> tuple[Array, Array]:
        added = jnp.zeros((x.shape[1], model.vocab), jnp.float32)
        logits, pull, inputs = jax.vjp(lambda x, added: run(x, added, *ends), x[0], added, has_aux=True)
        sampled = jax.nn.one_hot(jax.random.categorical(key, logits), model.vocab)
        slope, at_logits = pull(jax.nn.softmax(logits) - sampled)
        strength = jnp.sum(jnp.square(at_logits), axis=1, keepdims=True)
        return slope[None], inputs.T @ (strength * inputs)

    keys = jax.random.split(jax.random.key(_SEED), len(states))
    found = [gradients(x, key, *ends) for x, key in zip(states, keys, strict=True)]
    return [slope for slope, _ in found], sum((gram for _, gram in found), start=jnp.zeros(()))


def _embedding_gram(spec: ModelSpec, windows: Sequence[Sequence[int]], slopes: Sequence[Array]) -> Array:
    """Return the Fisher information ``[D, D]`` of the embedding's rows, summed over all rows.

    Args:
        spec: the description of the model.
        windows: the token ids of each window.
        slopes: the gradients ``[1, T, D]`` at the first layer's input for each window.
    """
    total = jnp.zeros(())
    for window, slope in zip(windows, slopes, strict=True):
        used, places = np.unique(np.array(window), return_inverse=True)
        rows = jnp.zeros((len(used), slope.shape[-1])).at[places].add(spec.config.embedding_scale * slope[0])
        total = total + rows.T @ rows
    return total
