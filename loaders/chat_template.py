"""Chat templates: Jinja written by strangers, rendered as transformers renders it, in a bounded sandbox.

Importing this module imports jinja2.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2

from .artifact.errors import PrecastError
from .chat_meter import Limits, Meter, OverLimit
from .chat_sandbox import Refused, compiled

__all__ = ["ChatTemplate", "Limits"]

# Variables that have an argument, or a rule, of their own.
_TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")


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
        # Python's own compiler has limits too: SyntaxError, RecursionError, MemoryError.
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
            messages: each a dict with `role` (str) and `content` (str, or a list of parts); content may be
                missing or None where there are `tool_calls`. Other keys are handed to the template.
            add_generation_prompt: whether the prompt ends where the assistant's answer begins.
            tools: JSON schemas of functions, for templates that know about them.
            documents: texts to answer from, each usually with `title` and `text`; for templates that know them.
            variables: what else this template asks for by name (`enable_thinking`, `date_string`, …).

        Raises:
            PrecastError: the messages are malformed, the template refuses them or fails, or it was stopped.
        """
        given = {
            **_checked_variables(variables or {}),
            **self._tokens,
            "messages": _checked_messages(messages),
            "tools": None if tools is None else _checked_objects(tools, "tools"),
            "documents": None if documents is None else _checked_objects(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        sandbox = self._sandbox.with_meter(Meter(self._limits))
        template = jinja2.Template.from_code(sandbox, self._code, sandbox.make_globals(None))
        return _explaining(lambda: sandbox.concat(_pieces(template, given, self._limits)))


def _pieces(template: jinja2.Template, given: dict[str, Any], limits: Limits) -> Iterator[str]:
    size = 0
    for piece in template.generate(given):
        size += len(piece)
        if size > limits.output:
            raise OverLimit(f"the prompt grew beyond {limits.output:,} characters")
        yield piece


def _explaining(work: Callable[[], Any]) -> Any:
    """Do the work. An error is raised as one sentence, without the traceback that keeps the work's values alive."""
    try:
        return work()
    except Exception as error:
        refusal = _explained(error)
    raise refusal


# Messages


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "an empty list" if messages in ([], ()) else type(messages).__name__
        raise PrecastError(f"Chat: expected a list of at least one message, found {found}.")
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked_message(message: Any, where: str) -> dict[str, Any]:
    wanted = 'a message {"role": text, "content": text or a list of parts}'
    if not isinstance(message, Mapping):
        raise PrecastError(f"Chat: expected {where} to be {wanted}, found {type(message).__name__}.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise PrecastError(
            f"Chat: expected {where} to be {wanted}, found a role of type {type(role).__name__}."
        )
    if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
        raise PrecastError(
            f"Chat: expected {where} to be {wanted}, found a content of type {type(content).__name__}."
        )
    plain: dict[str, Any] = _plain(message, where)
    return plain


def _checked_objects(values: Any, where: str) -> list[dict[str, Any]]:
    """Tools or documents: a list of JSON objects."""
    if not isinstance(values, (list, tuple)):
        raise PrecastError(f"Chat: expected {where} to be a list of objects, found {type(values).__name__}.")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            found = "a function; give its JSON schema" if callable(value) else type(value).__name__
            raise PrecastError(f"Chat: expected {where}[{index}] to be a JSON object, found {found}.")
    plain: list[dict[str, Any]] = _plain(values, where)
    return plain


def _checked_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(variables, Mapping):
        raise PrecastError(f"Chat: expected variables to be an object, found {type(variables).__name__}.")
    for name in variables:
        if name in _TAKEN:
            raise PrecastError(
                f"Chat: the variable {name!r} of a template is not free; expected another name, or the argument."
            )
    plain: dict[str, Any] = _plain(variables, "variables")
    return plain


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Copy a value as plain JSON types: methods of any other object would be at the template's disposal."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > 64:
        raise PrecastError(f"Chat: {where} is nested more than 64 deep.")
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(item, where, depth + 1) for key, item in value.items()}
    raise PrecastError(
        f"Chat: expected {where} to hold only what JSON can hold, found a {type(value).__name__}"
        f"{' with keys that are not text' if isinstance(value, Mapping) else ''}."
    )


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
    """The beginning of an error's text, which a template may have made long."""
    args = getattr(error, "args", (error,))
    if len(args) == 1 and isinstance(args[0], str):
        return repr(args[0][:1000]) if isinstance(error, KeyError) else args[0][:1000]
    return str(error)[:1000]


def _line(error: Exception) -> int | None:
    """Line of the template at which it failed: jinja2 rewrites tracebacks so that they show it."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line
