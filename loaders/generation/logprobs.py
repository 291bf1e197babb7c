"""Log-probabilities of tokens.

A log-probability is the natural logarithm of the softmax of the model's logits, before logit_bias, penalties, forbidden
tokens, constraints and temperature are applied. By default, vLLM (`logprobs_mode="raw_logprobs"`) and llama.cpp
(`post_sampling_probs=false`) return the same values.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

TextOf = Callable[[int], str]


class TokenLogprob(NamedTuple):
    """A token and its log-probability.

    Attributes:
        token_id: the token.
        text: the token's text, with U+FFFD in place of an incomplete character.
        logprob: the natural logarithm of the token's probability; -inf for a token of probability 0.
        top: the most likely tokens at the same position, in descending order of probability. Tokens with equal
            probabilities are in ascending order of id.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


class PromptLogprobs:
    """The log-probabilities of a prompt's tokens, collected while the prompt is read.

    Args:
        prompt: tokens of the prompt.
        top: number of most likely tokens to record at each position; 0 for none.
        text_of: a function from a token to its text.
    """

    def __init__(self, prompt: Sequence[int], top: int, text_of: TextOf) -> None:
        self._prompt, self._top, self._text_of = prompt, top, text_of
        self._found: list[TokenLogprob | None] = [None]

    def add(self, logits: np.ndarray) -> None:
        """Record the log-probabilities of the prompt's next R tokens.

        Args:
            logits: float32 [R, V]. Each row predicts one of these tokens. The row after the prompt's last token is
                ignored.
        """
        for row in logits[: len(self._prompt) - len(self._found)]:
            token = self._prompt[len(self._found)]
            self._found.append(token_logprob(row, token, self._top, self._text_of))

    def result(self) -> tuple[TokenLogprob | None, ...]:
        """Return the records of the tokens read so far; None for the first token, which the model does not predict."""
        return tuple(self._found)


def token_logprob(logits: np.ndarray, token_id: int, top: int, text_of: TextOf) -> TokenLogprob:
    """Return the log-probabilities of a token and of the most likely tokens.

    Args:
        logits: float32 [V]; at least one is finite, none is NaN or +inf.
        token_id: the token, below V.
        top: number of most likely tokens to include; 0 for none.
        text_of: a function from a token to its text.
    """
    largest = logits.max()
    with np.errstate(over="ignore", under="ignore"):  # an overflow is harmless: exp(-inf) is 0
        # Sum in float64, because in float32 the sum of 150,000 terms loses the last digits.
        total = float(np.exp(logits - largest).sum(dtype=np.float64))
    base = float(largest) + float(np.log(total))

    def record(token: int, tops: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        # Rounding may raise the log-probability of the most likely token above 0.
        return TokenLogprob(token, text_of(token), min(float(logits[token]) - base, 0.0), tops)

    return record(token_id, tuple(record(int(token)) for token in _largest_ids(logits, top)))


def _largest_ids(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the `count` largest logits in descending order; ids of equal logits ascend."""
    count = min(count, logits.size)
    if count == 0:
        return np.empty(0, np.int64)
    place = logits.size - count
    ids = np.flatnonzero(logits >= np.partition(logits, place)[place])
    return ids[np.argsort(-logits[ids], kind="stable")][:count]
