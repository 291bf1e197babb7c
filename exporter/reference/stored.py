"""The reference that the golden answers are checked against: the uncached forward pass with the stored weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..mixed import panel_rows
from ..models.parameters import abstract_model
from ..models.registry import ModelSpec
from ..programs import TABLES, StoredModel
from .output_head import Bind, blockwise_logits, head_of


def answer_logits(
    model: StoredModel,
    kv_cache: str,
    weights: Mapping[str, np.ndarray],
    sequences: Sequence[tuple[int, ...]],
    firsts: Sequence[int],
) -> list[np.ndarray]:
    """Run the uncached forward pass over sequences, and return the logits of their answers.

    Args:
        model: the model.
        kv_cache: type of the KV cache, to which keys and values are rounded.
        weights: the artifact's arrays by name.
        sequences: token ids of each prompt and its answer.
        firsts: for each sequence, the first position whose logits are returned.

    Returns:
        For each sequence, the logits of the positions from its entry in `firsts` to the last but one, float32
        ``[R, V]``.
    """
    names = [name for name, _ in model.arrays()]
    arrays = {name: _on_device(weights[name]) for name in (*TABLES, *names)}
    run = jax.jit(
        lambda tokens, cos, sin, *flat: model.bind(flat).hidden(tokens[None], cos, sin, kv_cache)[0]
    )
    # Pad all sequences to one length, so that the pass compiles once.
    length = max(map(len, sequences))
    rows = []
    for sequence, first in zip(sequences, firsts, strict=True):
        padded = np.array([*sequence, *[0] * (length - len(sequence))], np.int32)
        rows.append(run(padded, *arrays.values())[first : len(sequence) - 1])
    head = head_of(model.spec)
    logits = blockwise_logits(
        model.spec,
        lambda spec: _binder(model, spec),
        jnp.concatenate(rows),
        {name: weights[name] if name.startswith(head) else arrays[name] for name in names},
        panel_rows=panel_rows(model.formats[head], model.spec.config.width),
    )
    return np.split(logits, np.cumsum([len(r) for r in rows])[:-1])


def _binder(model: StoredModel, spec: ModelSpec) -> Bind:
    return replace(model, spec=spec, abstract=abstract_model(spec)).bind


def _on_device(array: np.ndarray) -> Array:
    """Return mapped weights as a JAX array, zero-copy except for bfloat16, which NumPy cannot share."""
    return jnp.from_dlpack(array) if array.dtype.isbuiltin == 1 else jnp.asarray(array)
