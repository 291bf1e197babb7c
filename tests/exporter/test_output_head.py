"""Logits computed a block of the vocabulary at a time are those computed at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from precast.exporter import output_head
from precast.exporter.models import read_model
from precast.exporter.programs import TABLES, stored_model
from precast.exporter.stored_reference import answer_logits
from precast.exporter.weights import plan_weights, write_model_weights
from precast.loaders.artifact.weights import map_weights

SEQUENCES, FIRSTS = [(7, 300, 12, 5), (1, 2, 3, 4, 5, 6, 7)], [1, 4]


@pytest.mark.parametrize(("weights", "tied"), [("int8", True), ("float32", False), ("bfloat16", True)])
def test_blocks_of_the_vocabulary(tmp_path, tiny_source, monkeypatch, weights, tied):
    """The tiny model's 320 tokens are no multiple of the block, and 48 of 16 outputs at a time are."""
    source = tiny_source(config={"tie_word_embeddings": tied})
    stored = stored_model(read_model(source.config, source.name), weights)
    plan = plan_weights(stored.spec.adapted(source), stored.parameters, tied=tied)
    tables = dict(zip(TABLES, stored.spec.tables(64), strict=True))
    write_model_weights(tmp_path / "w", plan, stored.formats, tables, lambda _: None)
    arrays = map_weights(tmp_path / "w")
    whole = answer_logits(stored, "float32", arrays, SEQUENCES, FIRSTS)
    monkeypatch.setattr(output_head, "_BLOCK", 48)
    blocks = answer_logits(stored, "float32", arrays, SEQUENCES, FIRSTS)
    given = [jnp.asarray(arrays[name]) for name, _ in stored.arrays()]
    for sequence, first, one, other in zip(SEQUENCES, FIRSTS, whole, blocks, strict=True):
        assert one.shape == (len(sequence) - 1 - first, stored.spec.config.vocab)
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        expected = stored.bind(given).forward(jnp.asarray([sequence]), *tables.values())[0, first:-1]
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)
