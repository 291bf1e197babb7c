"""Golden answers: what the artifact says, held against the uncached reference before it is shipped."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.golden import Answer, FirstLogits, Golden
from precast.loaders.audit.verify import first_logits
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams

from ..programs import StoredModel
from .stored import answer_logits

# Two of them go on in one way alone, so that some answers are far from any tie.
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "水は",
    "a b c d a b c d a b c d a b c d a b",
    "one, two, three, four, one, two, three, four, one, two, three, four, one,",
)
TOKENS = 16
# Programs that sum in another order give logits that differ by about 1e-5 of their spread (standard deviation); two
# candidates closer than this share of it may rightly change places.
TIE = 1e-3
# The same where activations are rounded to 16 bits, or keys and values to the type of the cache: the reference has the
# same weights and rounds alike, but what lies close to a border falls to either side of it.
REDUCED_TIE = 0.05
# Where a target computes in bfloat16: measured, leads among the eight likeliest tokens change by up to 0.06 of the
# spread (12 steps of the demo model).
BFLOAT16_TIE = 0.15
# With int4 weights a prompt's activations are rounded to 8 bits: measured, leads change by 0.06 of the spread
# (standard deviation, prompts of 5 to 65 tokens of the demo model).
INT4_TIE = 0.25
# Logits of an answer's first step that are kept, the largest ones.
LOGITS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """An answer.

    Attributes:
        first: logits of its first step; their tolerance is what a tie is, as a share of all logits' spread.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    first: FirstLogits


def prompts(model: Model) -> list[tuple[int, ...]]:
    """Texts, and a prompt that is one token longer than the smallest bucket where the cache holds it."""
    vocab, context = model.engine.vocab, model.engine.context
    room = max(1, context - TOKENS)
    spread = tuple(i * 7919 % vocab for i in range(1, min(model.manifest.buckets[0] + 2, room + 1)))
    texts = [tuple(model.tokenizer.encode(text)[:room]) for text in TEXTS]
    return [p for p in dict.fromkeys([*texts, spread]) if p and max(p) < vocab]


def answers(model: Model, tie: float) -> tuple[Case, ...]:
    """Lets the artifact answer every prompt, greedily and past any end token.

    Args:
        model: the artifact, loaded.
        tie: as for `check`; logits of another machine may be so far off too.
    """
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    completions = [model.generate(prompt, params) for prompt in prompts(model)]
    return tuple(
        Case(
            prompt=c.prompt_token_ids, tokens=c.token_ids, first=_first_logits(model, c.prompt_token_ids, tie)
        )
        for c in completions
    )


def _first_logits(model: Model, prompt: Sequence[int], tie: float) -> FirstLogits:
    logits = first_logits(model, prompt)
    ids = np.argsort(-logits, kind="stable")[:LOGITS]
    # Six digits are more than any two machines agree on, and keep the file small.
    return FirstLogits(
        token_ids=tuple(int(i) for i in ids),
        values=tuple(_six_digits(logits[i]) for i in ids),
        tolerance=_six_digits(tie * np.std(logits)),
    )


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def check(
    cases: Sequence[Case],
    model: StoredModel,
    cached: str,
    tie: float,
    weights: Mapping[str, np.ndarray],
    where: str,
) -> tuple[Case, ...]:
    """Holds every token against the reference: the uncached forward pass with the weights as they are stored.

    Args:
        cached: type of the cache, to which the reference rounds keys and values too.
        tie: leads of the likeliest token below this share of the logits' spread decide nothing.

    Returns:
        The answers, each cut where the reference itself cannot tell two candidates apart.

    Raises:
        PrecastError: when the artifact says anything else than the reference: it must not be shipped.
    """
    logits = answer_logits(
        model, cached, weights, [c.prompt + c.tokens for c in cases], [len(c.prompt) - 1 for c in cases]
    )
    agreed = tuple(
        _agreed(case, *_judged(rows), tie, where) for case, rows in zip(cases, logits, strict=True)
    )
    if not any(case.tokens for case in agreed):
        raise PrecastError(
            f"{where}: the reference finds no token likelier than another, so nothing can be checked; are the weights"
            " those of a trained model?"
        )
    return agreed


def _agreed(case: Case, best: np.ndarray, margins: np.ndarray, tie: float, where: str) -> Case:
    if not np.isfinite(margins).all():
        raise PrecastError(
            f"{where}: the reference's logits are not finite (prompt of {len(case.prompt)} tokens); the weights do not"
            " compute in float32: nothing was written."
        )
    for i, token in enumerate(case.tokens):
        if margins[i] < tie:
            return dataclasses.replace(case, tokens=case.tokens[:i])
        if best[i] != token:
            raise PrecastError(
                f"{where}: the compiled programs answer {token} where the reference answers {best[i]} (prompt"
                f" of {len(case.prompt)} tokens, answer token {i}); nothing was written: please report this."
            )
    return case


def _judged(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best token of each row ``[R, V]``, and its lead in shares of the row's spread (standard deviation)."""
    with np.errstate(invalid="ignore", over="ignore"):
        second, first = np.partition(logits, -2, axis=1)[:, -2:].T
        spread = np.maximum(logits.std(axis=1), np.finfo(logits.dtype).tiny)
        return logits.argmax(axis=1), (first - second) / spread


def to_json(cases: Sequence[Case]) -> bytes:
    golden = Golden(
        greedy=tuple(
            Answer(prompt_token_ids=c.prompt, token_ids=c.tokens, first_logits=c.first) for c in cases
        )
    )
    return (json.dumps(dataclasses.asdict(golden), separators=(",", ":"), allow_nan=False) + "\n").encode()
