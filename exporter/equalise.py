"""Scale the inputs of matrices so that rounding loses less, without changing what the model computes.

The columns of a matrix can be multiplied by factors if its inputs are divided by them. The division costs nothing where
the inputs come from a norm, whose weights absorb it, or from rows of another matrix. All weights of a group share a
scale, so each of them has about the same rounding error, and the factors decide where that error falls.

Let h_j be the importance of input j, by which its squared errors count, a_j² the mean square of column j, and s_j its
factor. The loss of a group is about proportional to Σ h_j / s_j² · Σ a_j² s_j², because the group's scale grows with
its weights. By the Cauchy–Schwarz inequality, the loss is smallest for s_j⁴ = h_j / a_j². This estimate is rough, so
the powers 0, 1/2 and 1 of the factors are tried on some rows. Weights on the grid of a format lose least without any.
The idea is that of AWQ (Lin et al. 2023, https://arxiv.org/abs/2306.00978); the importance is that of GPTQ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from precast.loaders.progress import Progress, Step, silent

from . import gptq
from .block_formats import BLOCK_FORMATS, BlockFormat
from .block_quantise import quantise
from .calibration import CalibrationText, check_triangle, cut_windows, grams, open_model
from .devices import on_cpu_in_float32
from .models.blocks import DecoderConfig
from .models.parameters import EXPERTS, LAYERS, Parameter
from .models.tensors import scale
from .plan import ExportPlan
from .quantize import BUDGET_FORMATS, INT4_BLOCKS, MIXED
from .sources.base import SourceTensor
from .weights import FOUR_BITS, check_array

# Maximum number of the text's windows on which the importance is measured.
_WINDOWS = 4
# Importances and mean squares count as at least this share of their mean, so that no factor is extreme.
_LEAST = 1e-4
# The block formats of which a calibrated export may keep the exact values. All others are rounded again.
_KEPT = FOUR_BITS.union(BUDGET_FORMATS)
_TINY = 1e-30
# The powers of the factors to try, and at most about this many rows of a matrix to try them on.
_POWERS, _ROWS = (0.0, 0.5, 1.0), 64


@dataclass(frozen=True, kw_only=True)
class Link:
    """Matrices with the same inputs, and the module before them whose outputs are these inputs.

    Attributes:
        before: the module, a norm or a linear layer, by its name within a layer.
        behind: the modules of the matrices.
        heads: K, the number of key/value heads if the inputs are attended values; otherwise 1.
        repeats: number of query heads that share a key/value head; otherwise 1.
    """

    before: str
    behind: tuple[str, ...]
    heads: int = 1
    repeats: int = 1


def equalised(plan: ExportPlan, text: CalibrationText, progress: Progress = silent) -> ExportPlan:
    """Scale the source tensors of a plan's layers, so that their matrices lose less when they are rounded.

    Matrices in a block format that the export may keep are not scaled, because another rounding could lose more.

    Args:
        plan: the plan.
        text: the text to measure the importance of inputs on.
        progress: called with the number of layers measured so far.

    Raises:
        PrecastError: the text is too short or gives inputs that are too large, or a tensor has values that are not
            finite.
    """
    parameters, layers = plan.stored.parameters, plan.spec.config.layers
    tensors = dict(plan.weight_plan.tensors)
    prefixes = [f"{LAYERS}{layer}." for layer in range(layers)]
    known = links(parameters, plan.spec.config)
    if not any(_is_scalable(tensors, prefix, link) for prefix in prefixes for link in known):
        return plan
    smallest = BLOCK_FORMATS[BUDGET_FORMATS[0]] if plan.weights == MIXED else INT4_BLOCKS
    model = open_model(plan)
    windows = cut_windows(model, text)[:_WINDOWS]
    with on_cpu_in_float32():
        run, record = jax.jit(model.run_layer), jax.jit(partial(grams, model))
        x = jnp.concatenate([model.embedded(window) for window in windows])
        for layer, prefix in enumerate(prefixes):
            progress(Step(text="equalising", done=layer, total=layers, unit="layers"))
            arrays, around = model.read(LAYERS, layer=layer), model.surroundings(layer, x.shape)
            for place, parameter in enumerate(parameters):
                if parameter.name.startswith(LAYERS) and EXPERTS not in parameter.name:
                    check_array(parameter.sources[layer], arrays[place][0], parameter.source_shape)
            for places, gram in record(x, *around, *arrays).items():
                behind = {_module(parameters[place]) for place in places}
                for link in known:
                    if set(link.behind) != behind or not _is_scalable(tensors, prefix, link):
                        continue
                    triangle = gptq.compensation(gram)
                    check_triangle(triangle, text, f"layer {layer}")
                    matrices = [arrays[i][0] for i in places]
                    factors = _best(link, 1 / np.diag(triangle) ** 2, matrices, smallest)
                    if factors is not None:
                        _scale(tensors, prefix, link, factors)
            x = run(x, *around, *arrays).block_until_ready()
    return replace(plan, weight_plan=replace(plan.weight_plan, tensors=tensors))


def links(parameters: Sequence[Parameter], config: DecoderConfig) -> list[Link]:
    """Return the links in each layer of a model."""
    names = {_module(p) for p in parameters if p.name.startswith(LAYERS)}
    found = [
        Link(before="self_attn.v_proj", behind=("self_attn.o_proj",), heads=config.kv_heads,
             repeats=config.heads // config.kv_heads)
    ]  # fmt: skip
    if "input_layernorm" in names:  # OLMo 2 has norms after the products only
        projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        found.append(Link(before="input_layernorm", behind=projections))
        gemma, llama = "pre_feedforward_layernorm", "post_attention_layernorm"
        found.append(Link(before=gemma if gemma in names else llama, behind=("mlp.gate_proj", "mlp.up_proj")))
    if config.gated:  # without a gate, the activation is between the two matrices
        found.append(Link(before="mlp.up_proj", behind=("mlp.down_proj",)))
    return [link for link in found if {link.before, *link.behind} <= names]


def _module(parameter: Parameter) -> str:
    """Return the name of a parameter's module within a layer."""
    return parameter.name.removeprefix(LAYERS).rpartition(".")[0]


def _factors(link: Link, importance: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Return the factor of each output of the module before a link, float32.

    Args:
        link: the link.
        importance: the importance of each input ``[in]``.
        matrices: the matrices ``[out, in]``.
    """
    squares = [np.square(matrix).mean(0, dtype=np.float64) for matrix in matrices]
    square = np.sum([each / max(each.mean(), _TINY) for each in squares], axis=0)
    ratios = []
    for each in (importance.astype(np.float64), square):
        shared = each.reshape(link.heads, link.repeats, -1).mean(1).reshape(-1)
        ratios.append(np.maximum(shared, max(_LEAST * shared.mean(), _TINY)))
    logarithms = np.log(ratios[0] / ratios[1]) / 4
    factors: np.ndarray = np.exp(logarithms - logarithms.mean()).astype(np.float32)
    return factors


def _best(
    link: Link, importance: np.ndarray, matrices: Sequence[np.ndarray], block_format: BlockFormat
) -> np.ndarray | None:
    """Return the power of `_factors` with which the matrices lose least in a format; None if it is 0."""
    factors = _factors(link, importance, matrices)
    tried = [factors ** np.float32(power) for power in _POWERS]
    losses = [
        sum(_loss(matrix, importance, _columns(link, each), block_format) for matrix in matrices)
        for each in tried
    ]
    best = int(np.argmin(losses))
    return tried[best] if _POWERS[best] else None


def _loss(
    matrix: np.ndarray, importance: np.ndarray, columns: np.ndarray, block_format: BlockFormat
) -> float:
    """Return the rounding error of some rows of a matrix with scaled columns, as a share of the weights' squares."""
    rows = np.ascontiguousarray(matrix[:: max(1, len(matrix) // _ROWS)] * columns)
    weight = (importance / np.square(columns)).astype(np.float32)
    codes, *coefficients = quantise(block_format, rows, weight)
    errors = block_format.decode(block_format.pack(codes, *coefficients), *rows.shape) - rows
    lost, all_squares = ((np.square(each) * weight).sum(dtype=np.float64) for each in (errors, rows))
    return float(lost / max(all_squares, _TINY))


def _columns(link: Link, factors: np.ndarray) -> np.ndarray:
    """Return the factor of each input of the matrices behind a link."""
    return np.repeat(factors.reshape(link.heads, 1, -1), link.repeats, axis=1).reshape(-1)


def _weights(prefix: str, link: Link) -> list[str]:
    """Return the names of a link's tensors in a layer, first that of the module before."""
    return [f"{prefix}{module}.weight" for module in (link.before, *link.behind)]


def _is_scalable(tensors: Mapping[str, SourceTensor], prefix: str, link: Link) -> bool:
    """Return True if the source stores none of a link's tensors in a block format that an export may keep."""
    return not any(tensors[name].block_format in _KEPT for name in _weights(prefix, link))


def _scale(tensors: dict[str, SourceTensor], prefix: str, link: Link, factors: np.ndarray) -> None:
    """Multiply the columns of the matrices behind a link by factors, and divide the outputs before it."""
    before, *behind = _weights(prefix, link)
    for name in behind:
        tensors[name] = scale(tensors[name], _columns(link, factors))
    is_matrix = len(tensors[before].shape) > 1
    tensors[before] = scale(tensors[before], 1 / (factors[:, None] if is_matrix else factors))
    bias = f"{prefix}{link.before}.bias"
    if bias in tensors:
        tensors[bias] = scale(tensors[bias], 1 / factors)
