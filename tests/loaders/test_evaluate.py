"""Perplexity and divergence: the formulas, the windows, and a tiny artifact against itself and against others."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.audit import evaluate as e
from precast.loaders.load import load

VOCAB = 320


def ids(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, length]).integers(0, VOCAB, length).tolist())


class Table:
    """A scorer with fixed logits for each position."""

    tokenizer = None

    def __init__(self, rows, name="table"):
        self.rows, self.name = np.asarray(rows, np.float32), name
        self.context, self.vocab = self.rows.shape
        self.asked = []

    def logits(self, window, first):
        self.asked.append((tuple(window), first))
        for position in range(first, len(window) - 1):
            yield self.rows[position]


# --- formulas -----------------------------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=12)


def exact(logits) -> list[float]:
    """Compute probabilities according to the definition."""
    total = math.fsum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


@settings(deadline=None)
@given(LOGITS)
def test_log_softmax_is_the_logarithm_of_the_definition(logits):
    found = e.log_softmax(np.array(logits, np.float32))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [math.log(p) for p in exact(logits)], rtol=1e-12, atol=1e-12)


def test_log_softmax_takes_logits_of_any_size():
    np.testing.assert_array_equal(e.log_softmax(np.array([3e38, -3e38], np.float32))[0], 0.0)
    np.testing.assert_allclose(e.log_softmax(np.full(8, -1e30, np.float32)), -math.log(8))


def test_log_softmax_leaves_its_argument_alone():
    logits = np.array([1.0, 2.0])
    e.log_softmax(logits)
    np.testing.assert_array_equal(logits, [1.0, 2.0])


@pytest.mark.parametrize(
    ("reference", "artifact", "nats"),
    [
        ([0.5, 0.5], [0.5, 0.5], 0.0),
        ([0.5, 0.5], [0.25, 0.75], 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ([0.25, 0.75], [0.5, 0.5], 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
        ([0.98, 0.01, 0.01], [1 / 3] * 3, math.log(3) + 0.98 * math.log(0.98) + 0.02 * math.log(0.01)),
    ],
)
def test_divergence_of_distributions_by_hand(reference, artifact, nats):
    assert e.divergence(np.log(reference), np.log(artifact)) == pytest.approx(nats, abs=1e-15)


@settings(deadline=None)
@given(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(*[st.lists(st.floats(-30, 30), min_size=n, max_size=n)] * 2)
    )
)
def test_divergence_is_its_definition_and_never_negative(pair):
    p, q = map(exact, pair)
    found = e.divergence(*(e.log_softmax(np.array(logits)) for logits in pair))
    assert found >= 0
    assert found == pytest.approx(
        math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-12
    )


def test_perplexity_of_a_uniform_distribution_is_its_size():
    assert e.perplexity(np.full(7, math.log(50))) == pytest.approx(50)
    assert e.perplexity(np.log([2.0, 8.0])) == pytest.approx(4)
    assert e.perplexity(np.array([800.0])) is None


# --- windows ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(1, 700), st.integers(-3, 100))
def test_windows_are_consecutive_full_and_leave_out_no_more_than_they_must(total, width, shortest):
    places = e.plan_windows(total, width, shortest)
    assert [p.start for p in places] == [i * width for i in range(len(places))]
    assert all(len(p) == width for p in places[:-1])
    covered = sum(map(len, places))
    left = total - covered
    assert 0 <= left < min(width, max(shortest, 1))
    if places:
        assert len(places[-1]) >= min(width, max(shortest, 1))


@pytest.mark.parametrize(
    ("total", "count", "window", "lengths"),
    [
        (3072, 3072, 512, [512] * 6),
        (5000, 3072, 512, [512] * 6),
        (600, 3072, 512, [512, 88]),
        (575, 3072, 512, [512]),  # a window of 63 tokens is too short
        (576, 3072, 512, [512, 64]),
        (64, 3072, 512, [64]),
        (63, 3072, 512, []),
        (100, 3072, 32, [32, 32, 32]),
        (0, 3072, 512, []),
        (600, 40, 16, [16, 16]),
    ],
)
def test_a_text_is_cut_into_windows(total, count, window, lengths):
    found = e.cut(e.Tokens(prefix=(), ids=tuple(range(total))), count, window)
    assert [len(w) for w in found] == lengths
    assert [token for w in found for token in w] == list(range(sum(lengths)))


def test_every_window_begins_with_what_comes_before_a_text():
    found = e.cut(e.Tokens(prefix=(7, 8), ids=tuple(range(100, 172))), 3072, 12)
    assert [len(w) for w in found] == [12] * 7
    assert all(w[:2] == (7, 8) for w in found)
    assert [token for w in found for token in w[2:]] == list(range(100, 170))
    # The 64 tokens of the last window include the prefix.
    assert [len(w) for w in e.cut(e.Tokens(prefix=(7,), ids=tuple(range(63))), 3072, 512)] == [64]
    assert e.cut(e.Tokens(prefix=(7,), ids=tuple(range(62))), 3072, 512) == ()


def test_no_window_is_scored_on_special_tokens():
    assert e.cut(e.Tokens(prefix=(7,) * 4, ids=tuple(range(100))), 3072, 8) == ()


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ([5, 6], e.Tokens(prefix=(), ids=(5, 6))),
        ([1, 5, 6], e.Tokens(prefix=(1,), ids=(5, 6))),
        ([1, 5, 6, 2], e.Tokens(prefix=(1,), ids=(5, 6))),
        ([5, 6, 2], e.Tokens(prefix=(), ids=(5, 6))),
        ([1, 5, 9, 6], e.Tokens(prefix=(), ids=(1, 5, 9, 6))),
    ],
)
def test_special_tokens_are_told_apart_from_the_text(special, expected):
    tokenizer = SimpleNamespace(
        encode=lambda _, add_special_tokens=True: special if add_special_tokens else [5, 6]
    )
    assert e.tokenize(tokenizer, "text") == expected


def test_a_file_is_read_as_far_as_it_can_be_needed(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("ä\r\n".encode() * 10_000 + b"\xff")
    assert e.read_text(path, 10) == ("ä\r\n" * 1000)[:640]
    with pytest.raises(PrecastError, match="expected text in UTF-8, found other bytes"):
        e.read_text(path, 1000)


def test_the_shipped_text_is_prose_enough():
    text = e.read_text(e.SHIPPED_TEXT, e.DEFAULT_TOKENS)
    assert text == e.SHIPPED_TEXT.read_text(encoding="utf-8")
    assert text.isascii()
    assert 16_000 < len(text) < 20_000
    # Every tokenizer needs at least one token per word, so the text is long enough.
    assert len(text.split()) > 3000


# --- scores -------------------------------------------------------------------------------------------------


def test_each_token_of_the_second_half_is_scored():
    logits = np.log([[0.5, 0.25, 0.25]] * 8)
    table = Table(logits)
    window = (0, 1, 2, 0, 0, 1, 0, 0)  # four are prefilled; 0, 1, 0, 0 are predicted
    seen = []
    scores = e.evaluate(
        table, [window, (0, 0, 1)], progress=lambda step: seen.append((step.done, step.total))
    )
    assert table.asked == [(window, 3), ((0, 0, 1), 0)]
    assert seen == [(n, 6) for n in range(7)]
    assert scores == e.Scores(
        tokens=6, perplexity=pytest.approx((2 * 4 * 2 * 2 * 2 * 4) ** (1 / 6)), comparison=None
    )


def test_a_comparison_by_hand():
    reference = Table(np.log([[0.5, 0.3, 0.2]] * 4), "reference")
    artifact = Table(np.log([[0.3, 0.5, 0.2], [0.5, 0.3, 0.2], [0.3, 0.5, 0.2], [0.1, 0.1, 0.8]]))
    scores = e.evaluate(artifact, [(2, 2, 0, 1)], reference)  # positions 1 and 2 predict 0 and 1
    kl = 0.5 * math.log(5 / 3) + 0.3 * math.log(3 / 5)
    found = scores.comparison
    assert scores.perplexity == pytest.approx((1 / 0.5 * 1 / 0.5) ** 0.5)
    assert found.perplexity == pytest.approx((1 / 0.5 * 1 / 0.3) ** 0.5)
    assert (found.kl_mean, found.kl_p99) == (pytest.approx(kl / 2), pytest.approx(0.99 * kl))
    assert found.top1 == 0.5


def test_many_positions_against_formulas_over_all_of_them():
    rng = np.random.default_rng(3)
    p, q = rng.standard_normal((2, 200, 11)) * 3
    window = tuple(rng.integers(0, 11, 200).tolist())
    scores = e.evaluate(Table(q), [window], Table(p))
    p, q = (np.exp(x.astype(np.float32).astype(float))[99:199] for x in (p, q))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    kl = (p * np.log(p / q)).sum(1)
    rows, targets = np.arange(100), np.array(window[100:])
    assert scores.tokens == 100
    assert scores.perplexity == pytest.approx(np.prod(q[rows, targets] ** -0.01))
    assert scores.comparison.perplexity == pytest.approx(np.prod(p[rows, targets] ** -0.01))
    assert scores.comparison.kl_mean == pytest.approx(kl.mean())
    low, high = np.sort(kl)[-2:]
    assert scores.comparison.kl_p99 == pytest.approx(low + 0.01 * (high - low))
    assert scores.comparison.top1 == np.mean(p.argmax(1) == q.argmax(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    good, broken = np.zeros((8, 3)), np.zeros((8, 3))
    broken[5, 1] = bad
    for artifact, reference in ((broken, None), (broken, good), (good, broken)):
        with pytest.raises(PrecastError) as raised:
            e.evaluate(Table(artifact), [(0,) * 8], None if reference is None else Table(reference))
        assert str(raised.value).startswith("table: its logits are not finite; export")


def test_a_token_without_an_embedding_is_refused():
    with pytest.raises(PrecastError, match="expected token ids below 3, found 3;"):
        e.evaluate(Table(np.zeros((8, 3))), [(0, 1, 2, 0), (0, 3, 0, 0)])


# --- artifacts ----------------------------------------------------------------------------------------------


def test_the_logits_are_those_of_the_uncached_model(tiny_model, reference):
    """Prefill in one bucket and in chunks, then decode up to the last position of the KV cache."""
    scorer = e.ArtifactScorer(model=tiny_model)
    for length in (8, 9, 33, 64):
        window, first = ids(length), length // 2 - 1
        rows = [row.copy() for row in scorer.logits(window, first)]
        np.testing.assert_allclose(rows, reference(window)[first:-1], rtol=2e-4, atol=2e-4)


def test_of_several_slots_the_first_answers_alone(slots_model, tiny_model):
    rows, expected = (
        [row.copy() for row in e.ArtifactScorer(model=model).logits(ids(40), 19)]
        for model in (slots_model, tiny_model)
    )
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)


def test_an_artifact_is_its_own_reference(tiny_model, tiny_artifact):
    windows = [ids(64), ids(20, seed=1)]
    itself, again = e.ArtifactScorer(model=tiny_model), e.ArtifactScorer(model=load(tiny_artifact))
    scores = e.evaluate(itself, windows, again)
    assert scores.tokens == 42
    assert scores.comparison == e.Comparison(perplexity=scores.perplexity, kl_mean=0.0, kl_p99=0.0, top1=1.0)
    assert e.evaluate(itself, windows) == dataclasses.replace(scores, comparison=None)


def test_another_model_is_told_apart(tiny_model, depths):
    other = e.ArtifactScorer(model=load(depths[2]))
    scores = e.evaluate(e.ArtifactScorer(model=tiny_model), [ids(64)], other)
    assert scores.comparison.kl_mean > 0.1
    assert scores.comparison.kl_p99 > scores.comparison.kl_mean
    assert scores.comparison.top1 < 0.9
    assert scores.comparison.perplexity != scores.perplexity


# --- what is refused ----------------------------------------------------------------------------------------


def fake(name="model", context=64, vocab=300, size=290, plain=(5, 6)):
    tokenizer = SimpleNamespace(vocab_size=size, encode=lambda _, add_special_tokens=True: list(plain))
    return SimpleNamespace(name=name, context=context, vocab=vocab, tokenizer=tokenizer)


def test_the_window_is_the_default_where_every_model_has_room():
    assert e.check_window(None, [fake(context=2048), fake(context=600)]) == 512
    assert e.check_window(None, [fake(context=2048), fake(context=100)]) == 100
    assert e.check_window(100, [fake(context=100)]) == 100
    assert e.check_window(8, [fake(context=100)]) == 8


@pytest.mark.parametrize(("window", "found"), [(101, 101), (7, 7), (0, 0), (-1, -1)])
def test_a_window_outside_the_models_is_refused(window, found):
    with pytest.raises(PrecastError) as raised:
        e.check_window(window, [fake(context=2048), fake("short", context=100)])
    assert str(raised.value) == (f"--window: expected 8 to 100 (the context of short), found {found}.")


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            {"size": 291},
            "reference: has 291 tokens in its tokenizer, but model has 290;",
        ),
        ({"vocab": 320}, "reference: has 320 logits, but model has 300;"),
        (
            {"plain": (6, 5)},
            "reference: its tokenizer splits the text differently from the tokenizer of model",
        ),
    ],
)
def test_models_with_other_tokens_are_refused(other, text):
    with pytest.raises(PrecastError) as raised:
        e.check_same_tokens("text", fake(), fake("reference", **other))
    assert str(raised.value).startswith(text)
    assert str(raised.value).endswith("compare models with the same tokenizer.")
    e.check_same_tokens("text", fake(), fake("reference", context=9))
