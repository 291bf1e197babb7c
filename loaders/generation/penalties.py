"""Bias and penalties: changes to the logits of single tokens, by the formulas of OpenAI and transformers.

The order is the same as in transformers, vLLM and llama.cpp: `logit_bias`, `repetition_penalty`, then
`frequency_penalty` and `presence_penalty`. The bias is transformers' SequenceBiasLogitsProcessor for single tokens. The
repetition penalty is transformers' RepetitionPenaltyLogitsProcessor (CTRL, arXiv:1909.05858), and applies to tokens of
the prompt and the answer. The other two penalties are OpenAI's, and apply to tokens of the answer alone, as in vLLM::

    logit -= frequency_penalty * count
    logit -= presence_penalty * (count > 0)
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..artifact.errors import PrecastError

if TYPE_CHECKING:
    from .sampling_params import SamplingParams

_LARGEST = float(np.finfo(np.float32).max)


class Penalties:
    """Bias and penalties for one sequence. `apply` takes time linear in the number of distinct tokens.

    Args:
        params: the sampling parameters.
        prompt: tokens of the prompt; ids of `vocab_size` and above are ignored, as in transformers.
        vocab_size: V, the length of the logits.

    Raises:
        PrecastError: logit_bias names a token outside the vocabulary.
    """

    def __init__(self, params: "SamplingParams", prompt: Iterable[int], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        biases = dict(params.logit_bias)
        if outside := [token for token in biases if token >= vocab_size]:
            raise PrecastError(
                f"Sampling parameters: token ids of logit_bias must be from 0 to {vocab_size - 1}, found"
                f" {outside[0]}."
            )
        self._bias_ids = np.fromiter(biases.keys(), np.int64, len(biases))
        self._biases = np.fromiter(biases.values(), np.float32, len(biases))
        self._repetition = np.float32(params.repetition_penalty)
        self._frequency = np.float32(params.frequency_penalty)
        self._presence = np.float32(params.presence_penalty)
        self._seen = {token for token in prompt if token < vocab_size}
        self._counts: dict[int, int] = {}

    def observe(self, token: int) -> None:
        """Record a token of the answer."""
        if token < self._vocab_size:
            self._seen.add(token)
            self._counts[token] = self._counts.get(token, 0) + 1

    def apply(self, scores: np.ndarray) -> None:
        """Apply the bias and the penalties to logits, float32 [V], in place."""
        scores[self._bias_ids] += self._biases
        if self._repetition != 1:
            self._discourage_repetition(scores)
        if self._counts and (self._frequency or self._presence):
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            scores[ids] = scores[ids] - self._frequency * counts - self._presence

    def _discourage_repetition(self, scores: np.ndarray) -> None:
        seen = np.fromiter(self._seen, np.int64, len(self._seen))
        old = scores[seen]
        with np.errstate(over="ignore", under="ignore"):
            new = np.where(old < 0, old * self._repetition, old / self._repetition)
        # Keep finite logits finite, because an infinite logit would forbid its token rather than penalise it.
        scores[seen] = np.where(np.isneginf(old), old, np.clip(new, -_LARGEST, _LARGEST))
