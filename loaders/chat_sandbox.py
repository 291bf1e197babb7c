"""A Jinja sandbox that is bounded in time, steps and memory, for templates written by strangers.

The bounds come from four places: the syntax tree is instrumented before it is compiled (`Instrument`), so that each
turn of a loop, each macro and each piece of output is counted; operators, calls and filters are intercepted
(`Sandbox`), so that a size is known before the value is made; only filters whose result can be bounded exist; and a
clock is looked at with every count. Importing this module imports jinja2.
"""

import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from datetime import datetime
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


# Limits


class OverLimit(Exception):
    """A limit was reached. Nothing in jinja2 catches it while rendering."""


class Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class Meter:
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
            raise OverLimit(f"it took more than {self._limits.steps:,} steps")
        if time.monotonic() > self._end:
            raise OverLimit(f"it took longer than {self._limits.seconds:g} seconds")
        return True

    def make(self, size: int) -> None:
        """Count text that was made or, better, is about to be."""
        self._made += size
        if self._made > self._limits.made:
            raise OverLimit(f"it made more than {self._limits.made:,} characters of text")

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


def _filters(meter: Meter) -> dict[str, Callable[..., Any]]:
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
    function: Callable[..., Any], meter: Meter, size: Callable[..., int] | None = None
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


def _join_filter(meter: Meter) -> Callable[..., Any]:
    builtin: Any = FILTERS["join"]

    @jinja2.pass_eval_context
    def join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        items = list(value)
        meter.make(meter.size(items) + meter.size(d) * len(items))
        return builtin(context, items, d, attribute)

    return join


def _tojson_filter(meter: Meter) -> Callable[..., str]:
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


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering, with its meter."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, meter: Meter) -> None:
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


def _size_binop(operator: str, left: Any, right: Any, meter: Meter) -> int:
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
    raise Refused(str(message))


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


class Instrument(NodeTransformer):
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
