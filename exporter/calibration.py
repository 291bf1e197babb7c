"""Quantise a model layer by layer, using the inputs that each matrix receives while the model reads a text."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from .block_formats import BLOCK_FORMATS, UNIT
from .block_quantise import check_largest
from .devices import on_cpu_in_float32
from .mixed import ParameterFormat, table
from .models.ops import LinearCall, Rotary
from .models.parameters import EXPERTS, LAYERS, Parameter
from .models.xla_ops import XLA_OPS, rms_norm
from .plan import ExportPlan
from .quantize import INT4, INT4_BLOCKS
from .reference.layerwise import LayerwiseReference
from .texts import read_tokenizer
from .weights import Encoded, check_array, repack, repack_records

# Maximum number of tokens that calibration reads, and number of tokens in a window.
TOKENS, WINDOW = 8192, 512


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """A text to calibrate with.

    Attributes:
        name: name of the text in messages.
        content: the text itself.
    """

    name: str
    content: str


def read_calibration_text(path: Path | None) -> CalibrationText:
    """Read a text file; without a path, return the documentation of Python that CPython ships for `help()`.

    Raises:
        PrecastError: the file is missing or is not text, or this Python was installed without its documentation.
    """
    if path is not None:
        return CalibrationText(name=str(path), content=evaluate.read_text(path, TOKENS))
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise PrecastError(
            "--bits: the default text is Python's own documentation (pydoc_data), which is not installed here; add"
            " --calibrate FILE."
        ) from None
    return CalibrationText(name="Python's documentation", content="\n\n".join(topics.values()))


def calibrated_parameters(
    parameters: Sequence[Parameter], formats: Mapping[str, ParameterFormat]
) -> list[Parameter]:
    """Return the parameters to calibrate: the int4 and mixed matrices of the layers, except those of experts.

    Experts are left out because each token goes through only a few of them, so a text might not reach every expert.

    Args:
        parameters: the model's parameters.
        formats: the storage format of each parameter, by name.
    """
    return [
        p
        for p in parameters
        if (formats[p.name] == INT4.name or not isinstance(formats[p.name], str))
        and p.name.startswith(LAYERS)
        and EXPERTS not in p.name
    ]


def open_model(plan: ExportPlan) -> LayerwiseReference:
    """Return the float32 model of an export, whose layers can be run one by one."""
    return LayerwiseReference(
        name=plan.source.name,
        spec=plan.spec,
        source=plan.source,
        tokenizer=read_tokenizer(plan.source),
        context=plan.geometry.context,
        tensors=plan.weight_plan.tensors,
    )


def quantised_matrices(
    plan: ExportPlan, text: CalibrationText, triangles: Mapping[str, np.ndarray], progress: Progress = silent
) -> Iterator[Encoded]:
    """Yield matrices, quantised with the inputs that they receive while the model reads a text.

    Each item is the name of a parameter and the arrays that store one of its matrices. The parameters in `triangles`
    come first, then, layer by layer, those of `calibrated_parameters`. A matrix that the source already stores in the
    chosen format keeps its values; `gptq.quantise` quantises all other matrices. The inputs of a layer are computed by
    the quantised layers before it.

    Args:
        plan: the export.
        text: the text to read.
        triangles: the result of `gptq.compensation` for each parameter to quantise outside the layers, by name.
        progress: called with the number of layers quantised so far.

    Raises:
        PrecastError: the text is too short, or a tensor has values that its format cannot represent.
    """
    model = open_model(plan)
    windows = cut_windows(model, text)
    parameters = plan.stored.parameters
    chosen = {parameters.index(p): p for p in calibrated_parameters(parameters, plan.stored.formats)}
    layers = plan.spec.config.layers
    run, record = jax.jit(model.run_layer), jax.jit(partial(grams, model))
    for parameter in parameters:
        if parameter.name in triangles:
            matrix = plan.weight_plan.tensors[parameter.sources[0]].read()
            check_array(parameter.sources[0], matrix, parameter.source_shape)
            encoded, _ = _encode(plan, parameter, 0, matrix, triangles[parameter.name])
            yield parameter.name, encoded
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
                check_triangle(triangle, text, f"layer {layer}")
                for parameter, place in ((p, i) for i in places if (p := chosen.get(i)) is not None):
                    matrix = arrays[place][0]
                    encoded, matrix[...] = _encode(plan, parameter, layer, matrix, triangle)
                    yield parameter.name, encoded
            # JAX runs asynchronously. Wait, so that the weights of two layers are never in memory together.
            x = run(x, *around, *arrays).block_until_ready()


def cut_windows(model: LayerwiseReference, text: CalibrationText) -> Sequence[Sequence[int]]:
    """Cut a text's first `TOKENS` tokens into windows of equal length; return the token ids of each window.

    Raises:
        PrecastError: the text is shorter than one window.
    """
    width = min(WINDOW, model.context)
    tokens = evaluate.tokenize(model.tokenizer, text.content)
    windows = [w for w in evaluate.cut(tokens, TOKENS, width) if len(w) == width]
    if not windows:
        raise PrecastError(
            f"{text.name}: expected at least {width} tokens of text to calibrate with, found fewer; name a longer text."
        )
    return windows


def grams(
    model: LayerwiseReference, x: Array, rotary: Rotary, window: Array, *arrays: Array
) -> dict[tuple[int, ...], Array]:
    """Run a layer, and return the Gram matrix ``[in, in]`` of the inputs of each matrix product.

    Each key is a tuple: the indices in `arrays` of the matrices that the product multiplies by.
    """
    found: dict[tuple[int, ...], Array] = {}

    def linear(x: Array, call: LinearCall, layer: Array, used: Array) -> list[Array]:
        inputs = product_input(x, call, layer)
        places = tuple(i for i, array in enumerate(arrays) if any(array is w for w in call.weights))
        found[places] = inputs.T @ inputs
        return XLA_OPS.linear(x, call, layer, used)

    model.bind(arrays).forward_layer(x, rotary, window, jnp.int32(0), ops=replace(XLA_OPS, linear=linear))
    return found


def product_input(x: Array, call: LinearCall, layer: Array) -> Array:
    """Return the input ``[M, in]`` of a call's products: x, after the call's norm if it has one."""
    return x if call.norm is None else rms_norm(x, call.norm[layer], call.eps)


def check_triangle(triangle: np.ndarray, text: CalibrationText, place: str) -> None:
    """Check the result of `gptq.compensation`.

    Args:
        triangle: the result to check.
        text: the text from which the inputs were computed.
        place: the layer or parameter that receives the inputs, for the message.

    Raises:
        PrecastError: the inputs were too large for float32.
    """
    if not np.isfinite(triangle).all():
        raise PrecastError(
            f"{text.name}: with this text, the inputs of {place} are too large for calibration; name another text with"
            " --calibrate, or use --weights int4 without calibration."
        )


def _encode(
    plan: ExportPlan, parameter: Parameter, place: int, matrix: np.ndarray, triangle: np.ndarray
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Quantise one of a parameter's matrices; return the arrays that store it, and its dequantised weights."""
    name, shape, stored = (
        parameter.sources[place],
        parameter.source_shape,
        plan.stored.formats[parameter.name],
    )
    tensor = plan.weight_plan.tensors[name]
    if isinstance(stored, str):
        arrays = repack(name, tensor, INT4, shape)
        if arrays is None:
            INT4.check(matrix, name)
            arrays = INT4.pack(*gptq.quantise(matrix.copy(), triangle, INT4_BLOCKS))
        return arrays, INT4.decode(arrays, *shape)
    block_format = BLOCK_FORMATS[stored[place]]
    records = repack_records(name, tensor, block_format, shape)
    if records is None:
        check_largest(block_format, matrix, name)
        records = block_format.pack(*gptq.quantise(matrix.copy(), triangle, block_format))
    row = table(stored, *shape)[place : place + 1]
    return (records.reshape(-1, UNIT), row), block_format.decode(records, *shape)
