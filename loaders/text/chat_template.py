"""Chat templates: Jinja written by strangers, rendered as transformers renders it, in a bounded sandbox.

Importing this module imports jinja2.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2

from ..artifact.errors import PrecastError
from .chat_messages import checked_messages, checked_objects, checked_variables, has_parts, in_parts, joined
from .chat_meter import Limits, Meter, OverLimit
from .chat_sandbox import Refused, compiled

__all__ = ["ChatTemplate", "Limits"]

# Match a template that iterates over the parts of a message's content, and one that tests for text.
_WALKS, _ASKS = (
    re.compile(r"\bin\s+[\w.]*\b(content\b|\w+\[.content.\])"),
    re.compile(r"\bis\s+(not\s+)?string\b"),
)
_PROBE = "How are parts shown?"


class ChatTemplate:
    """A chat template, compiled. Renderings share nothing, so any thread may call `render`.

    Args:
        source: Jinja source.
        bos_token: the variable `bos_token` of the template; None: undefined, which prints as nothing.
        eos_token: the same for `eos_token`.
        limits: what a rendering may use.

    Raises:
        PrecastError: the source is too long or is not a template.
    """

    def __init__(
        self, source: str, *, bos_token: str | None, eos_token: str | None, limits: Limits | None = None
    ) -> None:
        self._limits = limits or Limits()
        self._tokens = {
            name: token
            for name, token in (("bos_token", bos_token), ("eos_token", eos_token))
            if token is not None
        }
        if len(source) > self._limits.source:
            raise PrecastError(
                f"Chat template: expected at most {self._limits.source:,} characters, found {len(source):,};"
                " export the model with a shorter template."
            )
        self._walks = _WALKS.search(source) is not None and _ASKS.search(source) is None
        # Python's own compiler has limits: SyntaxError, RecursionError, MemoryError.
        self._sandbox, self._code = _explaining(lambda: compiled(source, self._limits))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt for `messages`.

        Args:
            messages: each a dict with `role` (str) and `content` (str, or a list of parts such as
                ``{"type": "text", "text": "…"}``, which are joined by line ends for a template that accepts only
                text). Content may be missing or None if the message has another key such as `tool_calls`. The
                template receives all other keys that are not None.
            add_generation_prompt: end the prompt where the assistant's answer begins.
            tools: JSON schemas of functions, for templates that support them.
            documents: texts to answer from, each usually with `title` and `text`, for templates that support them.
            variables: further variables of this template (`enable_thinking`, `date_string`, …).

        Raises:
            PrecastError: the messages are malformed, the template refuses them or fails, or it was stopped.
        """
        return self.rendered(
            self.values(
                messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=documents,
                variables=variables,
            )
        )

    def values(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Return the caller's values for the template, checked and as plain JSON; arguments as `render`.

        Raises:
            PrecastError: an argument is malformed.
        """
        return {
            **checked_variables(variables or {}),
            "messages": self._fitting(checked_messages(messages)),
            "tools": None if tools is None else checked_objects(tools, "tools"),
            "documents": None if documents is None else checked_objects(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }

    def rendered(self, values: Mapping[str, Any]) -> str:
        """Return the prompt for `values`.

        Raises:
            PrecastError: the template refuses them or fails, or it was stopped.
        """
        return self._rendered(values, self._limits)

    def _rendered(self, values: Mapping[str, Any], limits: Limits) -> str:
        given = {**values, **self._tokens}
        meter = Meter(limits)
        sandbox = self._sandbox.with_meter(meter)
        template = jinja2.Template.from_code(sandbox, self._code, sandbox.make_globals(None))
        context = template.new_context(given)
        try:
            pieces = template.root_render_func(context)
            prompt: str = _explaining(lambda: sandbox.concat(_bounded(pieces, limits.output)))
            return prompt
        finally:
            context.vars.clear()
            context.parent.clear()
            meter.end()

    def _fitting(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with content in the form that the template accepts: text, or a list of parts."""
        if has_parts(messages):
            return messages if self._shows_parts or not self._shows_text else joined(messages)
        if self._walks and self._shows_parts and not self._shows_text:
            return in_parts(messages)
        return messages

    @cached_property
    def _shows_text(self) -> bool:
        return _PROBE in self._probed(_PROBE)

    @cached_property
    def _shows_parts(self) -> bool:
        """Return True if the template prints a part as text or as JSON, not as a Python repr."""
        shown = self._probed([{"type": "text", "text": _PROBE}])
        return _PROBE in shown and f"'{_PROBE}'" not in shown

    def _probed(self, content: Any) -> str:
        """Return the prompt for one message, empty if the template refuses it."""
        values = {"messages": [{"role": "user", "content": content}], "tools": None, "documents": None}
        try:
            return self._rendered({**values, "add_generation_prompt": True}, self._limits.for_probe())
        except PrecastError:
            return ""


def _bounded(pieces: Iterable[str], most: int) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise OverLimit(f"the prompt grew beyond {most:,} characters")
        yield piece


def _explaining(work: Callable[[], Any]) -> Any:
    """Run the work. Raise an error as one sentence, without the traceback that would keep the work's values alive."""
    try:
        return work()
    except Exception as error:
        refusal = _explained(error)
    try:
        raise refusal
    finally:
        del refusal, work  # else the error and this frame keep each other alive


# Errors


def _explained(error: Exception) -> PrecastError:
    """One sentence for whatever went wrong in a template."""
    if isinstance(error, PrecastError):
        return error
    # A syntax error's own text repeats the place.
    text = _said(error.message if isinstance(error, jinja2.TemplateSyntaxError) else error)
    text = " ".join(text.split()).rstrip(".")[:300]
    if isinstance(error, OverLimit):
        return PrecastError(f"The chat template was stopped, because {text}; use another template.")
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else _line(error)
    place = f" at line {line}" if line else ""
    if isinstance(error, Refused):
        return PrecastError(f"The chat template refused these messages{place}: {text}; change the messages.")
    if isinstance(error, RecursionError):
        text = "it calls itself too deeply"
    elif not isinstance(error, jinja2.TemplateError):
        text = f"{type(error).__name__}: {text}"
    return PrecastError(f"The chat template failed{place}: {text}; correct it, or use another template.")


def _said(error: Any) -> str:
    """Return the beginning of an error's text, which a template may have made long."""
    args = getattr(error, "args", (error,))
    if len(args) == 1 and isinstance(args[0], str):
        return repr(args[0][:1000]) if isinstance(error, KeyError) else args[0][:1000]
    return str(error)[:1000]


def _line(error: Exception) -> int | None:
    """Return the line of the template at which it failed: the innermost frame of the template's code knows it."""
    line, step = None, error.__traceback__
    while step is not None:
        template = step.tb_frame.f_globals.get("__jinja_template__")
        if isinstance(template, jinja2.Template):
            line = template.get_corresponding_lineno(step.tb_lineno)
        step = step.tb_next
    return line
