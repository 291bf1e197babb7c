"""Golden answers: what the artifact says, held against the uncached reference before it is shipped."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generate import Model
from precast.loaders.sampling import SamplingParams

from .programs import TABLES, StoredModel

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
# With int4 weights a prompt's activations are rounded to 8 bits: measured, leads change by 0.06 of the spread
# (standard deviation, prompts of 5 to 65 tokens of the demo model).
INT4_TIE = 0.25


@dataclass(frozen=True, kw_only=True)
class Case:
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def prompts(model: Model) -> list[tuple[int, ...]]:
    """Texts, and a prompt that is one token longer than the smallest bucket where the cache holds it."""
    vocab, capacity = model.engine.vocab, model.engine.capacity
    room = max(1, capacity - TOKENS)
    spread = tuple(i * 7919 % vocab for i in range(1, min(model.manifest.buckets[0] + 2, room + 1)))
    texts = [tuple(model.tokenizer.encode(text)[:room]) for text in TEXTS]
    return [p for p in dict.fromkeys([*texts, spread]) if p and max(p) < vocab]


def answers(model: Model) -> tuple[Case, ...]:
    """Lets the artifact answer every prompt, greedily and past any end token."""
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    completions = [model.generate(prompt, params) for prompt in prompts(model)]
    return tuple(Case(prompt=c.prompt_token_ids, tokens=c.token_ids) for c in completions)


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
    judged = _reference(model, cached, weights, [c.prompt + c.tokens for c in cases])
    agreed = tuple(_agreed(case, *verdict, tie, where) for case, verdict in zip(cases, judged, strict=True))
    if not any(case.tokens for case in agreed):
        raise PrecastError(
            f"{where}: the reference finds no token likelier than another, so nothing can be checked; are the weights"
            " those of a trained model?"
        )
    return agreed


def _agreed(case: Case, best: np.ndarray, margins: np.ndarray, tie: float, where: str) -> Case:
    first = len(case.prompt) - 1
    if not np.isfinite(margins[first : first + len(case.tokens)]).all():
        raise PrecastError(
            f"{where}: the reference's logits are not finite (prompt of {len(case.prompt)} tokens); the weights do not"
            " compute in float32: nothing was written."
        )
    for i, token in enumerate(case.tokens):
        if margins[first + i] < tie:
            return Case(prompt=case.prompt, tokens=case.tokens[:i])
        if best[first + i] != token:
            raise PrecastError(
                f"{where}: the compiled programs answer {token} where the reference answers {best[first + i]} (prompt"
                f" of {len(case.prompt)} tokens, answer token {i}); nothing was written: please report this."
            )
    return case


def _reference(
    model: StoredModel, cached: str, weights: Mapping[str, np.ndarray], sequences: Sequence[tuple[int, ...]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The uncached forward pass: each sequence's best next tokens, and their leads in shares of the logits' spread."""
    length = max(map(len, sequences))

    def forward(tokens: Array, cos: Array, sin: Array, *arrays: Array) -> tuple[Array, Array]:
        logits = model.bind(arrays).forward(tokens[None], cos, sin, cached)[0]  # [T, V]
        # Not top_k: on CPU it sorts the whole vocabulary, in three times the memory.
        best = jnp.argmax(logits, axis=-1)
        others = jnp.where(jnp.arange(logits.shape[1]) == best[:, None], -jnp.inf, logits)
        lead = jnp.max(logits, axis=-1) - jnp.max(others, axis=-1)
        return best, lead / jnp.maximum(jnp.std(logits, axis=-1), jnp.finfo(logits.dtype).tiny)

    # One length for all, so that it compiles once.
    constants = [_on_device(weights[n]) for n in (*TABLES, *(name for name, _ in model.arrays()))]
    run = jax.jit(forward)
    padded = [np.array([*s, *[0] * (length - len(s))], np.int32) for s in sequences]
    results = [run(tokens, *constants) for tokens in padded]
    return [(np.asarray(best), np.asarray(margins)) for best, margins in results]


def _on_device(array: np.ndarray) -> Array:
    """Mapped weights as they lie; of bfloat16, which NumPy cannot hand over, a copy."""
    return jnp.from_dlpack(array) if array.dtype.isbuiltin == 1 else jnp.asarray(array)


def to_json(cases: Sequence[Case]) -> bytes:
    records = [{"prompt_token_ids": c.prompt, "token_ids": c.tokens} for c in cases]
    return (json.dumps({"greedy": records}, separators=(",", ":")) + "\n").encode()
