"""Parse function calls in Python's syntax, with literal keyword arguments: ``[weather(place="Paris", days=2)]``.

Python's own parser is unsuitable, because it accepts far more, warns about escapes, and recurses as deeply as the text
is nested.
"""

import re
from typing import Any

# JSON's constants are included, because models confuse them with Python's constants.
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL
)
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[^\W\d][\w.-]*")
_KEYWORD = re.compile(r"([^\W\d]\w*)\s*=(?!=)")
_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_DEEPEST = 64


class NotCalls(ValueError):
    """The text is not a list or script of calls with literal arguments."""


def parse_call_list(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and arguments of the calls in a list.

    Raises:
        NotCalls: the text is not such a list.
    """
    reader = _Reader(text)
    reader.expect("[")
    calls = [reader.call()]
    while reader.accept(","):
        if reader.peek("]"):
            break
        calls.append(reader.call())
    reader.expect("]")
    reader.expect_end()
    return calls


def parse_code(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and arguments of the calls in a list, or in a script whose lines are calls.

    In a script, a call may be the argument of ``print()``.

    Raises:
        NotCalls: the text is neither such a list nor such a script.
    """
    if text.lstrip().startswith("["):
        return parse_call_list(text)
    reader, calls = _Reader(text), []
    while not reader.at_end():
        calls.append(reader.printed_call())
        reader.accept(";")
    if not calls:
        raise NotCalls
    return calls


class _Reader:
    """A recursive-descent parser for one text."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def at_end(self) -> bool:
        self._skip_space()
        return self._at == len(self._text)

    def expect_end(self) -> None:
        if not self.at_end():
            raise NotCalls

    def peek(self, symbol: str) -> bool:
        self._skip_space()
        return self._text.startswith(symbol, self._at)

    def accept(self, symbol: str) -> bool:
        found = self.peek(symbol)
        self._at += len(symbol) * found
        return found

    def expect(self, symbol: str) -> None:
        if not self.accept(symbol):
            raise NotCalls

    def printed_call(self) -> tuple[str, dict[str, Any]]:
        start = self._at
        if self._match(_NAME)[0] == "print" and self.accept("("):
            call = self.call()
            self.expect(")")
            return call
        self._at = start
        return self.call()

    def call(self) -> tuple[str, dict[str, Any]]:
        name, arguments = self._match(_NAME)[0], {}
        self.expect("(")
        while not self.accept(")"):
            key = self._match(_KEYWORD)[1]
            if key in arguments:
                raise NotCalls
            arguments[key] = self._value(0)
            if not self.peek(")"):
                self.expect(",")
        return name, arguments

    def _value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise NotCalls
        if self.accept("["):
            return self._items("]", depth)
        if self.accept("("):
            return self._items(")", depth)
        if self.accept("{"):
            return self._pairs(depth)
        if self.peek("'") or self.peek('"'):
            return self._string()
        if found := _NUMBER.match(self._text, self._at):
            self._at = found.end()
            return _number(found[0])
        name = self._match(_NAME)[0]
        if name not in _CONSTANTS:
            raise NotCalls
        return _CONSTANTS[name]

    def _items(self, closing: str, depth: int) -> list[Any]:
        items: list[Any] = []
        while not self.accept(closing):
            items.append(self._value(depth + 1))
            if not self.peek(closing):
                self.expect(",")
        return items

    def _pairs(self, depth: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while not self.accept("}"):
            key = self._string()
            self.expect(":")
            pairs[key] = self._value(depth + 1)
            if not self.peek("}"):
                self.expect(",")
        return pairs

    def _string(self) -> str:
        """Return a string. Adjacent string literals form one string, as in Python."""
        found = self._match(_STRING)
        parts = [found]
        while self.peek("'") or self.peek('"'):
            parts.append(self._match(_STRING))
        return "".join(_ESCAPE.sub(_unescaped, part[1] if part[2] is None else part[2]) for part in parts)

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        self._skip_space()
        found = pattern.match(self._text, self._at)
        if found is None:
            raise NotCalls
        self._at = found.end()
        return found

    def _skip_space(self) -> None:
        self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it also matches an empty text


def _number(text: str) -> int | float:
    try:
        return float(text) if set(text) & set(".eE") else int(text)
    except ValueError:  # the number has more digits than Python converts
        raise NotCalls from None


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    if code or found[4]:
        number = int(code, 16) if code else int(found[4], 8)
        if number > 0x10FFFF:
            raise NotCalls
        return chr(number)
    # Python keeps the backslash of an unknown escape.
    return _ESCAPES.get(found[5], found[5] if found[5] in "\\'\"" else "\\" + found[5])
