"""A filter for stop strings, and the exception that is raised when a constraint allows no next token."""

from bisect import bisect_left
from collections.abc import Sequence

from ..artifact.errors import PrecastError


class DeadEnd(PrecastError):
    """No token can continue the answer. The generation ends with the `finish_reason` "length"."""


class StopStrings:
    """A filter that ends streamed text at the first stop string. It belongs to one generation.

    A stop string may span several tokens, and is never shown. The match that ends first wins; of matches that end at
    the same character, the longest wins. The text before the match is shown. While no match is complete, the filter
    holds back the longest suffix that could begin a stop string.

    The time for a piece is linear in the number of stop strings, and quadratic in the length of the longest string.

    Raises:
        PrecastError: `stops` is not a list of strings, or a stop string is empty and would match everywhere.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise PrecastError(f"Stop strings: expected a list of non-empty strings, found {stops!r}.")
        self._stops = sorted(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Append a piece of text; return the text that may be shown now, and True if a stop string is complete.

        Once a stop string is complete, every further call returns ``("", True)``.
        """
        if self._stopped:
            return "", True
        if not self._stops:
            return text, False
        # A match that ends in the new piece begins in the held text at the earliest.
        text, self._held = self._held + text, ""
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self._stopped = True
            return text[: min(matches)[1]], True
        first = max(0, len(text) - self._longest + 1)
        safe = next((i for i in range(first, len(text)) if self._may_begin_stop(text[i:])), len(text))
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Return the text that is still held back. Call this method after a generation without a stop string."""
        held, self._held = self._held, ""
        return held

    def _may_begin_stop(self, text: str) -> bool:
        # The stop strings are sorted. If any of them begins with `text`, the first one that is not below `text` does.
        index = bisect_left(self._stops, text)
        return index < len(self._stops) and self._stops[index].startswith(text)
