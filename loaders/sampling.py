"""Choose the next token from the logits, with NumPy only, and the same tokens for the same seed.

The filters and their order are those of transformers (repetition penalty, forbidden tokens, temperature, top-k,
top-p, min-p), so settings mean the same in both.
"""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from .artifact.errors import PrecastError
from .artifact.frozen import Frozen

if TYPE_CHECKING:
    from .forbidden import Forbidden


class SamplingParams(Frozen):
    """How to generate. By default decoding is greedy and ends at an end-of-generation token or when the cache is full.

    Raises:
        PrecastError: a parameter is unknown, of the wrong type, out of range, or not given by its name.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None: until the cache is full."""
    max_length: int | None = None
    """Most tokens of prompt and answer together; it has no effect where max_tokens is given."""
    min_tokens: int = 0
    """Choose no end-of-generation token before the answer has this many tokens."""
    min_length: int = 0
    """As min_tokens, for prompt and answer together; it has no effect where min_tokens is given."""
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
    no_repeat_ngram_size: int = 0
    """Let no sequence of this many tokens occur twice in the prompt and the answer; 0 is off."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens never to choose."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens not to begin the answer with."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens never to complete. A single end-of-generation token is not forbidden."""
    seed: int | None = None
    """Seed of the draws; None draws fresh entropy."""
    stop: tuple[str, ...] = ()
    """Strings that end generation; they are not part of the answer."""
    ignore_eos: bool = False
    """Go on after an end-of-generation token."""

    if not TYPE_CHECKING:  # type checkers derive the constructor from the fields

        def __init__(self, *values: Any, **fields: Any) -> None:
            _check_names(values, fields)
            super().__init__(**fields)

    def __post_init__(self) -> None:
        checked = self.__dict__
        for name, low in _WHOLE.items():
            if checked[name] is not None or name not in _OPTIONAL:
                checked[name] = _integer(name, checked[name], low=low)
        for name, high in _REAL.items():
            checked[name] = _real(name, checked[name], high=high)
        if self.repetition_penalty == 0:
            raise PrecastError("Sampling parameters: repetition_penalty must be greater than 0, found 0.")
        if not isinstance(self.ignore_eos, bool):
            raise PrecastError(
                f"Sampling parameters: ignore_eos must be true or false, found {self.ignore_eos!r:.60}."
            )
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            checked[name] = _token_ids(name, checked[name])
        checked["bad_words_ids"] = _sequences("bad_words_ids", checked["bad_words_ids"])
        checked["stop"] = _checked_stop(self.stop)

    @property
    def constrained(self) -> bool:
        """Return True if any parameter may forbid tokens."""
        return bool(
            self.min_tokens
            or self.min_length
            or self.no_repeat_ngram_size
            or self.suppress_tokens
            or self.begin_suppress_tokens
            or self.bad_words_ids
        )

    def limit(self, prompt_tokens: int, room: int) -> int:
        """Return the maximum number of tokens to generate after a prompt.

        Args:
            prompt_tokens: length of the prompt.
            room: positions left in the cache.

        Raises:
            PrecastError: the prompt reaches max_length.
        """
        if self.max_tokens is not None:
            return min(self.max_tokens, room)
        if self.max_length is None:
            return room
        if prompt_tokens >= self.max_length:
            raise PrecastError(
                f"prompt: its {prompt_tokens} tokens reach max_length, {self.max_length}; raise it, or give"
                " max_tokens instead."
            )
        return min(self.max_length - prompt_tokens, room)


# Minimum of each whole number, and maximum of each real one. Integers go up to 2^63 - 1, as in a manifest, except the
# seed: a generator's state has 128 bits.
_WHOLE = {
    "max_tokens": 1,
    "max_length": 1,
    "min_tokens": 0,
    "min_length": 0,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "seed": 0,
}
_OPTIONAL = ("max_tokens", "max_length", "seed")
_REAL = {"temperature": math.inf, "top_p": 1.0, "min_p": 1.0, "repetition_penalty": math.inf}
_SMALLEST, _LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


def _check_names(values: tuple[object, ...], fields: Mapping[str, object]) -> None:
    known = SamplingParams.__dataclass_fields__
    if values:
        raise PrecastError(
            f"Sampling parameters: each must be given by its name (temperature=0.7), found {values[0]!r:.60}"
            " without one."
        )
    if unknown := sorted(fields.keys() - known.keys()):
        raise PrecastError(
            f"Sampling parameters: {unknown[0]!r} is not one of them, expected {', '.join(known)}."
        )


def _integer(name: str, value: Any, *, low: int) -> int:
    bits = 128 if name == "seed" else 63
    known = isinstance(value, Integral) and not isinstance(value, bool)
    if not known or not low <= int(value) < 1 << bits:
        raise PrecastError(
            f"Sampling parameters: {name} must be an integer from {low} to 2^{bits} - 1, found {value!r:.60}."
        )
    return int(value)


def _real(name: str, value: Any, *, high: float) -> float:
    """Return a number that float32, the type of the logits, holds without underflow to zero or overflow."""
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    value = value.item() if isinstance(value, np.generic) else value
    # Compare before converting: an int may exceed the range of a float.
    if known and (value == 0 or _SMALLEST <= value <= min(high, _LARGEST)):
        return float(value)
    wanted = "at least 0" if math.isinf(high) else f"between 0 and {high:g}"
    if known and 0 < value <= high and value < math.inf:
        wanted += f" that float32 holds, which is 0 or from {_SMALLEST:.2g} to {_LARGEST:.2g}"
    raise PrecastError(f"Sampling parameters: {name} must be a finite number {wanted}, found {value!r:.60}.")


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise PrecastError(f"Sampling parameters: {name} must be a list of token ids, found {value!r:.60}.")
    return tuple(_integer(f"a token id of {name}", token, low=0) for token in value)


def _sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (tuple, list)) or not all(
        isinstance(item, (tuple, list)) and item for item in value
    ):
        raise PrecastError(
            f"Sampling parameters: {name} must be a list of lists of token ids, none empty, found {value!r:.60}."
        )
    return tuple(_token_ids(name, item) for item in value)


def _checked_stop(stop: Any) -> tuple[str, ...]:
    if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
        raise PrecastError(
            f"Sampling parameters: stop must be a list of non-empty strings, found {stop!r:.60}."
        )
    return tuple(stop)


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
