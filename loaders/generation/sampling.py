"""Choose the next token from the logits, with NumPy only, and the same tokens for the same seed.

The filters and their order are those of transformers (repetition penalty, forbidden tokens, temperature, top-k,
top-p, min-p), so settings mean the same in both.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..artifact.errors import PrecastError
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .forbidden import Forbidden


_LARGEST = float(np.finfo(np.float32).max)
_BLOCK = 512  # weights summed together when drawing


class Sampler:
    """A sampler of tokens for one sequence, which it records for the penalty and for forbidden tokens.

    Args:
        params: the sampling parameters.
        prompt_ids: tokens of the prompt; ids of `vocab_size` and above never come out of the model and are
            ignored, as in transformers.
        vocab_size: V, the length of the logits.
        end_ids: end-of-generation tokens, for min_tokens and min_length.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Iterable[int], vocab_size: int, end_ids: Iterable[int] = ()
    ) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._seen: set[int] = set()
        self._rng = np.random.Generator(np.random.PCG64(params.seed))
        prompt = [_token(token) for token in prompt_ids]
        self._forbidden = _forbidden(params, prompt, () if params.ignore_eos else end_ids)
        self._seen.update(token for token in prompt if token < vocab_size)

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is plain argmax: the program's own will do, and logits need not be fetched."""
        params = self._params
        return params.temperature == 0 and params.repetition_penalty == 1 and self._forbidden is None

    def observe(self, token_id: int) -> None:
        """Record a token of the answer that did not come from `sample`."""
        token_id = _token(token_id)
        if token_id < self._vocab_size:
            self._seen.add(token_id)
        if self._forbidden is not None:
            self._forbidden.observe(token_id)

    def sample(self, logits: np.ndarray) -> int:
        """Choose the next token from logits [V] (float32) and record it.

        Raises:
            PrecastError: the shape is not [V], the logits contain NaN or +inf or only -inf, or every token that they
                allow is forbidden.
        """
        scores = self._allowed(self._penalised(_checked(logits, self._vocab_size)))
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
        with np.errstate(over="ignore", under="ignore"):
            new = np.where(old < 0, old * penalty, old / penalty)
        # Keep finite logits finite: infinities do not compare, and would forbid tokens that are only penalised.
        scores[seen] = np.where(np.isneginf(old), old, np.clip(new, -_LARGEST, _LARGEST))
        return scores

    def _allowed(self, scores: np.ndarray) -> np.ndarray:
        if self._forbidden is None:
            return scores
        forbidden = [token for token in self._forbidden.tokens() if token < self._vocab_size]
        if not forbidden:
            return scores
        scores = scores.copy()
        scores[forbidden] = -np.inf
        if np.isneginf(scores.max()):
            raise PrecastError(
                "Sampling: suppress_tokens, bad_words_ids, no_repeat_ngram_size and min_tokens leave no token to"
                " choose; loosen them."
            )
        return scores


def _forbidden(params: SamplingParams, prompt: list[int], end_ids: Iterable[int]) -> "Forbidden | None":
    if not params.constrained:
        return None
    # Imported here to keep the start short: few models forbid any tokens.
    from .forbidden import Forbidden

    return Forbidden(params, prompt, end_ids)


def _token(token_id: int) -> int:
    if token_id < 0:
        raise PrecastError(f"Sampling: token ids must not be negative, found {token_id}.")
    return int(token_id)


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
        weights /= np.float32(params.temperature)
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
