"""Golden answers: greedy answers of a new artifact, checked against the uncached reference."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.golden import Answer, FirstLogits, Golden
from precast.loaders.artifact.manifest import Manifest
from precast.loaders.audit.verify import first_logits
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams

from ..mixed import TABLE
from ..programs import StoredModel
from .stored import answer_logits

# The last two texts have one obvious continuation, so that at least some answers contain no tie (see `TIE`).
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "水は",
    "a b c d a b c d a b c d a b c d a b",
    "one, two, three, four, one, two, three, four, one, two, three, four, one,",
)
TOKENS = 16
# The lead of a token is the distance from its logit to the next lower logit, divided by the logits' spread (standard
# deviation). If the lead of the likeliest token is below the threshold, it counts as tied with the second likeliest,
# because rounding may swap the two.
#
# In float32, the logits of programs that sum in different orders differ by about 1e-5 of the spread.
TIE = 1e-3
# The threshold for activations rounded to 16 bits, and for a KV cache with fewer than 32 bits. The reference has the
# same weights and rounds in the same way, but if a value is close to a rounding boundary, the reference may round it up
# and a program may round it down.
REDUCED_TIE = 0.05
# The threshold for bfloat16 arithmetic, which changed leads among the eight likeliest tokens by up to 0.06, measured on
# 12 steps of the demo model.
BFLOAT16_TIE = 0.15
# The threshold for weights of fewer than 8 bits, because activations are then rounded to 8 bits. The rounding changed
# leads by 0.06, measured on prompts of 5 to 65 tokens of the demo model.
INT4_TIE = 0.25
# The number of largest logits that are recorded for the first step of an answer.
LOGITS = 8


def is_exact(manifest: Manifest) -> bool:
    """Return True if weights, KV cache and arithmetic are all float32, so that the reference is the model itself."""
    is_stored = manifest.model.weights == "float32" and manifest.cache[0].dtype == "float32"
    return is_stored and not _computes_bfloat16(manifest)


def tie_of(manifest: Manifest) -> float:
    """Return the smallest lead (see `TIE`) at which an artifact's likeliest token no longer counts as tied."""
    if is_exact(manifest):
        return TIE
    reduced = INT4_TIE if manifest.model.weights == "int4" or _has_mixed_weights(manifest) else REDUCED_TIE
    return max(reduced, BFLOAT16_TIE) if _computes_bfloat16(manifest) else reduced


def _has_mixed_weights(manifest: Manifest) -> bool:
    """Return True if a program reads mixed weights, most of which have fewer than 8 bits."""
    programs = (program for target in manifest.targets for program in target.programs)
    return any(value.name.endswith(TABLE) for program in programs for value in program.arguments)


def _computes_bfloat16(manifest: Manifest) -> bool:
    """Return True if at least one target computes in bfloat16; all targets share the golden answers."""
    return any(target.platform == "cuda" for target in manifest.targets)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A golden answer before it is written.

    Attributes:
        prompt: token ids.
        tokens: token ids of the answer.
        first: the largest logits of the answer's first step, with their tolerance.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    first: FirstLogits


def prompts(model: Model) -> list[tuple[int, ...]]:
    """Return the prompts of the golden answers as token ids.

    The prompts are `TEXTS`. If the context is long enough, there is also a prompt that is one token longer than the
    smallest bucket. Each prompt leaves room for an answer.
    """
    vocab, context = model.engine.vocab, model.engine.context
    room = max(1, context - TOKENS)
    spread = tuple(i * 7919 % vocab for i in range(1, min(model.manifest.buckets[0] + 2, room + 1)))
    texts = [tuple(model.tokenizer.encode(text)[:room]) for text in TEXTS]
    return [p for p in dict.fromkeys([*texts, spread]) if p and max(p) < vocab]


def answers(model: Model, tie: float) -> tuple[Case, ...]:
    """Answer every prompt greedily, ignoring end tokens.

    Args:
        model: the artifact, loaded.
        tie: the result of `tie_of`. The tolerance of the recorded logits is `tie` times the spread of all logits.
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
    return FirstLogits(
        token_ids=tuple(int(i) for i in ids),
        values=tuple(_six_digits(logits[i]) for i in ids),
        tolerance=_six_digits(tie * np.std(logits)),
    )


def _six_digits(value: float) -> float:
    # Different machines agree on fewer than six digits, so more digits would only enlarge the file.
    return float(f"{value:.6g}")


def check(
    cases: Sequence[Case],
    model: StoredModel,
    kv_cache: str,
    tie: float,
    weights: Mapping[str, np.ndarray],
    where: str,
) -> tuple[Case, ...]:
    """Check every token against the reference: the uncached forward pass with the weights as stored.

    Args:
        cases: answers of the artifact.
        model: the model.
        kv_cache: type of the KV cache; the reference rounds its keys and values to this type too.
        tie: the result of `tie_of`.
        weights: the artifact's arrays by name.
        where: name of the artifact in messages.

    Returns:
        The answers, each cut before the first tie of the reference.

    Raises:
        PrecastError: an answer differs from the reference's, or no answer can be checked. The artifact must not ship.
    """
    logits = answer_logits(
        model, kv_cache, weights, [c.prompt + c.tokens for c in cases], [len(c.prompt) - 1 for c in cases]
    )
    checked = tuple(
        _check_case(case, *_best_and_leads(rows), tie, where)
        for case, rows in zip(cases, logits, strict=True)
    )
    if not any(case.tokens for case in checked):
        raise PrecastError(
            f"{where}: at the start of every answer, the reference's two likeliest tokens are tied, so no answer can be"
            " checked; export the weights of a trained model."
        )
    return checked


def _check_case(case: Case, best: np.ndarray, leads: np.ndarray, tie: float, where: str) -> Case:
    """Compare an answer with the reference's `best` tokens; return the answer up to the first tie in `leads`."""
    if not np.isfinite(leads).all():
        raise PrecastError(
            f"{where}: the reference's logits for a prompt of {len(case.prompt)} tokens are not finite, so"
            " the model cannot be computed in float32; nothing was written."
        )
    for i, token in enumerate(case.tokens):
        if leads[i] < tie:
            return dataclasses.replace(case, tokens=case.tokens[:i])
        if best[i] != token:
            raise PrecastError(
                f"{where}: the compiled programs answer with token {token} where the reference answers with token"
                f" {best[i]} (index {i} in the answer to a prompt of {len(case.prompt)} tokens); nothing was written:"
                " please report this."
            )
    return case


def _best_and_leads(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeliest token of each row of logits ``[R, V]``, and its lead (see `TIE`)."""
    with np.errstate(invalid="ignore", over="ignore"):
        second, first = np.partition(logits, -2, axis=1)[:, -2:].T
        spread = np.maximum(logits.std(axis=1), np.finfo(logits.dtype).tiny)
        return logits.argmax(axis=1), (first - second) / spread


def to_json(cases: Sequence[Case]) -> bytes:
    """Return the golden answers as the content of the artifact's JSON file."""
    golden = Golden(
        greedy=tuple(
            Answer(prompt_token_ids=c.prompt, token_ids=c.tokens, first_logits=c.first) for c in cases
        )
    )
    return (json.dumps(dataclasses.asdict(golden), separators=(",", ":"), allow_nan=False) + "\n").encode()
