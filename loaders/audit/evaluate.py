"""How well an artifact predicts a text, and how far its predictions are from a reference's.

The method: the text is tokenised without a chat template, cut to at most N tokens and into windows of W; a last,
shorter window counts where it has at least 64 tokens. Every window begins with what the tokenizer puts before a text
(a beginning-of-sequence token, or nothing), which is part of its W tokens. The first half of a window is prefilled
through the artifact's prefill programs, the second half is fed token by token through decode, whatever the artifact
would have said itself (teacher forcing), and every prediction from the last prefilled position on is scored. So the
numerics of prefill, of decode and of the cache all count.

Perplexity is e to the mean of −log p(next token). The divergence of a position is the Kullback–Leibler divergence
KL(reference ‖ artifact) = Σ p log(p / q) over the vocabulary, in nats, p the reference's probabilities and q the
artifact's. Logits become log-probabilities in float64, position by position: nothing is kept that grows with tokens
times vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from ..artifact.errors import PrecastError
from ..generation.model import Model
from ..progress import Progress, Step, silent
from ..text.tokenizer import Tokenizer

DEFAULT_TOKENS, DEFAULT_WINDOW = 3072, 512
SHORTEST_LAST, SMALLEST_WINDOW = 64, 8
SHIPPED_TEXT = Path(__file__).parent / "data" / "persuasion.txt"
# Tokens of prose have 4 characters; no more of a file is read than any N tokens could need.
_CHARACTERS_PER_TOKEN = 64


class Scorer(Protocol):
    """A model whose predictions can be asked for.

    Attributes:
        name: what messages call it.
        tokenizer: of the model.
        vocab: V, the length of its logits.
        context: positions that a window may have.
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
        """Logits ``[V]`` of the positions ``first … len(window) − 2``, each a view that the next may overwrite."""


@dataclass(frozen=True, kw_only=True)
class ArtifactScorer:
    """A loaded artifact: prefill up to the first position asked for, then decode. Of its slots, the first is used."""

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
        cache, idle = engine.new_cache(), engine.slots - 1
        step = engine.prefill(window[: first + 1], cache)
        yield engine.logits(step)[0]
        for position in range(first + 1, len(window) - 1):
            step = engine.decode([window[position], *[0] * idle], [position, *[-1] * idle], cache)
            yield engine.logits(step)[0]


# --- what is scored -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A text's tokens.

    Attributes:
        prefix: what the tokenizer puts before any text.
        ids: the text itself.
    """

    prefix: tuple[int, ...]
    ids: tuple[int, ...]


def read_text(path: Path, tokens: int) -> str:
    """The beginning of a text file, as much of it as `tokens` tokens can need.

    Raises:
        PrecastError: for a file that is missing, empty, or no text in UTF-8.
    """
    if not path.exists():
        raise PrecastError(f"{path}: expected a text file, but it does not exist; check the spelling.")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read(tokens * _CHARACTERS_PER_TOKEN)
    except UnicodeDecodeError:
        raise PrecastError(f"{path}: expected text in UTF-8, found other bytes; convert it first.") from None
    if "\0" in text:
        raise PrecastError(f"{path}: expected text, found zero bytes; is it a binary file?")
    if not text.strip():
        raise PrecastError(f"{path}: expected some text, found none; name another file.")
    return text


def tokenize(tokenizer: Tokenizer, text: str) -> Tokens:
    """A text's tokens, apart from the special ones around it; one that ends a text is left out."""
    whole, plain = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return Tokens(prefix=tuple(whole[:start]), ids=tuple(plain))
    # Special tokens that change the text's own: there is no telling them apart.
    return Tokens(prefix=(), ids=tuple(whole))


def plan_windows(total: int, width: int, shortest: int) -> tuple[range, ...]:
    """Places of consecutive windows in `total` tokens: each `width` long, a last one at least `shortest`."""
    full = [range(begin, begin + width) for begin in range(0, total - width + 1, width)]
    rest = range(len(full) * width, total)
    return (*full, rest) if rest and len(rest) >= shortest else tuple(full)


def cut(tokens: Tokens, count: int, window: int) -> tuple[tuple[int, ...], ...]:
    """Windows over the first `count` tokens of a text, of at most `window` tokens each; none where it is too short."""
    prefix = len(tokens.prefix)
    if prefix >= window // 2:
        return ()
    places = plan_windows(min(count, len(tokens.ids)), window - prefix, SHORTEST_LAST - prefix)
    return tuple(tokens.prefix + tokens.ids[place.start : place.stop] for place in places)


def predictions(windows: Sequence[Sequence[int]]) -> int:
    """How many predictions are scored."""
    return sum(len(window) - _prefilled(window) for window in windows)


def _prefilled(window: Sequence[int]) -> int:
    return len(window) // 2


def check_window(window: int | None, scorers: Sequence[Scorer]) -> int:
    """The window to use: the one asked for, or the default where the models have so many positions.

    Raises:
        PrecastError: for a window too small to be halved, or longer than a model's positions.
    """
    smallest = min(scorers, key=lambda s: s.context)
    if window is None:
        window = min(DEFAULT_WINDOW, smallest.context)
    if not SMALLEST_WINDOW <= window <= smallest.context:
        raise PrecastError(
            f"--window: {window} is not possible, expected {SMALLEST_WINDOW} to {smallest.context} (the positions of"
            f" {smallest.name})."
        )
    return window


def check_same_tokens(text: str, artifact: Scorer, reference: Scorer) -> None:
    """Predictions of different tokens cannot be compared.

    Raises:
        PrecastError: where the vocabularies have different sizes or the text has different tokens.
    """
    for what, found, expected in (
        ("tokens in its tokenizer", reference.tokenizer.vocab_size, artifact.tokenizer.vocab_size),
        ("logits", reference.vocab, artifact.vocab),
    ):
        if found != expected:
            raise PrecastError(
                f"{reference.name}: expected a reference with the {expected} {what} that {artifact.name} has, found"
                f" {found}; compare models with the same tokenizer."
            )
    if tokenize(artifact.tokenizer, text) != tokenize(reference.tokenizer, text):
        raise PrecastError(
            f"{reference.name}: its tokenizer gives the text other tokens than that of {artifact.name}; compare models"
            " with the same tokenizer."
        )


# --- scores -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The artifact's predictions against a reference's.

    Attributes:
        perplexity: of the reference, on the same tokens; None where it is more than a float holds.
        kl_mean: mean KL(reference ‖ artifact), nats per token.
        kl_p99: its 99th percentile, interpolated linearly between predictions.
        top1: share of predictions where both find the same token likeliest, 0 to 1.
    """

    perplexity: float | None
    kl_mean: float
    kl_p99: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an evaluation found.

    Attributes:
        tokens: predictions scored.
        perplexity: None where it is more than a float holds.
        comparison: None without a reference.
    """

    tokens: int
    perplexity: float | None
    comparison: Comparison | None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, in float64, of logits ``[V]``."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def divergence(reference: np.ndarray, artifact: np.ndarray) -> float:
    """KL(reference ‖ artifact) in nats, of log-probabilities ``[V]``."""
    # Never negative but for rounding.
    return max(float(np.exp(reference) @ (reference - artifact)), 0.0)


def perplexity(losses: np.ndarray) -> float | None:
    """e to the mean of −log p; None where a float does not hold it."""
    with np.errstate(over="ignore"):
        value = float(np.exp(losses.mean()))
    return value if np.isfinite(value) else None


def evaluate(
    artifact: Scorer,
    windows: Sequence[Sequence[int]],
    reference: Scorer | None = None,
    progress: Progress = silent,
) -> Scores:
    """Scores every prediction in the second halves of the windows.

    Args:
        artifact: whose predictions are scored.
        windows: token ids, each at most as long as both models' context. At least one.
        reference: what they are compared with.
        progress: receives the number of predictions scored.

    Raises:
        PrecastError: for a token outside the vocabulary, and for logits that are not finite.
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
    """For each prediction: the loss; with a reference also its loss, the divergence, and whether the tops agree."""
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
        raise PrecastError(
            f"{scorer.name}: its logits are not finite numbers, so they predict nothing; export the model again."
        )
    return row


def _check_ids(windows: Sequence[Sequence[int]], scorer: Scorer) -> None:
    largest = max(map(max, windows))
    if largest >= scorer.vocab:
        raise PrecastError(
            f"{scorer.name}: the text has token {largest}, the model knows {scorer.vocab}; tokenizer and model do not"
            " belong together."
        )
