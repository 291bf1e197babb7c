"""The output head of the references, computed for one block of the vocabulary at a time.

In float32 the head may be the largest matrix of the model, so only one block at a time becomes a JAX array.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ..models.decoder import Decoder
from ..models.registry import ModelSpec
from ..models.xla_ops import XLA_OPS
from ..quantize import PANEL

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
    packed: bool,
) -> np.ndarray:
    """Apply the final norm and the output head.

    Args:
        spec: the model.
        bind: takes a spec and returns its `Bind` function. Here the spec's vocabulary is that of a block.
        x: hidden states ``[R, D]``.
        arrays: the arrays of all parameters by name, in the order of `Bind`. Only arrays whose name begins with
            `head_of(spec)` are cut into blocks.
        packed: True if the head's arrays consist of panels of `PANEL` outputs.

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
            _outputs(np.asarray(array), start, count, packed=packed) if name.startswith(head) else array
            for name, array in arrays.items()
        ]
        logits[:, start : start + count] = run[count](x, *block)
    return logits


def _jitted(spec: ModelSpec, bind: Callable[[ModelSpec], Bind], vocab: int) -> Callable[..., Array]:
    bound = bind(replace(spec, config=replace(spec.config, vocab=vocab)))
    return jax.jit(lambda x, *arrays: bound(arrays).logits(x, XLA_OPS))


def _outputs(stack: np.ndarray, start: int, count: int, *, packed: bool) -> np.ndarray:
    """Return the part of a head's array with `count` outputs from `start` on, in whole panels if it is packed.

    The outputs are the first axis of an embedding ``[V, D]``, and the second axis of a stack ``[1, V, D]``.
    """
    rows = slice(start // PANEL, -(-(start + count) // PANEL)) if packed else slice(start, start + count)
    return stack[rows] if stack.ndim == 2 else stack[:, rows]
