"""Measure how well an artifact predicts a text, and how far its predictions are from those of a reference model.

The text is tokenised without a chat template. Its first N tokens are cut into windows of W tokens. A shorter window at
the end is used if it has at least 64 tokens. Every window begins with the tokens that the tokenizer puts before a text
(a beginning-of-sequence token, or nothing). These tokens count towards W. The first half of a window is prefilled
through the artifact's prefill programs. The second half is fed token by token through decode, regardless of the
artifact's own choices (teacher forcing). Every prediction is scored, beginning with the one at the last prefilled
position. So the score reflects the numerics of prefill, decode and the KV cache.

Perplexity is exp(mean of −log p(next token)). The divergence at a position is the Kullback–Leibler divergence
KL(reference ‖ artifact) = Σ p log(p / q) over the vocabulary, in nats, where p and q are the probabilities of reference
and artifact. Logits are converted to float64 log-probabilities one position at a time, so memory does not grow with
tokens times vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from ..artifact.errors import PrecastError
from ..generation.engine import DecodeRow
from ..generation.model import Model
from ..progress import Progress, Step, silent
from ..text.tokenizer import Tokenizer

DEFAULT_TOKENS, DEFAULT_WINDOW = 3072, 512
SHORTEST_LAST, SMALLEST_WINDOW = 64, 8
SHIPPED_TEXT = Path(__file__).parent / "data" / "persuasion.txt"
# The maximum number of characters read from a file for each token. Prose has about 4 characters per token.
_CHARACTERS_PER_TOKEN = 64


class Scorer(Protocol):
    """A model that predicts tokens.

    Attributes:
        name: the model's name in messages.
        tokenizer: the model's tokenizer.
        vocab: V, the number of logits.
        context: maximum length of a window, in positions.
    """

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def vocab(self) -> int: ...
    @property
    def context(self) -> int: ...

    def logits(self, window: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Yield the logits [V] of positions `first` to ``len(window) − 2``. An array is valid until the next one."""


@dataclass(frozen=True, kw_only=True)
class ArtifactScorer:
    """A scorer that runs an artifact: it prefills up to the first scored position, then decodes, in the first slot."""

    model: Model

    @property
    def name(self) -> str:
        return self.model.manifest.name

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def vocab(self) -> int:
        return self.model.engine.vocab

    @property
    def context(self) -> int:
        return self.model.engine.context

    def logits(self, window: Sequence[int], first: int) -> Iterator[np.ndarray]:
        engine = self.model.engine
        cache = engine.new_cache()
        step = engine.prefill(window[: first + 1], cache)
        yield engine.logits(step)[0]
        for position in range(first + 1, len(window) - 1):
            step = engine.decode([DecodeRow(0, window[position], position)], cache)
            yield engine.logits(step)[0]


# --- texts and windows --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A text's tokens.

    Attributes:
        prefix: the tokens that the tokenizer puts before any text.
        ids: the tokens of the text itself.
    """

    prefix: tuple[int, ...]
    ids: tuple[int, ...]


def read_text(path: Path, tokens: int) -> str:
    """Return the beginning of a text file, long enough for a number of tokens.

    Args:
        path: the file.
        tokens: number of tokens.

    Raises:
        PrecastError: the file is missing, empty, or not text in UTF-8.
    """
    if not path.exists():
        raise PrecastError(f"{path}: expected a text file, but it does not exist; check the spelling.")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read(tokens * _CHARACTERS_PER_TOKEN)
    except UnicodeDecodeError:
        raise PrecastError(f"{path}: expected text in UTF-8, found other bytes; convert it first.") from None
    if "\0" in text:
        raise PrecastError(f"{path}: expected text, found NUL bytes; name a text file.")
    if not text.strip():
        raise PrecastError(f"{path}: expected some text, found none; name another file.")
    return text


def tokenize(tokenizer: Tokenizer, text: str) -> Tokens:
    """Return a text's tokens, and the special tokens before the text; drop special tokens after the text."""
    whole, plain = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return Tokens(prefix=tuple(whole[:start]), ids=tuple(plain))
    # The special tokens change how the text itself is split into tokens, so they cannot be separated from it.
    return Tokens(prefix=(), ids=tuple(whole))


def plan_windows(total: int, width: int, shortest: int) -> tuple[range, ...]:
    """Return the ranges of consecutive windows.

    Args:
        total: number of tokens in the text.
        width: number of tokens in a window.
        shortest: minimum number of tokens in the last window.
    """
    full = [range(begin, begin + width) for begin in range(0, total - width + 1, width)]
    rest = range(len(full) * width, total)
    return (*full, rest) if rest and len(rest) >= shortest else tuple(full)


def cut(tokens: Tokens, count: int, window: int) -> tuple[tuple[int, ...], ...]:
    """Cut a text into windows; return no windows if the text is too short, or its prefix fills half a window.

    Args:
        tokens: the text.
        count: maximum number of tokens of the text to use.
        window: number of tokens in a window, including its prefix.
    """
    prefix = len(tokens.prefix)
    if prefix >= window // 2:
        return ()
    places = plan_windows(min(count, len(tokens.ids)), window - prefix, SHORTEST_LAST - prefix)
    return tuple(tokens.prefix + tokens.ids[place.start : place.stop] for place in places)


def predictions(windows: Sequence[Sequence[int]]) -> int:
    """Return the number of predictions that are scored."""
    return sum(len(window) - _prefilled(window) for window in windows)


def _prefilled(window: Sequence[int]) -> int:
    return len(window) // 2


def check_window(window: int | None, scorers: Sequence[Scorer]) -> int:
    """Return the length of a window in tokens.

    Args:
        window: the requested length; None for the default, or the context if that is less.
        scorers: the models.

    Raises:
        PrecastError: the length is less than `SMALLEST_WINDOW` or more than a model's context.
    """
    smallest = min(scorers, key=lambda s: s.context)
    if window is None:
        window = min(DEFAULT_WINDOW, smallest.context)
    if not SMALLEST_WINDOW <= window <= smallest.context:
        raise PrecastError(
            f"--window: expected {SMALLEST_WINDOW} to {smallest.context} (the context of {smallest.name}), found"
            f" {window}."
        )
    return window


def check_same_tokens(text: str, artifact: Scorer, reference: Scorer) -> None:
    """Check that two models predict the same tokens.

    Args:
        text: the text to compare.
        artifact: one model.
        reference: the other model.

    Raises:
        PrecastError: their vocabularies have different sizes, or their tokenizers split the text differently.
    """
    for what, found, expected in (
        ("tokens in its tokenizer", reference.tokenizer.vocab_size, artifact.tokenizer.vocab_size),
        ("logits", reference.vocab, artifact.vocab),
    ):
        if found != expected:
            raise PrecastError(
                f"{reference.name}: has {found} {what}, but {artifact.name} has {expected}; compare"
                " models with the same tokenizer."
            )
    if tokenize(artifact.tokenizer, text) != tokenize(reference.tokenizer, text):
        raise PrecastError(
            f"{reference.name}: its tokenizer splits the text differently from the tokenizer of {artifact.name};"
            " compare models with the same tokenizer."
        )


# --- scores -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The artifact's predictions compared with a reference's.

    Attributes:
        perplexity: the reference's perplexity on the same tokens; None if the value is beyond the range of a float.
        kl_mean: mean of KL(reference ‖ artifact), in nats per token.
        kl_p99: 99th percentile of KL(reference ‖ artifact), interpolated linearly between predictions.
        top1: share of predictions with the same likeliest token, 0 to 1.
    """

    perplexity: float | None
    kl_mean: float
    kl_p99: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The result of an evaluation.

    Attributes:
        tokens: number of predictions scored.
        perplexity: the artifact's perplexity; None if the value is beyond the range of a float.
        comparison: the comparison with the reference; None without a reference.
    """

    tokens: int
    perplexity: float | None
    comparison: Comparison | None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities float64 [V] of logits [V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def divergence(reference: np.ndarray, artifact: np.ndarray) -> float:
    """Return KL(reference ‖ artifact) in nats, given log-probabilities [V]."""
    # The divergence is never negative, but rounding can make the sum negative.
    return max(float(np.exp(reference) @ (reference - artifact)), 0.0)


def perplexity(losses: np.ndarray) -> float | None:
    """Return exp(mean of losses), given the loss −log p of each prediction; None if it exceeds the range of a float."""
    with np.errstate(over="ignore"):
        value = float(np.exp(losses.mean()))
    return value if np.isfinite(value) else None


def evaluate(
    artifact: Scorer,
    windows: Sequence[Sequence[int]],
    reference: Scorer | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score every prediction in the second halves of the windows.

    Args:
        artifact: the model to score.
        windows: at least one window of token ids, each within both models' contexts.
        reference: the model to compare the artifact with; None to compute only the artifact's perplexity.
        progress: receives the number of predictions scored.

    Raises:
        PrecastError: a token is outside the vocabulary, or a logit is not finite.
    """
    _check_ids(windows, artifact)
    total, points = predictions(windows), []
    step = partial(Step, text="scoring", total=total, unit="predictions")
    progress(step(done=0))
    for window in windows:
        for point in _points(artifact, window, reference):
            points.append(point)
            progress(step(done=len(points)))
    losses, *compared = np.array(points).T
    return Scores(
        tokens=total,
        perplexity=perplexity(losses),
        comparison=_comparison(*compared) if compared else None,
    )


def _comparison(losses: np.ndarray, kl: np.ndarray, same: np.ndarray) -> Comparison:
    return Comparison(
        perplexity=perplexity(losses),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        top1=float(same.mean()),
    )


def _points(artifact: Scorer, window: Sequence[int], reference: Scorer | None) -> Iterator[tuple[float, ...]]:
    """Yield the artifact's loss at each scored prediction.

    With a reference, also yield the reference's loss, the divergence, and 1.0 if both models have the same top token,
    else 0.0.
    """
    first = _prefilled(window) - 1
    rows = artifact.logits(window, first)
    targets = window[first + 1 :]
    if reference is None:
        for target, row in zip(targets, rows, strict=True):
            yield (-log_softmax(_finite(row, artifact))[target],)
        return
    for target, row, other in zip(targets, rows, reference.logits(window, first), strict=True):
        own, expected = log_softmax(_finite(row, artifact)), log_softmax(_finite(other, reference))
        same = row.argmax() == other.argmax()
        yield -own[target], -expected[target], divergence(expected, own), float(same)


def _finite(row: np.ndarray, scorer: Scorer) -> np.ndarray:
    if not np.isfinite(row).all():
        raise PrecastError(f"{scorer.name}: its logits are not finite; export the model again.")
    return row


def _check_ids(windows: Sequence[Sequence[int]], scorer: Scorer) -> None:
    largest = max(map(max, windows))
    if largest >= scorer.vocab:
        raise PrecastError(
            f"{scorer.name}: expected token ids below {scorer.vocab}, found {largest}; the tokenizer belongs to another"
            " model: export the model again."
        )
