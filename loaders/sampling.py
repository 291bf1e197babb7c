"""How the next token is chosen from the logits: NumPy only, the same tokens for the same seed.

The filters and their order are those of transformers (repetition penalty, temperature, top-k, top-p, min-p),
so that settings found there mean the same here.
"""

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np

from .artifact.errors import PrecastError
from .artifact.frozen import Frozen

# Of integers that may have more bits than a manifest's whole numbers.
_BITS = {"seed": 128}


class SamplingParams(Frozen):
    """How to generate. The defaults are greedy and end at an end-of-sequence token or when the cache is full.

    Raises:
        PrecastError: a value is of the wrong type or out of range.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None: until the cache is full."""
    temperature: float = 0.0
    """Divides the logits; 0 is greedy, and then top_k, top_p and min_p have no effect."""
    top_k: int = 0
    """Keep the k most likely tokens, and those tied with the last of them; 0 is off."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens that together reach this probability; 1 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one; 0 is off."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the answer less likely (CTRL, arXiv:1909.05858); 1 is off."""
    seed: int | None = None
    """Seed of the draws; None draws fresh entropy."""
    stop: tuple[str, ...] = ()
    """Strings that end generation; they are not part of the answer."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "seed"):
            if getattr(self, name) is not None:
                self.__dict__[name] = _integer(
                    name, getattr(self, name), low=1 if name == "max_tokens" else 0
                )
        self.__dict__["top_k"] = _integer("top_k", self.top_k, low=0)
        _check_real("temperature", self.temperature, low=0.0, high=math.inf)
        _check_real("top_p", self.top_p, low=0.0, high=1.0)
        _check_real("min_p", self.min_p, low=0.0, high=1.0)
        _check_real("repetition_penalty", self.repetition_penalty, low=0.0, high=math.inf)
        if self.repetition_penalty == 0:
            raise PrecastError("Sampling parameters: repetition_penalty must be greater than 0, found 0.")
        if not isinstance(self.ignore_eos, bool):
            raise PrecastError(
                f"Sampling parameters: ignore_eos must be true or false, found {self.ignore_eos!r}."
            )
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            self.__dict__[name] = float(getattr(self, name))
        self.__dict__["stop"] = _checked_stop(self.stop)


def _integer(name: str, value: Any, *, low: int) -> int:
    bits = _BITS.get(name, 63)
    known = isinstance(value, Integral) and not isinstance(value, bool)
    if not known or not low <= int(value) < 1 << bits:
        raise PrecastError(
            f"Sampling parameters: {name} must be an integer from {low} to 2^{bits} - 1, found {value!r:.60}."
        )
    return int(value)


def _check_real(name: str, value: Any, *, low: float, high: float) -> None:
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if known and math.isfinite(value) and low <= value <= high:
        return
    wanted = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
    raise PrecastError(f"Sampling parameters: {name} must be a finite number {wanted}, found {value!r}.")


def _checked_stop(stop: Any) -> tuple[str, ...]:
    if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
        raise PrecastError(f"Sampling parameters: stop must be a list of non-empty strings, found {stop!r}.")
    return tuple(stop)


_BLOCK = 512  # weights summed together when drawing
_SMALLEST = float(np.finfo(np.float32).tiny)


class Sampler:
    """Chooses tokens for one sequence. It remembers what was seen, for the repetition penalty.

    Args:
        params: how to choose.
        prompt_ids: tokens of the prompt; ids of `vocab_size` and above never come out of the model and are
            ignored, as in transformers.
        vocab_size: V, the length of the logits.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int], vocab_size: int) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._seen: set[int] = set()
        self._rng = np.random.Generator(np.random.PCG64(params.seed))
        for token_id in prompt_ids:
            self.observe(token_id)

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is plain argmax: the program's own will do, and logits need not be fetched."""
        return self._params.temperature == 0 and self._params.repetition_penalty == 1

    def observe(self, token_id: int) -> None:
        """Record a token of the sequence that did not come from `sample`."""
        if token_id < 0:
            raise PrecastError(f"Sampling: token ids must not be negative, found {token_id}.")
        if token_id < self._vocab_size:
            self._seen.add(int(token_id))

    def sample(self, logits: np.ndarray) -> int:
        """Choose the next token from logits [V] (float32) and record it.

        Raises:
            PrecastError: the shape is not [V], or the logits hold NaN, +inf or nothing but -inf.
        """
        scores = self._penalised(_checked(logits, self._vocab_size))
        if self._params.temperature == 0:
            token_id = int(np.argmax(scores))  # the first, so the lowest id, of equals
        else:
            ids, weights = kept_weights(scores, self._params)
            index = _draw(weights, self._rng.random())
            token_id = index if ids is None else int(ids[index])
        self.observe(token_id)
        return token_id

    def _penalised(self, scores: np.ndarray) -> np.ndarray:
        penalty = np.float32(self._params.repetition_penalty)
        if penalty == 1 or not self._seen:
            return scores
        seen = np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))
        old = scores[seen]
        scores = scores.copy()
        with np.errstate(over="ignore"):  # an overflow to +inf is reported by the check below
            scores[seen] = np.where(old < 0, old * penalty, old / penalty)
        return _checked(scores, self._vocab_size)


def _checked(logits: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the logits as float32 [V] if a token can be chosen from them."""
    scores = np.asarray(logits, dtype=np.float32)
    if scores.shape != (vocab_size,):
        raise PrecastError(f"Sampling: expected logits of shape ({vocab_size},), found {scores.shape}.")
    top = scores.max()  # NaN if any is
    if np.isfinite(top):
        return scores
    if np.isneginf(top):
        raise PrecastError("Sampling: every logit is -inf, so there is no token to choose.")
    bad = int(np.argmax(~(scores < np.inf)))
    raise PrecastError(
        f"Sampling: the logit of token {bad} is {scores[bad]}, so the model's output cannot be used;"
        " verify the artifact, its weights or programs compute something broken on this machine."
    )


def kept_weights(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        scores: float32 [V], at least one finite, none NaN or +inf; the penalty is applied already.
        params: temperature above 0.

    Returns:
        ids [n], ascending, of the candidates (None: all of them, n = V), and float32 weights [n] proportional
        to their probabilities: the largest is 1, those of dropped tokens are 0.
    """
    # Top-k goes before the temperature here because it does not depend on it, and leaves less to compute.
    ids = _top_k(scores, params.top_k)
    weights = scores if ids is None else scores[ids]
    with np.errstate(over="ignore", under="ignore"):  # -inf and then 0 are the right limits
        weights = weights - weights.max()
        # A temperature too small for float32 is the limit of greedy; dividing by 0 would make 0/0.
        weights /= np.float32(max(params.temperature, _SMALLEST))
        np.exp(weights, out=weights)
    if params.top_p < 1:
        weights *= _nucleus(weights, params.top_p)
    if params.min_p > 0:
        weights *= weights >= params.min_p
    return ids, weights


def _top_k(scores: np.ndarray, k: int) -> np.ndarray | None:
    """Ids of the k largest scores and of all equal to the k-th, ascending; None for all ids."""
    if k == 0 or k >= scores.size:
        return None
    place = scores.size - k
    return np.flatnonzero(scores >= np.partition(scores, place)[place])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Which tokens have less than `top_p` of the probability in the tokens ranked above them, as a mask [n].

    Ranked by weight, then lowest id first. Nothing is sorted but the few tokens around the edge: the upper
    bits of a non-negative float32 order like the float, so a histogram over them finds where the edge lies.
    """
    buckets = weights.view(np.uint32) >> np.uint32(16)
    reached = np.cumsum(np.bincount(buckets, weights=weights)[::-1])  # from the heaviest bucket down, float64
    wanted = top_p * reached[-1]
    place = int(np.searchsorted(reached, wanted))  # so many buckets fit whole
    edge = reached.size - 1 - place
    members = np.flatnonzero(buckets == edge)
    order = members[np.argsort(-weights[members], kind="stable")]
    mass = weights[order].astype(np.float64)
    above = np.cumsum(mass) - mass + (reached[place - 1] if place else 0.0)
    keep = buckets > edge
    keep[order[above < wanted]] = True
    keep[np.argmax(weights)] = True  # at least one, also for top_p = 0
    return keep


def _draw(weights: np.ndarray, uniform: float) -> int:
    """Index drawn by inverting the cumulative distribution, in float64, at `uniform` in [0, 1).

    Blocks are summed first, so that only one block needs running sums.
    """
    starts = np.arange(0, weights.size, _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = uniform * blocks[-1]
    block = _first_above(blocks, target)
    start = int(starts[block])
    inside = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    return start + _first_above(inside, target - (blocks[block - 1] if block else 0.0))


def _first_above(cumulative: np.ndarray, target: float) -> int:
    """First index whose running sum exceeds the target; never one of weight 0, even if rounded up."""
    found = np.searchsorted(cumulative, target, side="right")
    return int(min(found, np.searchsorted(cumulative, cumulative[-1], side="left")))
