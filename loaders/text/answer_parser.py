"""Split an answer into content, reasoning and tool calls while its text arrives.

The result does not depend on how the text is split into pieces. A tool call is returned as a whole, once it is complete
and well-formed. Markers without a call, malformed calls, and an incomplete call at the end of the answer are content.
"""

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .answer_formats import AnswerFormat, CallSyntax
from .tool_calls import BODIES, Body, NoCall, RawCall, ToolCall, typed

# Maximum number of spaces to skip or remove before a marker. The limit keeps the parsing time linear.
_MOST_SPACES = 1024
# After this many malformed calls, all further text is content. The limit keeps the parsing time linear.
_MOST_FAILURES = 64
_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class ContentDelta(NamedTuple):
    """The next piece of the answer's content."""

    text: str


class ReasoningDelta(NamedTuple):
    """The next piece of the model's reasoning."""

    text: str


class ToolCallDelta(NamedTuple):
    """A complete tool call.

    Attributes:
        number: index of the call within the answer, from 0.
        call: the call.
    """

    number: int
    call: ToolCall


Delta = ContentDelta | ReasoningDelta | ToolCallDelta


def new_call_id() -> str:
    """Return a random identifier of nine letters and digits, as Mistral's templates require."""
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in os.urandom(9))


class AnswerParser:
    """A parser for one answer.

    The parser removes newlines around the reasoning, and whitespace next to a tool call.

    Args:
        form: the format of the answer.
        tools: the JSON Schema of the parameters of each tool that the model was given, by the tool's name. Without
            tools, no text is parsed as a call. After a marker, a call of an unknown tool is accepted, as in vLLM.
        prompt_tail: the end of the prompt's text. If it ends with the marker that opens the reasoning, the answer
            begins with reasoning.
        new_id: function that returns a new identifier for a call.

    Attributes:
        form: the format of the answer.
        is_open: True if the prompt ends with the marker that opens the reasoning.
        markers: the markers that the parser recognises. The text passed to `push` must include these markers, even if
            they are special tokens.
    """

    def __init__(
        self,
        form: AnswerFormat,
        tools: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        *,
        prompt_tail: str = "",
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._reasonings, self._tools, self._new_id = form.reasoning, tools, new_id
        self._calls = form.calls if self._tools else ()
        self.markers = AnswerFormat(name=form.name, reasoning=form.reasoning, calls=self._calls).markers()
        self._text = ""  # the text not yet classified
        self._space = ""  # spaces before that text; they are content if no call follows
        self._is_last = False
        self._deltas: list[Delta] = []
        self._count = self._failures = 0
        self._has_reasoned = False
        self._answer_closing = ""
        self._reasoning = form.reasoning[0] if form.reasoning else None
        self._syntax: CallSyntax | None = None
        self._body: Body | None = None
        self.form = form
        self.is_open = any(prompt_tail.rstrip().endswith(r.opening) for r in form.reasoning)
        # Store an unbound function, because a bound method would create a reference cycle.
        self._step: Callable[[AnswerParser], bool] = (
            AnswerParser._reason if self.is_open else AnswerParser._begin
        )

    def push(self, text: str) -> list[Delta]:
        """Parse the next piece of text; return the new deltas, which further text cannot change."""
        self._text += text
        return self._run()

    def finish(self) -> list[Delta]:
        """End the answer; return the remaining deltas."""
        self._is_last = True
        return self._run()

    def _run(self) -> list[Delta]:
        while self._step(self):
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    # Each step returns True if it made progress, and False if it needs more text.

    def _begin(self) -> bool:
        """Determine whether the answer begins with reasoning."""
        text = self._text.lstrip()
        for syntax in self._reasonings if len(self._text) - len(text) <= _MOST_SPACES else ():
            if text.startswith(syntax.opening):
                self._text = text.removeprefix(syntax.opening)
                self._reasoning, self._step = syntax, AnswerParser._reason
                return True
            if self._may_become(text, syntax.opening):
                return False
        self._step = AnswerParser._start
        return True

    def _reason(self) -> bool:
        assert self._reasoning is not None
        closing = self._reasoning.closing
        place = self._text.find(closing)
        is_closed = place >= 0
        if not is_closed:
            place = len(self._text) if self._is_last else len(self._text) - _overlap(self._text, closing)
        piece = self._text[:place]
        piece = piece[: max(len(piece.rstrip("\n")), len(piece) - _MOST_SPACES)]
        self._text = self._text[place + len(closing) :] if is_closed else self._text[len(piece) :]
        if not self._has_reasoned:
            piece = piece.lstrip("\n")
        if piece:
            self._has_reasoned = True
            self._deltas.append(ReasoningDelta(piece))
        if is_closed:
            self._step = AnswerParser._after_reasoning
        return is_closed

    def _after_reasoning(self) -> bool:
        assert self._reasoning is not None
        self._text = self._text.lstrip("\n")
        opening = self._reasoning.answer_opening
        if opening and self._text.startswith(opening):
            self._text = self._text.removeprefix(opening)
            self._answer_closing = self._reasoning.answer_closing
        elif self._may_become(self._text, opening) or not (self._text or self._is_last):
            return False
        self._step = AnswerParser._start
        return True

    def _start(self) -> bool:
        """Determine whether the text at the start of the answer, after any reasoning, is a tool call."""
        text = self._text.lstrip()
        has_many_spaces = len(self._text) - len(text) > _MOST_SPACES
        for syntax in (syntax for syntax in self._calls if syntax.at_start and not has_many_spaces):
            if self._may_become(text, syntax.opening) or not (text or self._is_last):
                return False
            if text and text.startswith(syntax.opening):
                self._space += self._text[: len(self._text) - len(text)]
                self._text = text
                self._open(syntax)
                return True
        self._step = AnswerParser._content
        return True

    def _content(self) -> bool:
        text = self._text
        syntaxes = [s for s in self._calls if not s.at_start] if self._failures < _MOST_FAILURES else []
        markers = [syntax.opening for syntax in syntaxes] + [self._answer_closing] * bool(
            self._answer_closing
        )
        place, marker = min(
            ((place, marker) for marker in markers if (place := text.find(marker)) >= 0), default=(-1, "")
        )
        if place < 0:
            held = 0 if self._is_last else max((_overlap(text, marker) for marker in markers), default=0)
            self._text = text[len(text) - held :]
            self._emit(text[: len(text) - held])
            return False
        self._text = text[place:]
        self._emit(text[:place])
        if marker == self._answer_closing:
            self._text, self._answer_closing = self._text.removeprefix(marker), ""
        else:
            self._open(next(syntax for syntax in syntaxes if syntax.opening == marker))
        return True

    def _open(self, syntax: CallSyntax) -> None:
        self._text = self._text.removeprefix(syntax.opening)
        self._syntax, self._step = syntax, AnswerParser._call
        self._body = BODIES[syntax.body](syntax.closing)

    def _call(self) -> bool:
        assert self._syntax is not None
        assert self._body is not None
        try:
            end = self._body.end(self._text)
            if end is None:
                if not self._is_last:
                    return False
                raise NoCall
            self._accept(self._body.calls(self._text[:end]))
        except NoCall:
            self._fail(self._syntax.opening)
            return True
        self._text, self._step = self._text[end:], AnswerParser._after_call
        return True

    def _accept(self, calls: list[RawCall]) -> None:
        assert self._syntax is not None
        if self._syntax.at_start and not all(call.name in self._tools for call in calls):
            raise NoCall
        self._space = ""
        for raw in calls:
            arguments = raw.arguments
            if self._syntax.body == "xml":
                arguments = typed(arguments, self._tools.get(raw.name, {}))
            call = ToolCall(raw.id or self._new_id(), raw.name, arguments)
            self._deltas.append(ToolCallDelta(self._count, call))
            self._count += 1

    def _fail(self, opening: str) -> None:
        """Emit the marker before a malformed body as content, and search the body for further markers."""
        self._failures += 1
        self._emit(opening)
        self._step = AnswerParser._content

    def _after_call(self) -> bool:
        assert self._syntax is not None
        self._text = self._text.lstrip()
        if not self._text:
            return False
        closing, separator = self._syntax.closing, self._syntax.separator
        if self._may_become(self._text, closing):
            return False
        if closing and self._text.startswith(closing):
            self._text = self._text.removeprefix(closing)
            self._step = AnswerParser._after_closing
        elif separator and self._text.startswith(separator):
            self._text, self._space = self._text.removeprefix(separator), separator
            self._step = AnswerParser._start
        else:
            self._step = AnswerParser._content
        return True

    def _after_closing(self) -> bool:
        self._text = self._text.lstrip()
        if self._text:
            self._step = AnswerParser._content
        return bool(self._text)

    def _may_become(self, text: str, marker: str) -> bool:
        """Return True if the text is the beginning of a marker, and further text may complete the marker."""
        return not self._is_last and len(text) < len(marker) and marker.startswith(text)

    def _emit(self, text: str) -> None:
        """Emit content, but hold back the spaces at its end while a call may still follow."""
        text = self._space + text
        is_end = not self._calls or (self._is_last and not self._text)
        kept = text if is_end else text[: max(len(text.rstrip()), len(text) - _MOST_SPACES)]
        self._space = text[len(kept) :]
        if kept:
            self._deltas.append(ContentDelta(kept))


def _overlap(text: str, marker: str) -> int:
    """Return the length of the text's longest suffix that is a proper prefix of the marker."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
