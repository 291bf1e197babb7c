"""Buckets, chunks, positions and slots, against the model without cache, buckets or kernels."""

import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.engine import DecodeRow
from precast.loaders.runtime import pjrt

CONTEXT, VOCAB = 64, 320


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, VOCAB, length).tolist()


def greedy(engine, cache, ids, count, *, slot=0) -> list[int]:
    """Prefill and decode one slot greedily, while all other slots are idle."""
    step = engine.prefill(ids, cache, slot=slot)
    tokens = [int(step.token[0])]
    while len(tokens) < count:
        row = DecodeRow(slot, tokens[-1], len(ids) + len(tokens) - 1)
        tokens.append(int(engine.decode([row], cache).token[0]))
    return tokens


def contents(cache) -> dict[str, np.ndarray]:
    """Return a copy of the cache's arrays, [L, B, K, S, H]."""
    return {name: pjrt.client().get(buffer).copy() for name, buffer in cache.buffers.items()}


def assert_greedy(reference, ids, tokens) -> None:
    """Check that every token is the reference's argmax. With random weights there are no ties, so none are allowed."""
    best = reference([*ids, *tokens]).argmax(-1)
    assert tokens == best[len(ids) - 1 : -1].tolist()


@pytest.mark.parametrize("length", range(1, CONTEXT))
def test_every_prompt_length_answers_as_the_reference_does(tiny_model, reference, length):
    engine, ids = tiny_model.engine, prompt(length)
    count = min(6, CONTEXT - length)
    assert_greedy(reference, ids, greedy(engine, engine.new_cache(), ids, count))


def test_logits_match_the_reference_up_to_rounding(tiny_model, reference):
    """Test chunks, single steps and the last position. The order of float32 sums differs, hence the tolerance."""
    engine, ids = tiny_model.engine, prompt(CONTEXT, seed=1)
    expected = reference(ids)
    for length in (1, 7, 8, 9, 16, 17, 33, 63):
        cache = engine.new_cache()
        step = engine.prefill(ids[:length], cache)
        np.testing.assert_allclose(engine.logits(step)[0], expected[length - 1], rtol=2e-4, atol=2e-4)
    step = engine.decode([DecodeRow(0, ids[63], 63)], cache)
    np.testing.assert_allclose(engine.logits(step)[0], expected[63], rtol=2e-4, atol=2e-4)


def test_the_token_of_a_step_is_the_best_of_its_logits(tiny_model):
    engine = tiny_model.engine
    step = engine.prefill(prompt(5), engine.new_cache())
    assert step.token.shape == (1,)
    assert engine.logits(step).shape == (1, VOCAB)
    assert step.token[0] == engine.logits(step)[0].argmax()


@pytest.mark.parametrize("cut", [1, 3, 8, 15])
def test_a_prompt_in_pieces_equals_the_prompt_in_one(tiny_model, cut):
    engine, ids = tiny_model.engine, prompt(16)
    whole, pieces = engine.new_cache(), engine.new_cache()
    one = engine.logits(engine.prefill(ids, whole))
    engine.prefill(ids[:cut], pieces)
    two = engine.logits(engine.prefill(ids[cut:], pieces, start=cut))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    first, second = contents(whole), contents(pieces)
    for name, array in first.items():
        np.testing.assert_allclose(array[:, 0, :, :16], second[name][:, 0, :, :16], rtol=1e-4, atol=1e-4)


def test_old_contents_behind_the_prompt_have_no_effect(tiny_model, reference):
    """An older, longer sequence has filled the positions of the new sequence's padding and later tokens."""
    engine, cache = tiny_model.engine, tiny_model.engine.new_cache()
    engine.prefill(prompt(60, seed=2), cache)
    for length in (1, 5, 8, 13, 20):
        ids = prompt(length, seed=3)
        assert_greedy(reference, ids, greedy(engine, cache, ids, 4))


def test_padding_is_never_written(tiny_model):
    engine, cache = tiny_model.engine, tiny_model.engine.new_cache()
    engine.prefill(prompt(40), cache)
    before = contents(cache)
    engine.prefill(prompt(3, seed=9), cache, start=10)  # a bucket of 8: five positions of padding
    after = contents(cache)
    for name, array in before.items():
        rest = np.r_[0:10, 13:40]
        np.testing.assert_array_equal(array[..., rest, :], after[name][..., rest, :])
        assert not np.array_equal(array[..., 10:13, :], after[name][..., 10:13, :])


@pytest.mark.parametrize("integer", [np.int32, np.int64, np.array])
def test_start_and_slot_may_be_numpy_s_integers(slots_model, integer):
    engine, ids = slots_model.engine, prompt(20)
    ours, theirs = engine.new_cache(), engine.new_cache()
    for cache, of in ((ours, int), (theirs, integer)):
        engine.prefill(ids[:3], cache, start=of(0), slot=of(1))
        engine.prefill(ids[3:], cache, start=of(3), slot=of(1))
    for name, array in contents(ours).items():
        # Positions after the prompt, and other slots, were never written.
        np.testing.assert_array_equal(array[:, 1, :, :20], contents(theirs)[name][:, 1, :, :20])


def test_start_and_slot_must_be_integers(tiny_model):
    engine = tiny_model.engine
    for place in ({"start": 1.0}, {"slot": 0.0}):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            engine.prefill(prompt(3), engine.new_cache(), **place)


# --- slots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (2, 0), (1,)])
def test_sequences_decoded_together_answer_as_if_alone(slots_model, reference, order):
    engine, prompts = slots_model.engine, [prompt(n, seed=4) for n in (5, 23, 12)]
    cache = engine.new_cache()
    tokens = [[int(engine.prefill(ids, cache, slot=slot).token[0])] for slot, ids in enumerate(prompts)]
    for _ in range(7):
        rows = [DecodeRow(s, tokens[s][-1], len(prompts[s]) + len(tokens[s]) - 1) for s in order]
        step = engine.decode(rows, cache)
        logits = engine.logits(step)
        assert logits.shape == (len(order), VOCAB)
        for row, token, scores in zip(rows, step.token, logits, strict=True):
            assert token == scores.argmax()
            tokens[row.slot].append(int(token))
    for slot in order:
        assert_greedy(reference, prompts[slot], tokens[slot])
        assert tokens[slot] == greedy(engine, engine.new_cache(), prompts[slot], 8, slot=slot)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_contents_of_other_slots_do_not_change_an_answer(slots_model, order):
    engine, prompts = slots_model.engine, [prompt(n, seed=5) for n in (17, 3, 9)]
    alone = [greedy(engine, engine.new_cache(), ids, 5) for ids in prompts]
    cache = engine.new_cache()
    for slot, index in enumerate(order):
        assert greedy(engine, cache, prompts[index], 5, slot=slot) == alone[index]


def test_idle_slots_are_not_written(slots_model):
    engine, cache = slots_model.engine, slots_model.engine.new_cache()
    for slot in range(3):
        engine.prefill(prompt(20, seed=slot), cache, slot=slot)
    before = contents(cache)
    engine.prefill(prompt(11, seed=7), cache, slot=1, start=20)
    engine.decode([DecodeRow(1, 5, 31)], cache)
    after = contents(cache)
    for name, array in before.items():
        assert array[:, [0, 2]].tobytes() == after[name][:, [0, 2]].tobytes()
        assert array[:, 1].tobytes() != after[name][:, 1].tobytes()


def test_caches_are_independent(tiny_model):
    engine, ids = tiny_model.engine, prompt(12)
    first, second = engine.new_cache(), engine.new_cache()
    step = engine.prefill(ids, first)
    before = contents(first)
    engine.prefill(prompt(30, seed=8), second)
    for name, array in before.items():
        np.testing.assert_array_equal(array[..., :12, :], contents(first)[name][..., :12, :])
    assert step.token[0] == engine.prefill(ids, engine.new_cache()).token[0]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "slots []: expected distinct slots from 0 to 2"),
        ([(3, 5, 0)], "slots [3]: expected distinct slots from 0 to 2"),
        ([(-1, 5, 0)], "slots [-1]: expected distinct slots from 0 to 2"),
        ([(1, 5, 0), (1, 6, 1)], "slots [1, 1]: expected distinct slots from 0 to 2"),
        ([(0, 5, 64)], "positions [64]: expected positions from 0 to 63"),
        ([(0, 5, 3), (1, 5, -1)], "positions [3, -1]: expected positions from 0 to 63"),
    ],
)
def test_rows_that_no_cache_holds_are_refused(slots_model, rows, problem):
    engine = slots_model.engine
    with pytest.raises(ValueError, match=re.escape(problem) + "$"):
        engine.decode([DecodeRow(*row) for row in rows], engine.new_cache())


def test_a_chunk_is_a_prompt_of_one_call(slots_model):
    engine, ids = slots_model.engine, prompt(20)
    assert engine.buckets == (8, 16)
    whole, cut = engine.new_cache(), engine.new_cache()
    expected = engine.logits(engine.prefill(ids, whole, slot=1)).copy()
    engine.prefill_chunk(ids[:16], cut, start=0, slot=1)
    found = engine.logits(engine.prefill_chunk(ids[16:], cut, start=16, slot=1))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"^17 tokens exceed the largest bucket of 16$"):
        engine.prefill_chunk(ids[:17], cut, start=0, slot=1)


# --- several results of one sequence ------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 16), (5, 3), (20, 7), (48, 16), (63, 1)])
def test_score_answers_after_every_token(tiny_model, reference, start, count):
    engine, ids, cache = tiny_model.engine, prompt(CONTEXT, seed=6), tiny_model.engine.new_cache()
    if start:
        engine.prefill(ids[:start], cache, slot=5)
    step = engine.score(ids[start : start + count], cache, start=start, slot=5)
    logits = engine.logits(step)
    assert (step.token.shape, logits.shape) == ((count,), (count, VOCAB))
    np.testing.assert_allclose(logits, reference(ids)[start : start + count], rtol=2e-4, atol=2e-4)
    assert step.token.tolist() == logits.argmax(1).tolist()


def test_scored_tokens_can_be_replaced(tiny_model, reference):
    """If the tokens of a draft are wrong, the next tokens overwrite them."""
    engine, ids, cache = tiny_model.engine, prompt(20, seed=7), tiny_model.engine.new_cache()
    engine.prefill(ids[:10], cache, slot=7)
    engine.score([*ids[10:14], 3, 3, 3], cache, start=10, slot=7)
    step = engine.decode([DecodeRow(7, ids[14], 14)], cache)
    np.testing.assert_allclose(engine.logits(step)[0], reference(ids)[14], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("tokens", "place", "problem"),
    [
        (17, (0, 0), "17 tokens exceed the 16 that one call can score"),
        (0, (0, 0), "0 tokens at position 0 do not fit a context of 64"),
        (2, (63, 0), "2 tokens at position 63 do not fit a context of 64"),
        (2, (-1, 0), "2 tokens at position -1 do not fit a context of 64"),
        (2, (0, 8), "slot 8: expected a slot from 0 to 7"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(tiny_model, tokens, place, problem):
    engine = tiny_model.engine
    with pytest.raises(ValueError, match=f"^{problem}$"):
        engine.score(prompt(tokens), engine.new_cache(), start=place[0], slot=place[1])


def test_the_portable_target_decodes_one_sequence_and_several(tiny_artifact, reference):
    """Test its programs for one sequence, for all slots, and for scoring, which use no kernels."""
    from precast.loaders.load import load

    engine = load(
        tiny_artifact, target="portable", allow_compile=True, trusted=True, log=lambda _: None
    ).engine
    cache, prompts = engine.new_cache(), {6: prompt(9, seed=8), 2: prompt(21, seed=9)}
    for slot, ids in prompts.items():
        engine.prefill(ids[:-2], cache, slot=slot)
    alone = DecodeRow(6, prompts[6][-2], 7)
    found = [engine.logits(engine.decode([alone], cache))[0].copy()]
    both = [DecodeRow(2, prompts[2][-2], 19), DecodeRow(6, prompts[6][-1], 8)]
    found += list(engine.logits(engine.decode(both, cache)))
    scored = engine.logits(engine.score(prompts[2][-1:], cache, start=20, slot=2))
    expected = [reference(prompts[6])[-2], reference(prompts[2])[-2], reference(prompts[6])[-1]]
    np.testing.assert_allclose(
        [*found, *scored], [*expected, reference(prompts[2])[-1]], rtol=2e-4, atol=2e-4
    )


# --- programs that wait for their first call ----------------------------------------------------------------


@pytest.fixture
def deserialised(monkeypatch):
    """Return the names of the programs that XLA deserialises, in order."""
    names, load = [], pjrt.Client.load

    def recorded(self, serialized, results, where):
        names.append(where.rpartition("/")[2])
        return load(self, serialized, results, where)

    monkeypatch.setattr(pjrt.Client, "load", recorded)
    return names


def test_score_is_deserialised_once_by_its_first_call(tiny_artifact, deserialised):
    from precast.loaders.load import load

    engine, ids = load(tiny_artifact, trusted=True).engine, prompt(5)
    assert "score.xla" not in deserialised
    assert len(deserialised) == 4
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(engine.score, ids, engine.new_cache(), start=0, slot=0) for _ in range(8)]
    assert len({tuple(call.result().token.tolist()) for call in calls}) == 1
    assert deserialised[4:] == ["score.xla"]


def test_a_score_program_that_xla_refuses_is_named_at_its_first_call(artifact_copy, edit_manifest):
    """The manifest lists the damaged file, so only XLA notices."""
    from hashlib import sha256

    from precast.loaders.load import load

    data = b"no executable"
    (artifact_copy / "programs/cpu/score.xla").write_bytes(data)
    entry = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    edit_manifest(artifact_copy, lambda m: m["files"].update({"programs/cpu/score.xla": entry}))
    engine = load(artifact_copy, trusted=True).engine
    for _ in range(2):
        with pytest.raises(PrecastError, match=r"programs/cpu/score\.xla: XLA does not load this executable"):
            engine.score(prompt(3), engine.new_cache(), start=0, slot=0)
