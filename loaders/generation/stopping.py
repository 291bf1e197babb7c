"""Stop strings: text that ends generation, found across token boundaries and never shown."""

from collections.abc import Sequence

from ..artifact.errors import PrecastError


class _Automaton:
    """Automaton of Aho & Corasick (1975) for some strings, with one state for each distinct prefix of them.

    Reading text leaves it in the state of the longest prefix that the text ends with, in constant time a
    character on average, whatever the number and length of the strings.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.depth = [0]  # length of the state's prefix: what could still begin one of the words
        self.match = [0]  # length of the longest word that the state's prefix ends with, 0 if none
        self._next: list[dict[str, int]] = [{}]
        self._fall = [0]  # state of the longest proper suffix that is also a prefix
        for word in words:
            self._insert(word)
        self._link()

    def step(self, state: int, char: str) -> int:
        """Return the state after reading one character."""
        while state and char not in self._next[state]:
            state = self._fall[state]
        return self._next[state].get(char, 0)

    def _insert(self, word: str) -> None:
        state = 0
        for char in word:
            if char not in self._next[state]:
                self._next[state][char] = len(self.depth)
                self.depth.append(self.depth[state] + 1)
                self.match.append(0)
                self._next.append({})
                self._fall.append(0)
            state = self._next[state][char]
        self.match[state] = len(word)

    def _link(self) -> None:
        queue = list(self._next[0].values())
        for state in queue:  # grows while it is walked: breadth first, so shorter prefixes are linked already
            for char, child in self._next[state].items():
                self._fall[child] = fall = self.step(self._fall[state], char)
                self.match[child] = self.match[child] or self.match[fall]
                queue.append(child)


class StopStrings:
    """Watches streamed text for stop strings.

    The match is the one that *ends* first, because that is when generation stops; of several that end at the
    same character the longest. Text before it is emitted, the match and all after it never are. While no
    match is complete, exactly the longest suffix that could still begin a stop string is held back.

    Raises:
        PrecastError: a stop string is empty, which would match everywhere.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise PrecastError(f"Stop strings: expected a list of non-empty strings, found {stops!r}.")
        self._automaton = _Automaton(stops)
        self._any = len(stops) > 0
        self._state = 0
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text; return what may be shown now, and whether a stop string is complete.

        After that every further call returns ``("", True)``.
        """
        if self._stopped:
            return "", True
        if not self._any:
            return text, False
        for index, char in enumerate(text):
            self._state = self._automaton.step(self._state, char)
            if length := self._automaton.match[self._state]:
                return self._stop(text[: index + 1], length), True
        text = self._held + text
        safe = len(text) - self._automaton.depth[self._state]
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Return the text still held back, when generation ends for another reason."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _stop(self, text: str, length: int) -> str:
        # A partial match is always held back, so the match begins inside `held + text`.
        before = (self._held + text)[:-length]
        self._held, self._stopped = "", True
        return before
