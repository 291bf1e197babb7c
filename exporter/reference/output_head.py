"""The output head of the references, a block of the vocabulary at a time: in float32 it may be the largest matrix."""

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

# From the arrays of a model's parameters to the model.
Bind = Callable[[Sequence[Array]], Decoder]


def head_of(spec: ModelSpec) -> str:
    """Name of the parameter that hidden states are multiplied with in the end."""
    return EMBEDDING if spec.config.tied_embeddings else "lm_head.weight"


def blockwise_logits(
    spec: ModelSpec,
    bind: Callable[[ModelSpec], Bind],
    x: Array,
    arrays: Mapping[str, ArrayLike],
    *,
    packed: bool,
) -> np.ndarray:
    """Final norm and output head.

    Args:
        spec: of the model.
        bind: gives what binds arrays to a model like this one with a smaller vocabulary.
        x: hidden states ``[R, D]``.
        arrays: of all parameters in the order in which they are bound. Those of the head, whose names begin with its
            name, are NumPy's: only a block of them becomes JAX's.
        packed: whether the head's arrays keep panels of outputs together.

    Returns:
        Logits ``[R, V]`` float32.
    """
    vocab, head = spec.config.vocab, head_of(spec)
    starts = range(0, vocab, _BLOCK)
    run = {count: _jitted(spec, bind, count) for count in {min(_BLOCK, vocab - start) for start in starts}}
    logits = np.empty((x.shape[0], vocab), np.float32)
    for start in starts:
        count = min(_BLOCK, vocab - start)
        given = [
            _outputs(np.asarray(array), start, count, packed=packed) if name.startswith(head) else array
            for name, array in arrays.items()
        ]
        logits[:, start : start + count] = run[count](x, *given)
    return logits


def _jitted(spec: ModelSpec, bind: Callable[[ModelSpec], Bind], vocab: int) -> Callable[..., Array]:
    bound = bind(replace(spec, config=replace(spec.config, vocab=vocab)))
    return jax.jit(lambda x, *arrays: bound(arrays).logits(x, XLA_OPS))


def _outputs(stack: np.ndarray, start: int, count: int, *, packed: bool) -> np.ndarray:
    """Rows of an embedding ``[V, D]`` or of a stack of one matrix ``[1, V, D]``; of packed ones, whole panels."""
    rows = slice(start // PANEL, -(-(start + count) // PANEL)) if packed else slice(start, start + count)
    return stack[rows] if stack.ndim == 2 else stack[:, rows]
