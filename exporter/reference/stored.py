"""The reference with weights as an artifact stores them: what golden answers are held against."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..models.parameters import abstract_model
from ..models.registry import ModelSpec
from ..programs import TABLES, StoredModel
from .output_head import Bind, blockwise_logits, head_of


def answer_logits(
    model: StoredModel,
    cached: str,
    weights: Mapping[str, np.ndarray],
    sequences: Sequence[tuple[int, ...]],
    firsts: Sequence[int],
) -> list[np.ndarray]:
    """The uncached forward pass, and of its logits those that tell about an answer.

    Args:
        model: the model.
        cached: type of the cache, to which keys and values are rounded.
        weights: the artifact's arrays by name.
        sequences: token ids.
        firsts: of each sequence, the first position whose logits are asked for.

    Returns:
        Of each sequence ``[R, V]`` float32: of its positions from the first asked for to the last but one.
    """
    names = [name for name, _ in model.arrays()]
    given = {name: _on_device(weights[name]) for name in (*TABLES, *names)}
    run = jax.jit(
        lambda tokens, cos, sin, *arrays: model.bind(arrays).hidden(tokens[None], cos, sin, cached)[0]
    )
    # One length for all, so that it compiles once.
    length = max(map(len, sequences))
    rows = []
    for sequence, first in zip(sequences, firsts, strict=True):
        padded = np.array([*sequence, *[0] * (length - len(sequence))], np.int32)
        rows.append(run(padded, *given.values())[first : len(sequence) - 1])
    head = head_of(model.spec)
    logits = blockwise_logits(
        model.spec,
        lambda spec: _binder(model, spec),
        jnp.concatenate(rows),
        {name: weights[name] if name.startswith(head) else given[name] for name in names},
        packed=model.formats[head].startswith("int"),
    )
    return np.split(logits, np.cumsum([len(r) for r in rows])[:-1])


def _binder(model: StoredModel, spec: ModelSpec) -> Bind:
    return replace(model, spec=spec, abstract=abstract_model(spec)).bind


def _on_device(array: np.ndarray) -> Array:
    """Mapped weights as they lie; of bfloat16, which NumPy cannot hand over, a copy."""
    return jnp.from_dlpack(array) if array.dtype.isbuiltin == 1 else jnp.asarray(array)
