"""Find the tokens that must not come next, by the rules of transformers.

One class replaces these logits processors of transformers: NoRepeatNGram, NoBadWords, MinLength, MinNewTokensLength,
SuppressTokens and SuppressTokensAtBegin. They only set logits to minus infinity, so their order has no effect.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sampling_params import SamplingParams

_Prefix = tuple[int, ...]


class ForbiddenTokens:
    """The tokens that must not come next in one sequence.

    Args:
        params: the sampling parameters with the rules.
        prompt: tokens of the prompt.
        end_ids: end-of-generation tokens.
    """

    def __init__(self, params: "SamplingParams", prompt: Sequence[int], end_ids: Iterable[int]) -> None:
        self._ends = frozenset(end_ids)
        self._prompt = len(prompt)
        # min_tokens takes precedence over min_length, as min_new_tokens does in transformers.
        self._min_length = self._prompt + params.min_tokens if params.min_tokens else params.min_length
        self._at_begin = params.begin_suppress_tokens
        words = [word for word in params.bad_words_ids if len(word) > 1 or word[0] not in self._ends]
        self._always = {*params.suppress_tokens, *(word[0] for word in words if len(word) == 1)}
        self._words = _by_prefix(words)
        self._size = params.no_repeat_ngram_size
        self._ngrams: dict[_Prefix, set[int]] = {}
        self._tokens: list[int] = []
        for token in prompt:
            self.observe(token)

    def observe(self, token: int) -> None:
        """Append a token to the sequence."""
        self._tokens.append(token)
        if 0 < self._size <= len(self._tokens):
            self._ngrams.setdefault(tuple(self._tokens[-self._size : -1]), set()).add(token)

    def tokens(self) -> Iterator[int]:
        """Return the tokens that must not come next, unordered and possibly with duplicates."""
        length = len(self._tokens)
        return chain(
            self._always,
            self._at_begin if length == self._prompt else (),
            self._ends if length < self._min_length else (),
            *(self._ending_words(size) for size in self._words if size <= length),
            self._repeated(),
        )

    def _ending_words(self, size: int) -> Iterable[int]:
        return self._words[size].get(self._last(size), ())

    def _repeated(self) -> Iterable[int]:
        return self._ngrams.get(self._last(self._size - 1), ()) if self._ngrams else ()

    def _last(self, count: int) -> _Prefix:
        return tuple(self._tokens[len(self._tokens) - count :])


def _by_prefix(words: Iterable[Sequence[int]]) -> dict[int, dict[_Prefix, list[int]]]:
    """Return the tokens that complete a word, by the length of the word's prefix and by the prefix itself.

    Words of one token are omitted.
    """
    found: dict[int, dict[_Prefix, list[int]]] = {}
    for word in words:
        if len(word) > 1:
            found.setdefault(len(word) - 1, {}).setdefault(tuple(word[:-1]), []).append(word[-1])
    return found
