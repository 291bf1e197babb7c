"""Choose the next token from the logits with NumPy. The choice is reproducible for a given seed.

The steps run in the same order as in transformers, so that the same settings have the same effect:

1. logit_bias
2. repetition_penalty
3. frequency_penalty and presence_penalty
4. forbidden tokens, and the constraint of the answer
5. temperature
6. top_k, top_p, min_p
"""

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..artifact.errors import PrecastError
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .constraints import Constraint
    from .forbidden import ForbiddenTokens
    from .logprobs import TextOf, TokenLogprob
    from .penalties import Penalties


# Weights per block in `_draw`.
_BLOCK = 512
# Scores per group. Top-k first compares the maxima of the groups.
_TOPS_OF = 64


class Sampler:
    """A sampler for one sequence. It is not thread-safe.

    The sampler records the answer's tokens, because penalties and forbidden tokens depend on them.

    Args:
        params: the sampling parameters.
        prompt_ids: tokens of the prompt; ids of `vocab_size` and above are ignored, as in transformers, because the
            model never predicts them.
        vocab_size: V, the length of the logits.
        end_ids: the model's end-of-generation tokens, for min_tokens and min_length.
        text_of: a function from a token to its text, for log-probabilities.
        constraint: the answer's own constraint; None for an unconstrained answer.

    Attributes:
        logprobs: the log-probabilities of the chosen tokens, if the parameters ask for them.

    Raises:
        PrecastError: logit_bias names a token outside the vocabulary, or a token of the prompt is negative.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int],
        vocab_size: int,
        end_ids: Iterable[int] = (),
        text_of: "TextOf" = str,
        constraint: "Constraint | None" = None,
    ) -> None:
        self.logprobs: list[TokenLogprob] = []
        self._params = params
        self._vocab_size = vocab_size
        self._text_of = text_of
        self._constraint = constraint
        prompt = [_token(token) for token in prompt_ids]
        self._forbidden = _forbidden(params, prompt, params.ends(end_ids))
        self._penalties = _penalties(params, prompt, vocab_size)

    @cached_property
    def _rng(self) -> "np.random.Generator":
        # A lazy attribute, because importing `numpy.random` takes 6 ms.
        return np.random.Generator(np.random.PCG64(self._params.seed))

    @property
    def is_greedy(self) -> bool:
        """True if sampling is a plain argmax, so that the program's greedy token can replace a call of `sample`."""
        return (
            self._params.temperature == 0
            and self._params.logprobs is None
            and self._forbidden is None
            and self._penalties is None
            and self._constraint is None
        )

    def observe(self, token_id: int) -> None:
        """Record a token of the answer. `sample` itself calls this method for the token that it chooses."""
        token_id = _token(token_id)
        if self._penalties is not None:
            self._penalties.observe(token_id)
        if self._forbidden is not None:
            self._forbidden.observe(token_id)
        if self._constraint is not None:
            self._constraint.accept(token_id)

    def sample(self, logits: np.ndarray) -> int:
        """Choose the next token, and record it.

        With temperature 0, choose the token with the largest adjusted logit, and the lowest id among equal ones.

        Args:
            logits: float32 [V].

        Raises:
            DeadEnd: the constraint allows no token.
            PrecastError: the shape is not [V], the logits contain NaN or +inf, no token is left to choose, or the
                constraint cannot be followed further.
        """
        logits = _checked(logits, self._vocab_size)
        scores = self._adjusted(logits)
        if self._params.temperature == 0:
            token_id = int(np.argmax(scores))
        else:
            ids, weights = kept_weights(scores, self._params)
            index = _draw(weights, self._rng.random())
            token_id = index if ids is None else int(ids[index])
        if self._params.logprobs is not None:
            # A lazy import, because few requests ask for log-probabilities.
            from .logprobs import token_logprob

            self.logprobs.append(token_logprob(logits, token_id, self._params.logprobs, self._text_of))
        self.observe(token_id)
        return token_id

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits after bias, penalties, forbidden tokens and constraint; the argument is unchanged."""
        forbidden = self._forbidden_ids()
        scores = logits
        if self._penalties is not None or forbidden:
            scores = logits.copy()
            if self._penalties is not None:
                self._penalties.apply(scores)
            scores[forbidden] = -np.inf
        if self._constraint is not None:
            scores = self._within(self._constraint.mask(), scores)
        if scores is not logits and np.isneginf(scores.max()):
            constraint = "" if self._constraint is None else " within the constraint"
            raise PrecastError(
                "Sampling: suppress_tokens, bad_words_ids, no_repeat_ngram_size and min_tokens leave no token to"
                f" choose{constraint}; relax one of them."
            )
        return scores

    def _within(self, mask: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return the scores [V], with -inf for tokens outside the mask (uint32 [ceil(V / 32)]).

        Greedy decoding returns the scores unchanged if the mask allows their argmax.
        """
        if self._params.temperature == 0:
            likeliest = int(np.argmax(scores))
            if int(mask[likeliest // 32]) >> likeliest % 32 & 1:
                return scores  # the usual case: the mask does not change the argmax
        bits = np.unpackbits(mask.view(np.uint8), count=scores.size, bitorder="little")
        return np.where(bits.view(np.bool_), scores, np.float32(-np.inf))

    def _forbidden_ids(self) -> list[int]:
        # Once the constrained answer is complete, only an end token may follow, so min_tokens must not forbid it.
        if self._forbidden is None or (self._constraint is not None and self._constraint.is_complete):
            return []
        return [token for token in self._forbidden.tokens() if token < self._vocab_size]


def _penalties(params: SamplingParams, prompt: list[int], vocab_size: int) -> "Penalties | None":
    if not params.is_penalised:
        return None
    # A lazy import, because few requests have penalties.
    from .penalties import Penalties

    return Penalties(params, prompt, vocab_size)


def _forbidden(params: SamplingParams, prompt: list[int], end_ids: Iterable[int]) -> "ForbiddenTokens | None":
    if not params.forbids_tokens:
        return None
    # A lazy import, because few requests forbid any tokens.
    from .forbidden import ForbiddenTokens

    return ForbiddenTokens(params, prompt, end_ids)


def _token(token_id: int) -> int:
    if token_id < 0:
        raise PrecastError(f"Sampling: token ids must not be negative, found {token_id}.")
    return int(token_id)


def _checked(logits: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the logits as float32 [V] after checking that a token can be chosen from them."""
    scores = np.asarray(logits, dtype=np.float32)
    if scores.shape != (vocab_size,):
        raise PrecastError(f"Sampling: expected logits of shape ({vocab_size},), found {scores.shape}.")
    top = scores.max()  # NaN if any logit is NaN
    if np.isfinite(top):
        return scores
    if np.isneginf(top):
        raise PrecastError("Sampling: every logit is -inf, so there is no token to choose.")
    bad = int(np.argmax(~(scores < np.inf)))
    raise PrecastError(
        f"Sampling: the logit of token {bad} is {scores[bad]}, so the model's output cannot be used; run precast"
        " verify to find out whether this artifact computes correctly on this machine."
    )


def kept_weights(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        scores: penalised logits, float32 [V]; at least one is finite, none is NaN or +inf.
        params: the parameters, with a temperature above 0.

    Returns:
        The ids [n] of the candidates in ascending order (None: all of them, n = V), and their float32 weights [n],
        proportional to the probabilities. The largest weight is 1; tokens dropped by min_p have weight 0.
    """
    # Top-k does not depend on the temperature. Applying top-k first leaves fewer weights to compute.
    ids = _top_k(scores, params.top_k)
    weights = scores if ids is None else scores[ids]
    with np.errstate(over="ignore", under="ignore"):  # an overflow is harmless: exp(-inf) is 0
        weights = weights - weights.max()
        weights /= np.float32(params.temperature)
        np.exp(weights, out=weights)
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if params.min_p > 0:
        weights *= weights >= params.min_p
    return ids, weights


def _top_k(scores: np.ndarray, k: int) -> np.ndarray | None:
    """Return the ids of the k largest scores and of ties with the k-th, ascending; None if all ids are kept."""
    if k == 0 or k >= scores.size:
        return None
    candidates = np.flatnonzero(scores >= _lower_bound(scores, k))
    found = scores[candidates]
    place = found.size - k
    kept: np.ndarray = candidates[found >= np.partition(found, place)[place]]
    return kept


def _lower_bound(scores: np.ndarray, k: int) -> float:
    """Return a lower bound on the k largest scores. Usually, few other scores reach this bound."""
    tops = scores[: scores.size // _TOPS_OF * _TOPS_OF].reshape(_TOPS_OF, -1).max(0)
    if tops.size < k:
        return float(scores.min())
    place = tops.size - k
    return float(np.partition(tops, place)[place])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return the indices [n] of the weights that top-p keeps, in ascending order.

    Weights are ranked in descending order, and equal weights by ascending index. A weight is kept if the share of the
    weights ranked above it is below `top_p`. The upper bits of non-negative float32 values have the same order as the
    values. A histogram of these bits therefore finds the bin that contains the boundary, and only that bin is sorted.
    """
    total = weights.sum(dtype=np.float64)
    wanted = top_p * total
    # The total share of all weights below this bound is below 1 - top_p.
    candidates = np.flatnonzero(weights >= (total - wanted) / weights.size)
    weights = weights[candidates]
    bins = weights.view(np.uint32) >> np.uint32(16)
    bins -= bins.min()
    reached = np.cumsum(np.bincount(bins, weights=weights)[::-1])  # from the highest bin down, float64
    whole_bins = min(int(np.searchsorted(reached, wanted)), reached.size - 1)
    boundary = reached.size - 1 - whole_bins
    members = np.flatnonzero(bins == boundary)
    order = members[np.argsort(-weights[members], kind="stable")]
    mass = weights[order].astype(np.float64)
    above = np.cumsum(mass) - mass + (reached[whole_bins - 1] if whole_bins else 0.0)
    keep = bins > boundary
    keep[order[above < wanted]] = True
    keep[np.argmax(weights)] = True  # keep at least one token, even for top_p = 0
    return candidates[keep]


def _draw(weights: np.ndarray, uniform: float) -> int:
    """Draw an index from `uniform`, a number in [0, 1), by inverting the cumulative distribution in float64.

    A search over the running sums of whole blocks finds the block. A search within the block finds the index.
    """
    starts = np.arange(0, weights.size, _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = uniform * blocks[-1]
    block = _first_above(blocks, target)
    start = int(starts[block])
    inside = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    return start + _first_above(inside, target - (blocks[block - 1] if block else 0.0))


def _first_above(cumulative: np.ndarray, target: float) -> int:
    """Return the first index whose running sum exceeds the target.

    If rounding leaves no such index, return the last index with a weight above 0.
    """
    found = np.searchsorted(cumulative, target, side="right")
    return int(min(found, np.searchsorted(cumulative, cumulative[-1], side="left")))
