"""Chat templates: untrusted Jinja, rendered as transformers renders it, in a sandbox with limits.

Importing this module imports jinja2.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2

from ..artifact.errors import PrecastError
from .chat_messages import (
    ChatOptions,
    as_parts,
    has_parts,
    join_parts,
    plain_messages,
    plain_objects,
    plain_variables,
)
from .chat_meter import LimitExceeded, Limits, Meter
from .chat_sandbox import TemplateRefusal, compile_template
from .tools import checked_tools

__all__ = ["ChatOptions", "ChatTemplate", "Limits"]

# Patterns for templates that iterate over the parts of a message's content, and for templates that test whether a value
# is text.
_ITERATES_CONTENT = re.compile(r"\bin\s+[\w.]*\b(content\b|\w+\[.content.\])")
_TESTS_FOR_TEXT = re.compile(r"\bis\s+(not\s+)?string\b")
# The content of the message with which a template is probed.
_PROBE = "How are parts shown?"


class ChatTemplate:
    """A compiled chat template. Renderings share no state, so several threads may call `render` at the same time.

    Args:
        source: Jinja source.
        bos_token: value of the template's variable `bos_token`. None leaves it undefined, so that it prints as "".
        eos_token: value of the template's variable `eos_token`. None leaves it undefined, so that it prints as "".
        limits: limits of the compilation, and of each rendering.

    Raises:
        PrecastError: the source is too long, or it is not a template.
    """

    def __init__(
        self, source: str, *, bos_token: str | None, eos_token: str | None, limits: Limits | None = None
    ) -> None:
        self._limits = limits or Limits()
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        if len(source) > self._limits.source:
            raise PrecastError(
                f"Chat template: expected at most {self._limits.source:,} characters, found {len(source):,};"
                " export the model with a shorter template."
            )
        self._needs_parts = (
            _ITERATES_CONTENT.search(source) is not None and _TESTS_FOR_TEXT.search(source) is None
        )
        # SmolLM3's template expects the tools in the variables `xml_tools` and `python_tools`.
        self._reads_xml_tools = "xml_tools" in source
        # Python's compiler raises SyntaxError, RecursionError or MemoryError beyond its own limits.
        self._sandbox, self._code = _translate_errors(lambda: compile_template(source, self._limits))

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None) -> str:
        """Return the prompt for `messages`.

        Args:
            messages: dicts with `role` (str) and `content`. The content is a str, or a list of parts such as
                ``{"type": "text", "text": "…"}``. If the template accepts only text, newlines join the parts. The
                content may be missing or None if the message has another key, such as `tool_calls`. The template
                receives all keys whose value is not None.
            options: the template's other inputs; None means the defaults.

        Raises:
            PrecastError: an argument is malformed, or the template refuses the messages, fails or exceeds a limit.
        """
        return self.render_values(self.values(messages, options))

    def values(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None
    ) -> dict[str, Any]:
        """Check the caller's values for the template, and return them as plain JSON. The arguments are as for `render`.

        Raises:
            PrecastError: an argument is malformed.
        """
        options = options or ChatOptions()
        documents, variables = options.documents, plain_variables(options.variables or {})
        tools = None if options.tools is None else checked_tools(options.tools)
        if (
            tools is not None
            and self._reads_xml_tools
            and not variables.keys() & {"xml_tools", "python_tools"}
        ):
            variables["xml_tools"] = tools
        return {
            **variables,
            "messages": self._adapted(plain_messages(messages)),
            "tools": tools,
            "documents": None if documents is None else plain_objects(documents, "documents"),
            "add_generation_prompt": options.add_generation_prompt,
        }

    def render_values(self, values: Mapping[str, Any]) -> str:
        """Return the prompt for values that the method `values` returned.

        Raises:
            PrecastError: the template refuses the values, fails or exceeds a limit.
        """
        return self._render(values, self._limits)

    def _render(self, values: Mapping[str, Any], limits: Limits) -> str:
        meter = Meter(limits)
        sandbox = self._sandbox.with_meter(meter)
        template = jinja2.Template.from_code(sandbox, self._code, sandbox.make_globals(None))
        context = template.new_context({**values, **self._tokens})
        try:
            pieces = template.root_render_func(context)
            prompt: str = _translate_errors(lambda: sandbox.concat(_limit_output(pieces, limits.output)))
            return prompt
        finally:
            context.vars.clear()
            context.parent.clear()
            meter.release()

    def _adapted(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with content in the form that the template accepts: text, or a list of parts."""
        if has_parts(messages):
            return messages if self._shows_parts or not self._shows_text else join_parts(messages)
        if self._needs_parts and self._shows_parts and not self._shows_text:
            return as_parts(messages)
        return messages

    @cached_property
    def _shows_text(self) -> bool:
        return _PROBE in self._render_probe(_PROBE)

    @cached_property
    def _shows_parts(self) -> bool:
        """Return True if the template prints a part as text or as JSON, not as a Python repr."""
        shown = self._render_probe([{"type": "text", "text": _PROBE}])
        return _PROBE in shown and f"'{_PROBE}'" not in shown

    def _render_probe(self, content: Any) -> str:
        """Return the prompt for one message, or "" if the template refuses it."""
        values = {"messages": [{"role": "user", "content": content}], "tools": None, "documents": None}
        try:
            return self._render({**values, "add_generation_prompt": True}, self._limits.for_probe())
        except PrecastError:
            return ""


def _limit_output(pieces: Iterable[str], most: int) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise LimitExceeded(f"the prompt grew beyond {most:,} characters")
        yield piece


# Errors


def _translate_errors(work: Callable[[], Any]) -> Any:
    """Call `work`, and translate its error into a PrecastError.

    The new error has no traceback of `work`, because the traceback would keep the values of `work` alive.
    """
    try:
        return work()
    except Exception as error:
        translated = _translated(error)
    try:
        raise translated
    finally:
        del translated, work  # break the reference cycle between the error and this frame


def _translated(error: Exception) -> PrecastError:
    """Return a PrecastError of one sentence for any error of a template."""
    if isinstance(error, PrecastError):
        return error
    # A syntax error's `message` omits the line, which `str` would include and this function adds.
    text = _message(error.message if isinstance(error, jinja2.TemplateSyntaxError) else error)
    text = " ".join(text.split()).rstrip(".")[:300]
    if isinstance(error, LimitExceeded):
        return PrecastError(f"The chat template was stopped, because {text}; use another template.")
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else _line(error)
    place = f" at line {line}" if line else ""
    if isinstance(error, TemplateRefusal):
        return PrecastError(f"The chat template refused these messages{place}: {text}; change the messages.")
    if isinstance(error, RecursionError):
        text = "it calls itself too deeply"
    elif not isinstance(error, jinja2.TemplateError):
        text = f"{type(error).__name__}: {text}"
    return PrecastError(f"The chat template failed{place}: {text}; correct it, or use another template.")


def _message(error: Any) -> str:
    """Return at most 1,000 characters of an error's text, because a template can make the text long."""
    args = getattr(error, "args", (error,))
    if len(args) == 1 and isinstance(args[0], str):
        return repr(args[0][:1000]) if isinstance(error, KeyError) else args[0][:1000]
    return str(error)[:1000]


def _line(error: Exception) -> int | None:
    """Return the line of the template that raised an error, or None if the template's code did not run."""
    line, step = None, error.__traceback__
    while step is not None:
        template = step.tb_frame.f_globals.get("__jinja_template__")
        if isinstance(template, jinja2.Template):
            line = template.get_corresponding_lineno(step.tb_lineno)
        step = step.tb_next
    return line
