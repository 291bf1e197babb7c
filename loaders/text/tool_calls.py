"""Tool calls in the text of an answer, in JSON and in Python's syntax.

A body is the text of one or more calls, usually between two markers. Each kind of body determines its own end while the
text arrives, so that a marker inside a string of JSON does not end the body.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

from .python_calls import NotCalls, parse_call_list, parse_code

# Limits on a model's text, which a hostile prompt may control.
_DEEPEST, _LONGEST, _LONGEST_NAME, _MOST_SPACES = 64, 1 << 20, 256, 1024


class NoCall(ValueError):
    """The text is not a tool call."""


class ToolCall(NamedTuple):
    """A call that the model asks for.

    Attributes:
        id: identifier of the call: the model's own, or else nine random letters and digits.
        name: name of the tool.
        arguments: a JSON object, as a string.
    """

    id: str
    name: str
    arguments: str


class RawCall(NamedTuple):
    """A call as the model wrote it.

    Attributes:
        name: name of the tool.
        arguments: a JSON object, as a string.
        id: the model's own identifier, or None.
    """

    name: str
    arguments: str
    id: str | None


class Body(Protocol):
    """The text of one or more calls, which arrives in pieces."""

    def end(self, text: str) -> int | None:
        """Return the length of the body at the beginning of `text`; None if the body is incomplete.

        Raises:
            NoCall: the text cannot become a body.
        """

    def calls(self, text: str) -> list[RawCall]:
        """Return the calls in a complete body. There is at least one.

        Raises:
            NoCall: the body is malformed.
        """


class _Brackets:
    """A search for the bracket that closes the first bracket, across pieces of text. It takes linear time.

    Args:
        start: index of the first bracket.
        quotes: characters that enclose strings.
    """

    def __init__(self, start: int, quotes: str) -> None:
        self._at, self._depth, self._quote = start, 0, ""
        self._plain = re.compile(rf"[\[\](){{}}{quotes}]")
        self._inside = {quote: re.compile(rf"[{quote}\\]") for quote in quotes}

    def end(self, text: str) -> int | None:
        """Return the index after the closing bracket; None if that bracket has not arrived yet."""
        if len(text) > _LONGEST:
            raise NoCall
        while found := (self._inside[self._quote] if self._quote else self._plain).search(text, self._at):
            symbol, after = found[0], found.end()
            if symbol == "\\":
                if after == len(text):  # the escaped character has not arrived yet
                    self._at = found.start()
                    return None
                after += 1
            elif self._quote:
                self._quote = ""
            elif symbol in self._inside:
                self._quote = symbol
            else:
                self._depth += 1 if symbol in "[({" else -1
                if self._depth > _DEEPEST:
                    raise NoCall
            self._at = after
            if self._depth == 0 and not self._quote and symbol in "])}":
                return after
        self._at = len(text)
        return None


class _BracketedBody:
    """A body from an opening bracket to its matching closing bracket.

    Args:
        openers: the brackets that may open the body.
        quotes: characters that enclose strings; brackets inside strings do not count.
    """

    def __init__(self, openers: str, quotes: str) -> None:
        self._openers, self._quotes = openers, quotes
        self._brackets: _Brackets | None = None

    def end(self, text: str) -> int | None:
        if self._brackets is None:
            start = _first(text, self._openers)
            if start is None:
                return None
            self._brackets = _Brackets(start, self._quotes)
        return self._brackets.end(text)


class JsonBody(_BracketedBody):
    """A JSON object, or an array of such objects: ``{"name": "weather", "arguments": {"place": "Paris"}}``."""

    def __init__(self) -> None:
        super().__init__("{[", '"')

    def calls(self, text: str) -> list[RawCall]:
        value = _loads(text)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise NoCall
        return [_json_call(item) for item in values]


class NamedJsonBody:
    """The body of Mistral's calls: a name and its arguments (``weather[ARGS]{"place": "Paris"}``), or JSON."""

    NAME = re.compile(r"[\w.:-]+")
    _HEAD = re.compile(rf"\s*({NAME.pattern})\s*(?:\[CALL_ID\]\s*([\w-]+)\s*)?(?:\[ARGS\]\s*)?")

    def __init__(self) -> None:
        self._json = JsonBody()
        self._brackets: _Brackets | None = None

    def end(self, text: str) -> int | None:
        if self._brackets is not None:
            return self._brackets.end(text)
        start = text[: _LONGEST_NAME * 2].lstrip()[:1]
        if start in ("", "{", "["):
            return self._json.end(text)
        brace = text.find("{", 0, _LONGEST_NAME * 2)
        if brace < 0:
            if len(text) >= _LONGEST_NAME * 2:
                raise NoCall
            return None
        if self._HEAD.fullmatch(text, 0, brace) is None:
            raise NoCall
        self._brackets = _Brackets(brace, '"')
        return self._brackets.end(text)

    def calls(self, text: str) -> list[RawCall]:
        if self._brackets is None:
            return self._json.calls(text)
        brace = text.index("{")
        head = self._HEAD.fullmatch(text, 0, brace)
        assert head is not None
        return [_raw_call(head[1], _loads(text[brace:]), head[2])]


class CallListBody(_BracketedBody):
    """A list of calls in Python's syntax: ``[weather(place="Paris")]``."""

    def __init__(self) -> None:
        super().__init__("[", "'\"")

    def calls(self, text: str) -> list[RawCall]:
        try:
            return [_raw_call(name, arguments, None) for name, arguments in parse_call_list(text)]
        except NotCalls:
            raise NoCall from None


class BareBody:
    """Llama's body without a marker. The first characters show whether it is a `JsonBody` or a `CallListBody`."""

    def __init__(self) -> None:
        self._body: JsonBody | CallListBody | None = None

    def end(self, text: str) -> int | None:
        if self._body is None:
            start = _first(text, "{[")
            if start is None:
                return None
            inner = text[start + 1 :].lstrip()[:1]
            if text[start] == "[" and not inner:
                return None
            is_json = text[start] == "{" or inner in "{]"
            self._body = JsonBody() if is_json else CallListBody()
        return self._body.end(text)

    def calls(self, text: str) -> list[RawCall]:
        assert self._body is not None
        return self._body.calls(text)


class PythonTagBody:
    """The body of Llama's calls after ``<|python_tag|>``: JSON, or a call such as ``brave_search.call(query="…")``."""

    _HEAD = re.compile(r"\s*[\w.]*")

    def __init__(self) -> None:
        self._json = JsonBody()
        self._brackets: _Brackets | None = None

    def end(self, text: str) -> int | None:
        if self._brackets is not None:
            return self._brackets.end(text)
        head = self._HEAD.match(text)
        assert head is not None
        if len(head[0]) > _LONGEST_NAME:
            raise NoCall
        if not head[0].strip():
            return self._json.end(text)
        if head.end() == len(text):
            return None
        if text[head.end()] != "(":
            raise NoCall
        self._brackets = _Brackets(head.end(), "'\"")
        return self._brackets.end(text)

    def calls(self, text: str) -> list[RawCall]:
        if self._brackets is None:
            return self._json.calls(text)
        try:
            calls = parse_code(text)
        except NotCalls:
            raise NoCall from None
        return [_raw_call(name.removesuffix(".call"), arguments, None) for name, arguments in calls]


class CodeBody:
    """A script of calls that ends before the closing marker. Strings in the script must not contain the marker."""

    def __init__(self, closing: str) -> None:
        self._closing, self._searched = closing, 0

    def end(self, text: str) -> int | None:
        if len(text) > _LONGEST:
            raise NoCall
        place = text.find(self._closing, self._searched)
        self._searched = max(0, len(text) - len(self._closing) + 1)
        return None if place < 0 else place

    def calls(self, text: str) -> list[RawCall]:
        try:
            return [_raw_call(name, arguments, None) for name, arguments in parse_code(text)]
        except NotCalls:
            raise NoCall from None


class XmlBody:
    """Qwen3-Coder's body: ``<function=weather><parameter=place>Paris</parameter></function>``.

    All arguments are strings. `typed` converts them to the types of a schema. The syntax has no escapes, so a string
    cannot contain the markers.
    """

    _CLOSING = "</function>"
    _FORM = re.compile(r"\s*<function=([^>\n]+)>\s*(.*?)\s*</function>", re.DOTALL)
    _PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)

    def __init__(self) -> None:
        self._searched = 0

    def end(self, text: str) -> int | None:
        if len(text) > _LONGEST:
            raise NoCall
        head = text[:_LONGEST_NAME].lstrip()
        opening = "<function="
        if not head.startswith(opening[: len(head)]):
            raise NoCall
        place = text.find(self._CLOSING, self._searched)
        self._searched = max(0, len(text) - len(self._CLOSING) + 1)
        return None if place < 0 else place + len(self._CLOSING)

    def calls(self, text: str) -> list[RawCall]:
        found = self._FORM.fullmatch(text)
        if found is None or self._PARAMETER.sub("", found[2]).strip():
            raise NoCall
        return [_raw_call(found[1].strip(), dict(self._PARAMETER.findall(found[2])), None)]


def typed(arguments: str, schema: Mapping[str, Any]) -> str:
    """Convert arguments to the types of a tool's schema, for models that write every argument as a string.

    Args:
        arguments: the text of a JSON object whose values are strings.
        schema: JSON Schema of the tool's parameters. An argument stays a string if the schema allows a string, if the
            parameter is unknown, or if the string is not JSON.

    Returns:
        The text of the JSON object with converted values.
    """
    properties = schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    values = {
        name: value if _may_be_text(known.get(name)) else _value_of(value)
        for name, value in json.loads(arguments).items()
    }
    return _raw_call("typed", values, None).arguments


def _may_be_text(schema: Any) -> bool:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return kind is None or kind == "string" or (isinstance(kind, (list, tuple)) and "string" in kind)


def _value_of(text: str) -> Any:
    # Templates print Python's constants.
    constants = {"True": True, "False": False, "None": None}
    if text.strip() in constants:
        return constants[text.strip()]
    try:
        value = _loads(text)
        json.dumps(value, allow_nan=False)
    except (NoCall, ValueError, RecursionError):
        return text
    return value


# Functions that create a body, by the kind of body. The argument is the marker after the body.
BODIES: Mapping[str, Callable[[str], Body]] = {
    "json": lambda _: JsonBody(),
    "named_json": lambda _: NamedJsonBody(),
    "call_list": lambda _: CallListBody(),
    "bare": lambda _: BareBody(),
    "python_tag": lambda _: PythonTagBody(),
    "code": CodeBody,
    "xml": lambda _: XmlBody(),
}


def _first(text: str, allowed: str) -> int | None:
    """Return the index of the first visible character; None if no such character has arrived yet.

    Raises:
        NoCall: the character is not in `allowed`, or too many spaces come before it.
    """
    stripped = text.lstrip()
    place = len(text) - len(stripped)
    if place > _MOST_SPACES or (stripped and stripped[0] not in allowed):
        raise NoCall
    return place if stripped else None


def _loads(text: str) -> Any:
    try:
        # Models write line ends and tabs in strings without escapes, which `strict=False` accepts.
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise NoCall from None


def _refuse(constant: str) -> NoReturn:
    raise NoCall(constant)


def _json_call(value: Any) -> RawCall:
    """Return the call in a JSON object. Name and arguments are keys of the object, or of its key "function"."""
    if isinstance(value, dict) and isinstance(inner := value.get("function"), dict):
        value = {"id": value.get("id"), **inner}
    if not isinstance(value, dict):
        raise NoCall
    arguments: Any = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    identifier = value.get("id")
    # Llama 3.1 also writes {"type": "function", "function": "weather", "parameters": {…}}.
    name = value.get("name", value.get("function"))
    return _raw_call(name, arguments, identifier if isinstance(identifier, str) else None)


def _raw_call(name: Any, arguments: Any, identifier: str | None) -> RawCall:
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not _is_text(name):
        raise NoCall
    if not isinstance(arguments, dict):
        raise NoCall
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a number is infinite
        raise NoCall from None
    if not _is_text(text):
        text = json.dumps(arguments)
    is_usable = identifier and len(identifier) <= _LONGEST_NAME and _is_text(identifier)
    return RawCall(name, text, identifier if is_usable else None)


def _is_text(text: str) -> bool:
    """Return True if UTF-8 can encode a text, that is, if the text contains no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def tool_schemas(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the JSON Schema of each tool's parameters, by tool name; `tools` is a result of `checked_tools`."""
    functions = (tool.get("function", tool) for tool in tools)
    return {function["name"]: function.get("parameters") or {} for function in functions}
