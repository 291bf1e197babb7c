"""Chat templates: Jinja written by strangers, in a sandbox that is bounded in time, steps and memory.

The language is the one transformers gives to templates, so that they render the same here. The bounds
come from four places: the syntax tree is instrumented before it is compiled (`_Instrument`), so that each
turn of a loop, each macro and each piece of output is counted; operators, calls and filters are intercepted
(`_Sandbox`), so that a size is known before the value is made; only filters whose result can be bounded
exist; and a clock is looked at with every count. Importing this module imports jinja2.
"""

import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from datetime import datetime
from types import CodeType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .artifact.errors import PrecastError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a template may do in one rendering; real templates stay far below."""

    source: int = 1 << 18
    """Characters of the template."""
    steps: int = 5_000_000
    """Nodes of the syntax tree, and items of printed lists."""
    made: int = 1 << 28
    """Characters of text made on the way; an item of a list counts as eight."""
    output: int = 1 << 24
    """Characters of the prompt."""
    seconds: float = 10.0


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
        self._code = _compile(source, self._limits)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the prompt for `messages`.

        Args:
            messages: each a dict with `role` (str) and `content` (str, or a list of parts); content may be
                missing or None where there are `tool_calls`. Other keys are handed to the template.
            add_generation_prompt: whether the prompt ends where the assistant's answer begins.
            tools: JSON schemas of functions, for templates that know about them.

        Raises:
            PrecastError: the messages are malformed, the template refuses them or fails, or it was stopped.
        """
        variables = {
            **self._tokens,
            "messages": _checked_messages(messages),
            "tools": None if tools is None else _plain(tools, "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        sandbox = _Sandbox(_Meter(self._limits))
        template = jinja2.Template.from_code(sandbox, self._code, sandbox.make_globals(None))
        try:
            return _collect(template, variables, self._limits)
        except Exception as error:
            raise _explained(error) from error


def _collect(template: jinja2.Template, variables: dict[str, Any], limits: Limits) -> str:
    pieces, size = [], 0
    for piece in template.generate(variables):
        size += len(piece)
        if size > limits.output:
            raise _OverLimit(f"the prompt grew beyond {limits.output:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def _compile(source: str, limits: Limits) -> CodeType:
    if len(source) > limits.source:
        raise PrecastError(
            f"Chat template: expected at most {limits.source:,} characters, found {len(source):,};"
            " export the model with a shorter template."
        )
    sandbox = _Sandbox(_Meter(limits))
    try:
        tree = _Instrument().visit(sandbox.parse(source))
        tree.set_environment(sandbox)
        return sandbox.compile(tree)
    except (
        Exception
    ) as error:  # Python's own compiler has limits too: SyntaxError, RecursionError, MemoryError
        raise _explained(error) from error


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


# Limits


class _OverLimit(Exception):
    """A limit was reached. Nothing in jinja2 catches it while rendering."""


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class _Meter:
    """What one rendering has used."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._steps = 0
        self._made = 0
        self._end = time.monotonic() + limits.seconds

    def step(self, count: int = 1) -> bool:
        """Count steps; True, so that it can stand in a condition."""
        self._steps += count
        if self._steps > self._limits.steps:
            raise _OverLimit(f"it took more than {self._limits.steps:,} steps")
        if time.monotonic() > self._end:
            raise _OverLimit(f"it took longer than {self._limits.seconds:g} seconds")
        return True

    def make(self, size: int) -> None:
        """Count text that was made or, better, is about to be."""
        self._made += size
        if self._made > self._limits.made:
            raise _OverLimit(f"it made more than {self._limits.made:,} characters of text")

    def size(self, value: Any) -> int:
        """Characters of `value` printed, roughly. Every item looked at is a step."""
        total, left = 0, [value]
        while left:
            self.step()
            item = left.pop()
            if isinstance(item, (str, bytes)):
                total += len(item)
            elif isinstance(item, Mapping):
                left += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set, KeysView, ValuesView, ItemsView)):
                left += item
            elif item is None or isinstance(item, (int, float, range, Undefined)):
                total += 8 + (item.bit_length() // 3 if isinstance(item, int) else 16)
            else:
                raise jinja2.TemplateRuntimeError(f"a value of type {type(item).__name__} cannot become text")
        return total


def _length(value: Any) -> int:
    """What a text or list counts as when it is copied; other values are small."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return 8 * len(value) if isinstance(value, (list, tuple)) else 1


# Sizes of results that can be much larger than their arguments. Each function has the arguments of the method
# or filter of that name and returns the number of characters that it is about to make.


def _size_replace(text: Any, old: Any, new: Any, count: Any = None) -> int:
    whole = str(text)
    return len(whole) + whole.count(str(old)) * len(str(new))


def _size_padded(text: Any, width: Any = 8, *_: Any) -> int:
    return (len(text) + 1) * (1 + (abs(width) if isinstance(width, int) else 0))


def _size_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    whole = str(text)
    return len(whole) + (whole.count("\n") + 2) * (width if isinstance(width, int) else len(width))


def _size_join(separator: Any, items: Any) -> int:
    return sum(len(item) + len(separator) for item in items)


# In `%` and `{}` formats: a width or precision of four digits or more, or taken from an argument, or hidden
# from this expression by nested brackets. Linear in the text: no two of its repeats can share a character.
_WIDE = re.compile(
    r"%(\([^()]*\))?[-# +.\d]*?(\*|\d{4})|%\([^()]*\(|\{[^{}:]*:[^{}]*?(\{|\d{4})",
)


def _size_format(template: str, values: int) -> int:
    """Of a format string whose arguments have `values` characters in all: each field may print them all."""
    if wide := _WIDE.search(template):
        raise jinja2.TemplateRuntimeError(f"the width in the format {wide.group()!r} is too large")
    return len(template) + (template.count("%") + template.count("{")) * (values + 999)


_METHOD_SIZES: dict[str, Callable[..., int]] = {
    "replace": _size_replace,
    "join": _size_join,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs"), _size_padded),
}
_METHODS_REFUSED = frozenset({"translate", "to_bytes"})


# Filters


_LIST_FILTERS = (
    *(
        "abs",
        "attr",
        "count",
        "d",
        "default",
        "dictsort",
        "first",
        "float",
        "groupby",
        "int",
        "items",
        "last",
    ),
    *("length", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr"),
    *("sort", "unique"),
)
_TEXT_FILTERS = (
    *("capitalize", "e", "escape", "lower", "safe", "string", "title", "trim", "truncate", "upper"),
    *("urlencode", "wordcount"),
)


def _filters(meter: _Meter) -> dict[str, Callable[..., Any]]:
    def sized(size: Callable[..., int]) -> Callable[..., int]:
        return lambda *args, **kwargs: meter.size([args, kwargs]) + size(*args, **kwargs)

    def size_formatted(template: Any, *args: Any, **kwargs: Any) -> int:
        return _size_format(str(template), meter.size([args, kwargs]))

    made = {name: _counted(FILTERS[name], meter) for name in _LIST_FILTERS}
    for name in _TEXT_FILTERS:
        made[name] = _counted(FILTERS[name], meter, sized(lambda *args, **kwargs: 0))
    made["replace"] = _counted(FILTERS["replace"], meter, sized(_size_replace))
    made["indent"] = _counted(FILTERS["indent"], meter, sized(_size_indent))
    made["format"] = _counted(FILTERS["format"], meter, sized(size_formatted))
    made["round"] = _counted(FILTERS["round"], meter, _size_round)
    made["sum"] = _counted(FILTERS["sum"], meter, _size_sum)
    made["join"] = _join_filter(meter)
    made["tojson"] = _tojson_filter(meter)
    return made


def _counted(
    function: Callable[..., Any], meter: _Meter, size: Callable[..., int] | None = None
) -> Callable[..., Any]:
    """Wrap a filter of jinja2: a step, and `size` of its arguments is counted before it runs."""
    # Some filters are handed the environment or context first, which is marked on the function (and copied).
    hidden = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        meter.step()
        if size is not None:
            meter.make(size(*args[hidden:], **kwargs))
        result = function(*args, **kwargs)
        meter.make(_length(result))
        return result

    return run


def _size_round(value: Any, precision: Any = 0, *_: Any, **__: Any) -> int:
    if isinstance(precision, int) and abs(precision) > 100:
        raise jinja2.TemplateRuntimeError(f"cannot round to {precision} digits")
    return 1


def _size_sum(items: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, (int, float)):
        raise jinja2.TemplateRuntimeError("sum adds numbers only")
    return 1


def _join_filter(meter: _Meter) -> Callable[..., Any]:
    builtin: Any = FILTERS["join"]

    @jinja2.pass_eval_context
    def join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        items = list(value)
        meter.make(meter.size(items) + meter.size(d) * len(items))
        return builtin(context, items, d, attribute)

    return join


def _tojson_filter(meter: _Meter) -> Callable[..., str]:
    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers has it: no HTML escapes, unlike jinja2's own."""
        if isinstance(indent, int) and indent > 16:
            raise jinja2.TemplateRuntimeError(f"cannot indent JSON by {indent}")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        pieces = []
        for piece in encoder.iterencode(x):  # piece by piece, so that the size is known on the way
            meter.step()
            meter.make(len(piece))
            pieces.append(piece)
        return "".join(pieces)

    return tojson


# The environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering, with its meter."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, meter: _Meter) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # Nothing is evaluated at compile time, where no meter runs.
            optimized=False,
            finalize=jinja2.pass_context(lambda context, value: self._finalised(value)),
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.meter = meter
        self.filters = _filters(meter)
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self.meter
        meter.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, (str, bytes, int)):
            if name in _METHODS_REFUSED:
                raise SecurityError(f"the method {name!r} is not allowed")
            args = (list(args[0]), *args[1:]) if name == "join" and args else args
            # jinja2 adds its own arguments, which begin with an underscore.
            named = [value for key, value in kwargs.items() if not key.startswith("_")]
            meter.make(_length(owner) + sum(map(_length, (*args, *named))))
            if name in _METHOD_SIZES and (args or named):
                meter.make(_METHOD_SIZES[name](owner, *args, *named))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.meter.make(_size_binop(operator, left, right, self.meter))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            self.meter.make(_size_format(value.__self__, self.meter.size([args, kwargs])))
            return wrapped(*args, **kwargs)

        return checked

    # What the instrumented tree calls.

    def metered_step(self, count: int) -> bool:
        return self.meter.step(count)

    def metered_text(self, size: int) -> None:
        self.meter.make(size)

    def metered_concat(self, *values: Any) -> str:
        self.meter.make(self.meter.size(values))
        return "".join(map(str, values))

    def metered_slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        result = value[start:stop:step]
        self.meter.make(_length(result))
        return result

    def _finalised(self, value: Any) -> Any:
        self.meter.make(self.meter.size(value))
        return value


def _size_binop(operator: str, left: Any, right: Any, meter: _Meter) -> int:
    """Characters that an operator is about to make; numbers are held to 4,096 bits."""
    if operator == "+":
        return _length(left) + _length(right)
    if operator == "%":
        return _size_format(left, meter.size(right)) if isinstance(left, str) else 1
    if not isinstance(left, int) or not isinstance(right, int):
        count = next((abs(value) for value in (left, right) if isinstance(value, int)), 1)
        return (
            1
            if isinstance(left, float) or isinstance(right, float)
            else _length(left) * _length(right) * count
        )
    bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
    if bits > 4096:
        raise jinja2.TemplateRuntimeError("a number grew beyond 4096 bits")
    return 1


def _raise_exception(message: Any) -> NoReturn:
    raise _Refused(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 256 or _WIDE.search(format):
        raise jinja2.TemplateRuntimeError("the format of strftime_now is too long")
    return datetime.now().strftime(format)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Instrument(NodeTransformer):
    """Puts calls of the meter into a template's syntax tree, wherever it can repeat itself or make text."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._count(node)
        if node.test is not None:  # a test that fails never reaches the body
            node.test = nodes.And(_call("metered_step", nodes.Const(1)), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._count(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._count(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._count(node)

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        return [nodes.ExprStmt(_call("metered_text", nodes.Const(size))), node] if size else [node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("metered_concat", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _call("metered_slice", node.node, *(bound or nodes.Const(None) for bound in bounds))

    def visit_Include(self, node: nodes.Stmt) -> NoReturn:
        raise jinja2.TemplateSyntaxError("another template cannot be included here", node.lineno)

    visit_Extends = visit_Import = visit_FromImport = visit_Include

    def _count(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        """Charge the nodes of a body, all of them, each time that it runs."""
        size = sum(1 for _ in node.find_all(nodes.Node))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("metered_step", nodes.Const(size))))
        return node


def _call(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)


# Errors


def _explained(error: Exception) -> PrecastError:
    """One sentence for whatever went wrong in a template."""
    if isinstance(error, PrecastError):
        return error
    # A syntax error's own text repeats the place.
    text = str(error.message if isinstance(error, jinja2.TemplateSyntaxError) else error)
    text = " ".join(text.split()).rstrip(".")[:300]
    if isinstance(error, _OverLimit):
        return PrecastError(f"The chat template was stopped, because {text}; use another template.")
    if isinstance(error, _Refused):
        return PrecastError(f"The chat template refused these messages: {text}.")
    if isinstance(error, RecursionError):
        text = "it calls itself too deeply"
    elif not isinstance(error, jinja2.TemplateError):
        text = f"{type(error).__name__}: {text}"
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else _line(error)
    return PrecastError(f"The chat template failed{f' at line {line}' if line else ''}: {text}.")


def _line(error: Exception) -> int | None:
    """Line of the template at which it failed: jinja2 rewrites tracebacks so that they show it."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line
