"""Logits computed in blocks of the vocabulary equal those computed at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from precast.exporter.models.registry import read_model
from precast.exporter.programs import TABLES, stored_model
from precast.exporter.reference import output_head
from precast.exporter.reference import stored as stored_reference
from precast.exporter.reference.stored import answer_logits
from precast.exporter.weights import plan_weights, write_model_weights
from precast.loaders.artifact.weights import map_weights

UNIT_ROUNDOFF = 2.0**-24  # of float32
SEQUENCES, FIRSTS = [(7, 300, 12, 5), (1, 2, 3, 4, 5, 6, 7)], [1, 4]


def _stored(folder, source, weights, tied):
    """Return a model, its arrays by name as an artifact stores them, and its RoPE tables."""
    stored = stored_model(read_model(source.config, source.name), weights)
    plan = plan_weights(stored.spec.adapt(source), stored.parameters, tied=tied)
    tables = dict(zip(TABLES, stored.spec.tables(64), strict=True))
    write_model_weights(folder / "w", plan, stored.formats, tables, lambda _: None)
    return stored, map_weights(folder / "w"), tables


@pytest.mark.parametrize(("weights", "tied"), [("int8", True), ("float32", False), ("bfloat16", True)])
def test_blocks_of_the_vocabulary(tmp_path, tiny_source, monkeypatch, weights, tied):
    """The tiny model's 320 tokens are not a multiple of the block, which is 3 panels of 16 outputs."""
    source = tiny_source(config={"tie_word_embeddings": tied})
    stored, arrays, tables = _stored(tmp_path, source, weights, tied)
    whole = answer_logits(stored, "float32", arrays, SEQUENCES, FIRSTS)
    monkeypatch.setattr(output_head, "_BLOCK", 48)
    blocks = answer_logits(stored, "float32", arrays, SEQUENCES, FIRSTS)
    bound = _reordering_error(source, arrays["model.norm.weight"], "embed_tokens" if tied else "lm_head")
    given = [jnp.asarray(arrays[name]) for name, _ in stored.arrays()]
    for sequence, first, one, other in zip(SEQUENCES, FIRSTS, whole, blocks, strict=True):
        assert one.shape == (len(sequence) - 1 - first, stored.spec.config.vocab)
        assert np.all(np.abs(one - other) <= bound)
        expected = stored.bind(given).forward(jnp.asarray([sequence]), *tables.values())[0, first:-1]
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


def test_a_large_model_pads_its_answers_to_several_lengths(tmp_path, tiny_source, monkeypatch):
    stored, arrays, _ = _stored(tmp_path, tiny_source(), "int8", False)
    sequences, firsts = [*SEQUENCES, (9,) * 5], [*FIRSTS, 0]
    together = answer_logits(stored, "bfloat16", arrays, sequences, firsts)
    monkeypatch.setattr(stored_reference, "MANY_WEIGHTS", 0)
    monkeypatch.setattr(stored_reference, "_STEP", 4)
    assert stored_reference.by_length(stored, [4, 7, 5]) == {4: [0], 7: [1, 2]}
    apart = answer_logits(stored, "bfloat16", arrays, sequences, firsts)
    monkeypatch.setattr(stored_reference, "_TOGETHER", 0)
    alone = answer_logits(stored, "bfloat16", arrays, sequences, firsts)
    for one, *others in zip(together, apart, alone, strict=True):
        for other in others:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def _reordering_error(source, gains: np.ndarray, head: str) -> np.ndarray:
    """Bound the difference between two float32 orders of summation, for each token of the vocabulary [V].

    In any order, a sum of n products is within n u Σ|x_i w_i| of the exact sum, with the unit roundoff u (Higham,
    Accuracy and Stability of Numerical Algorithms, 3.1), and Σ|x_i w_i| ≤ ‖x‖ ‖w‖.
    A normed row has ‖x‖ ≤ √D max|gain|, and its norm is another sum of D terms.
    """
    name = next(name for name in source.tensors if head in name)
    rows = source.tensors[name].read()
    width = rows.shape[1]
    lengths = np.linalg.norm(rows, axis=1) * 1.02  # as quantised
    return 2 * (2 * width) * UNIT_ROUNDOFF * width**0.5 * np.abs(gains).max() * lengths
