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

# With this many weights, the forward pass over one padded sequence takes longer than compiling a second program.
MANY_WEIGHTS = 1_000_000_000
# Large models pad each sequence to a multiple of this many tokens; small models pad all sequences to one length.
_STEP = 64
# Sequences run together if they have at most this many tokens, with padding.
_TOGETHER = 1024


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
    run = jax.jit(lambda tokens, cos, sin, *flat: model.bind(flat).hidden(tokens, cos, sin, kv_cache))
    rows: dict[int, Array] = {}
    for length, members in by_length(model, list(map(len, sequences))).items():
        padded = np.zeros((len(members), length), np.int32)
        for row, i in zip(padded, members, strict=True):
            row[: len(sequences[i])] = sequences[i]
        # Together, long sequences would need much memory for the scores of their attention.
        size = len(members) if padded.size <= _TOGETHER else 1
        for at in range(0, len(members), size):
            found = run(padded[at : at + size], *arrays.values())
            for i, hidden in zip(members[at : at + size], found, strict=True):
                rows[i] = hidden[firsts[i] : len(sequences[i]) - 1]
    ordered = [rows[i] for i in range(len(sequences))]
    head = head_of(model.spec)
    logits = blockwise_logits(
        model.spec,
        lambda spec: _binder(model, spec),
        jnp.concatenate(ordered),
        {name: weights[name] if name.startswith(head) else arrays[name] for name in names},
        panel_rows=panel_rows(model.formats[head], model.spec.config.width),
    )
    return np.split(logits, np.cumsum([len(r) for r in ordered])[:-1])


def by_length(model: StoredModel, lengths: Sequence[int]) -> dict[int, list[int]]:
    """Group sequences that run together; return the indices of each group by the length to which they are padded."""
    step = max(lengths) if sum(p.size for p in model.parameters) < MANY_WEIGHTS else _STEP
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        # The longest sequence fits the context, but the next multiple may not.
        groups.setdefault(min(-(-length // step) * step, max(lengths)), []).append(i)
    return groups


def _binder(model: StoredModel, spec: ModelSpec) -> Bind:
    return replace(model, spec=spec, abstract=abstract_model(spec)).bind


def _on_device(array: np.ndarray) -> Array:
    """Return mapped weights as a JAX array, zero-copy except for bfloat16, which NumPy cannot share."""
    return jnp.from_dlpack(array) if array.dtype.isbuiltin == 1 else jnp.asarray(array)
