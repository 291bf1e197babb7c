"""The output head of the references, computed for one block of the vocabulary at a time.

In float32 the head may be the largest matrix of the model, so only one block at a time becomes a JAX array.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ..block_formats import PANEL
from ..mixed import TABLE
from ..models.decoder import Decoder
from ..models.registry import ModelSpec
from ..models.xla_ops import XLA_OPS

_BLOCK = 8192  # tokens

EMBEDDING = "model.embed_tokens.weight"

# A function that takes the arrays of a model's parameters, and returns the model with these weights.
Bind = Callable[[Sequence[Array]], Decoder]


def head_of(spec: ModelSpec) -> str:
    """Return the name of the output head's parameter, which is the embedding's name if the two are tied."""
    return EMBEDDING if spec.config.tied_embeddings else "lm_head.weight"


def blockwise_logits(
    spec: ModelSpec,
    bind: Callable[[ModelSpec], Bind],
    x: Array,
    arrays: Mapping[str, ArrayLike],
    *,
    panel_rows: int | None,
) -> np.ndarray:
    """Apply the final norm and the output head.

    Args:
        spec: the model.
        bind: returns the `Bind` function of a spec; it is called with specs whose vocabulary is one block.
        x: hidden states ``[R, D]``.
        arrays: the arrays of all parameters by name, in the order of `Bind`. Only arrays whose name begins with
            `head_of(spec)` are cut into blocks.
        panel_rows: the result of `mixed.panel_rows` for the head.

    Returns:
        Logits ``[R, V]`` float32.
    """
    vocab, head = spec.config.vocab, head_of(spec)
    starts = range(0, vocab, _BLOCK)
    run = {count: _jitted(spec, bind, count) for count in {min(_BLOCK, vocab - start) for start in starts}}
    logits = np.empty((x.shape[0], vocab), np.float32)
    for start in starts:
        count = min(_BLOCK, vocab - start)
        block = [
            _outputs(np.asarray(array), start, count, panel_rows)
            if name.startswith(head) and not name.endswith(TABLE)
            else array
            for name, array in arrays.items()
        ]
        logits[:, start : start + count] = run[count](x, *block)
    return logits


def _jitted(spec: ModelSpec, bind: Callable[[ModelSpec], Bind], vocab: int) -> Callable[..., Array]:
    bound = bind(replace(spec, config=replace(spec.config, vocab=vocab)))
    return jax.jit(lambda x, *arrays: bound(arrays).logits(x, XLA_OPS))


def _outputs(stack: np.ndarray, start: int, count: int, panel_rows: int | None) -> np.ndarray:
    """Return `count` outputs of a head's array, from output `start`; if the array has panels, return whole panels.

    Outputs or panels are the first axis of an array with two axes, such as an embedding ``[V, D]``, and the second axis
    of a stack ``[1, V, D]``.
    """
    if panel_rows is None:
        rows = slice(start, start + count)
    else:
        rows = slice(start // PANEL * panel_rows, -(-(start + count) // PANEL) * panel_rows)
    return stack[rows] if stack.ndim == 2 else stack[:, rows]
