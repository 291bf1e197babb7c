"""Guess the next tokens from earlier text (prompt lookup), so that one call of the engine verifies several tokens.

Answers such as rewritten code, JSON and quotations repeat parts of their prompt. If the latest tokens have occurred
before, the tokens that followed the earlier occurrence are likely to follow again. The method is Saxena's prompt lookup
decoding (https://github.com/apoorvumang/prompt-lookup-decoding).

The length of a draft maximises the expected tokens per second. This rate is the expected number of accepted tokens,
divided by the measured time of a call that verifies the draft. The expected number depends on the length of the match.
It is learnt by comparing every match with the tokens that actually follow, even if the match led to no draft.
"""

from bisect import bisect_right
from collections.abc import Sequence

# Minimum length of a match, in tokens.
_SHORTEST = 2
# Number of the latest matches that are compared. The longest match is used, or the latest of several longest matches.
_CANDIDATES = 16
# Matches are divided into classes by length. This is the minimum length of each class.
_CLASSES = (2, 3, 4, 6, 9, 16)
# The share of right guesses that is assumed for each class at first. The shares are low, because wrong drafts in prose
# cost time. Every match corrects the share of its class, even if it leads to no draft.
_ASSUMED = (0.2, 0.3, 0.4, 0.6, 0.8, 0.9)
# An assumed share has the weight of this many guesses.
_ASSUMED_WEIGHT = 3.0
# Each guess multiplies the weight of all earlier guesses of the same class by this factor.
_MEMORY = 0.95
# A draft is used only if it is expected to be more than this many times as fast as decoding without a draft.
_WORTH = 1.05


class CallTimes:
    """The measured times of calls by number of tokens, relative to the time of decoding one token.

    Until calls are measured, every token after the first is assumed to take a sixth of the time of the first.

    Args:
        most: maximum number of tokens in a call.
    """

    def __init__(self, most: int) -> None:
        self._decode = 0.0
        self._ratios = [1 + n / 6 for n in range(most)]
        self._assumed = tuple(self._ratios)

    def ratio(self, tokens: int) -> float:
        """Return the time of a call with `tokens` tokens (at least 1), relative to decoding one token."""
        return self._ratios[tokens - 1]

    def add(self, tokens: int, seconds: float) -> None:
        """Record the time of a decode step (1 token), or of a score call (more tokens)."""
        if tokens == 1:
            self._decode += (seconds - self._decode) * (0.1 if self._decode else 1.0)
            # Slowly move the ratios back to the assumed ones. Otherwise, one slow call could prevent all later drafts.
            self._ratios = [r + (a - r) / 256 for r, a in zip(self._ratios, self._assumed, strict=True)]
        elif self._decode > 0:
            found, place = seconds / self._decode, tokens - 1
            change = 0.3 * (found - self._ratios[place])
            # Correct the ratios of similar lengths as well, because calls of similar length take about the same time,
            # and few of them are measured.
            for i in range(1, len(self._ratios)):
                self._ratios[i] += change / (1 + abs(i - place))
        self._ratios[0] = 1.0


class Drafts:
    """Prompt lookup for one sequence.

    Args:
        times: the times of the engine's calls, shared by all sequences.
    """

    def __init__(self, times: CallTimes) -> None:
        self._times = times
        self._after: dict[tuple[int, ...], list[int]] = {}  # the positions that follow each n-gram
        self._known = 0  # number of tokens observed
        self._source, self._length = (
            -1,
            0,
        )  # the position after the match (-1: no match), and the length of the match
        self._weights = [_ASSUMED_WEIGHT] * len(_CLASSES)
        self._hits = [share * _ASSUMED_WEIGHT for share in _ASSUMED]

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return a draft of the next tokens; empty if decoding one token is expected to be faster.

        Args:
            tokens: the sequence so far. It must begin with the tokens of the previous call.
            most: maximum length of the draft.
        """
        self._observe(tokens)
        if self._source < 0:
            return []
        guess = list[int]()
        for i in range(self._worth(most)):
            place = self._source + i
            guess.append(tokens[place] if place < len(tokens) else guess[place - len(tokens)])
        return guess

    def _observe(self, tokens: Sequence[int]) -> None:
        """Compare the current match with the new tokens, and look up the latest tokens if there is no match."""
        for place in range(self._known, len(tokens)):
            if self._source >= 0:
                self._judge(tokens[self._source] == tokens[place])
            if place + 1 >= _SHORTEST:
                ngram = tuple(tokens[place + 1 - _SHORTEST : place + 1])
                found = self._after.setdefault(ngram, [])
                if self._source < 0 and found and place + 1 == len(tokens):
                    self._length, self._source = max((_common(tokens, p), p) for p in found[-_CANDIDATES:])
                found.append(place + 1)
        self._known = len(tokens)

    def _judge(self, is_right: bool) -> None:
        kind = self._kind(self._length)
        self._weights[kind] = self._weights[kind] * _MEMORY + 1
        self._hits[kind] = self._hits[kind] * _MEMORY + is_right
        self._source, self._length = (self._source + 1, self._length + 1) if is_right else (-1, 0)

    @staticmethod
    def _kind(length: int) -> int:
        return bisect_right(_CLASSES, length) - 1

    def _worth(self, most: int) -> int:
        """Return the draft length with the most expected tokens per second; 0 if no draft is worth its time."""
        best, best_rate = 0, _WORTH
        expected, reached = 1.0, 1.0
        for count in range(1, most + 1):
            kind = self._kind(self._length + count - 1)
            reached *= self._hits[kind] / self._weights[kind]
            expected += reached
            rate = expected / self._times.ratio(count + 1)
            if rate > best_rate:
                best, best_rate = count, rate
        return best


def _common(tokens: Sequence[int], source: int) -> int:
    """Return the length of the longest common suffix of ``tokens[:source]`` and `tokens`, up to a limit."""
    length = _SHORTEST
    while length < min(source, _CLASSES[-1]) and tokens[source - length - 1] == tokens[-length - 1]:
        length += 1
    return length
