"""All filters and tests that a chat template may use.

If the cost of a filter or test depends on its arguments, it charges that cost to the meter before it runs. `chat_meter`
explains the costs. The results equal those of jinja2's own filters and tests, except that `tojson` writes JSON as
transformers does. Importing this module imports jinja2.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import Context, Undefined
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.utils import pass_context, pass_environment
from markupsafe import Markup

from .chat_meter import SCALARS, LazyItems, Meter, size
from .chat_methods import charge, lines_cost, replace_cost

NUMBER_BITS = 4096
"""Maximum number of bits of a number in a template's calculations."""

# Matches a `%` or `{}` format whose width or precision has at least four digits or is an argument. It also matches a
# format with nested brackets, because they could contain such a width. Matching takes linear time, because no two
# repetitions in the pattern can match the same character.
WIDE = re.compile(
    r"%(\([^()]*\))?[-# +.\d]*?(\*|\d{4})|%\([^()]*\(|\{[^{}:]*:[^{}]*?(\{|\d{4})",
)


def charge_format(meter: Meter, template: str, values: Any) -> None:
    """Charge for formatting `template`, on the assumption that each of its fields prints all values.

    Raises:
        TemplateRuntimeError: the width of a field is too large, or a value cannot become text.
    """
    meter.step(len(template))
    if wide := WIDE.search(template):
        raise jinja2.TemplateRuntimeError(f"the width in the format {wide.group()[:40]!r} is too large")
    weight = meter.weigh(values)
    if weight.opaque:
        raise jinja2.TemplateRuntimeError(f"a value of type {weight.opaque} cannot become text")
    fields = template.count("%") + template.count("{")
    # A number takes up to 1,308 characters: 309 digits before the point, and up to 999 after it.
    count = len(template) + fields * (weight.printed + 2048)
    escaped = 5 if isinstance(template, Markup) else 1
    wide_bytes = 4 if not template.isascii() or "c" in template else weight.width
    meter.step(escaped * count >> 5)
    meter.allocate(80 + escaped * count * wide_bytes)


def check_number(value: Any) -> Any:
    """Return `value` after checking that it is not an integer with too many bits.

    Raises:
        TemplateRuntimeError: the number is too large to calculate with.
    """
    if isinstance(value, int) and value.bit_length() > NUMBER_BITS:
        raise jinja2.TemplateRuntimeError(f"a number grew beyond {NUMBER_BITS} bits")
    return value


# Text


def _on_text(name: str, charge_for: Callable[[Meter, str, tuple[Any, ...]], None]) -> Callable[..., Any]:
    """Return jinja2's filter `name`, wrapped so that it converts any value to text and charges for the call."""
    function: Any = FILTERS[name]

    @pass_environment
    def run(environment: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = environment.meter
        text = value if isinstance(value, str) else meter.to_text(value)
        charge_for(meter, text, (*args, *kwargs.values()))
        return function(text, *args, **kwargs)

    return run


def _like(method: str) -> Callable[[Meter, str, tuple[Any, ...]], None]:
    """Return a function that charges the cost of the `str` method with this name."""
    return lambda meter, text, args: charge(meter, text, method, args)


def _per_character(memory: int, stride: int) -> Callable[[Meter, str, tuple[Any, ...]], None]:
    """Return a function that charges `memory` bytes for each character, and 1 step for every `stride` characters."""

    def charge_for(meter: Meter, text: str, args: tuple[Any, ...]) -> None:
        meter.step(len(text) // stride)
        meter.allocate(80 + memory * len(text))

    return charge_for


@pass_environment
def _replace(environment: Any, s: Any, old: Any, new: Any, count: Any = None) -> str:
    meter: Meter = environment.meter
    text, old, new = meter.to_text(s), meter.to_text(old), meter.to_text(new)
    args = (old, new) if count is None else (old, new, count)
    meter.step(len(text) >> 5)
    allocated, steps = replace_cost(meter, text, args)
    meter.step(steps)
    meter.allocate(allocated)
    return text.replace(*args)


def _on_plain_text(name: str, cost: Callable[[Meter, str, tuple[Any, ...]], None]) -> Callable[..., Any]:
    """Return jinja2's filter `name`, wrapped so that it accepts only text or undefined, and charges for the call."""
    function: Any = FILTERS[name]
    takes_environment = hasattr(function, "jinja_pass_arg")

    @pass_environment
    def run(environment: Any, s: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(s, str):
            cost(environment.meter, s, (*args, *kwargs.values()))
        elif not isinstance(s, Undefined):
            raise TypeError(f"{name} expects text, not {type(s).__name__!r}")
        return function(*(environment,) * takes_environment, s, *args, **kwargs)

    return run


def _cost_indent(meter: Meter, text: str, args: tuple[Any, ...]) -> None:
    meter.step(len(text) >> 4)
    allocated, steps = lines_cost(meter, text, ())
    by = args[0] if args else 4
    each = size(by) if isinstance(by, str) else 4 * abs(by) if isinstance(by, int) else 0
    meter.step(steps)
    meter.allocate(6 * allocated + (steps + 1) * each)


def _cost_truncate(meter: Meter, text: str, args: tuple[Any, ...]) -> None:
    texts = [text, *(arg for arg in args if isinstance(arg, str))]
    meter.step(sum(map(len, texts)) >> 5)
    meter.allocate(6 * sum(map(size, texts)))


@pass_environment
def _format(environment: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    template = value if isinstance(value, str) else environment.meter.to_text(value)
    charge_format(environment.meter, template, [*args, kwargs])
    return FILTERS["format"](template, *args, **kwargs)


@pass_environment
def _join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    meter: Meter = environment.meter
    items = meter.to_list(value)
    if attribute is not None:
        read = make_attrgetter(environment, _path(attribute))
        items = [read(item) for item in items]
    return meter.join(meter.to_text(d), [meter.to_text(item) for item in items])


@pass_environment
def _urlencode(environment: Any, value: Any) -> str:
    meter: Meter = environment.meter
    if isinstance(value, LazyItems):
        value = meter.to_list(value)
    weight = meter.weigh(value)
    if weight.opaque:
        raise TypeError(f"urlencode expects text, not {weight.opaque!r}")
    meter.step(weight.printed)
    meter.allocate(64 * weight.printed)
    encoded: str = FILTERS["urlencode"](value)
    return encoded


@pass_environment
def _tojson(
    environment: Any,
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers does: without HTML escapes, unlike jinja2's own filter."""
    meter: Meter = environment.meter
    if isinstance(indent, int) and indent > 16:
        raise jinja2.TemplateRuntimeError(f"cannot indent JSON by {indent}")
    weight = meter.weigh(x)
    between = meter.weigh([separators, indent]).text + (indent if isinstance(indent, int) else 0) + 2
    count = weight.printed + weight.items * between * (weight.depth + 1)
    meter.step(weight.items + (count >> 5))
    # The encoder collects the pieces in a list.
    meter.allocate(80 + count * weight.width, temporary=256 * weight.items)
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# Numbers


@pass_environment
def _int(environment: Any, value: Any, default: Any = 0, base: Any = 10) -> Any:
    if isinstance(value, str):
        _number_text(environment.meter, value)
    return check_number(FILTERS["int"](value, default, base))


@pass_environment
def _float(environment: Any, value: Any, default: Any = 0.0) -> Any:
    if isinstance(value, str):
        _number_text(environment.meter, value)
    return FILTERS["float"](value, default)


def _number_text(meter: Meter, text: str) -> None:
    # If the text is not a number, Python's error message contains the text with escapes.
    meter.step(len(text) >> 2)
    meter.allocate(0, temporary=2 * size(text) + 48 * len(text))


def _round(value: Any, precision: Any = 0, method: Any = "common") -> Any:
    if isinstance(precision, int) and abs(precision) > 100:
        raise jinja2.TemplateRuntimeError(f"cannot round to {precision} digits")
    return FILTERS["round"](check_number(value), precision, method)


@pass_environment
def _sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise jinja2.TemplateRuntimeError("sum adds numbers only")
    items = environment.meter.to_list(iterable)
    return FILTERS["sum"](environment, items, _path(attribute), start)


# Lists


def _path(attribute: Any) -> Any:
    """Return an attribute path after checking it.

    Raises:
        TemplateRuntimeError: following the path would take too long.
        TypeError: the path is neither text nor a number.
    """
    if isinstance(attribute, str):
        if len(attribute) > 1000 or attribute.count(".") + attribute.count(",") > 15:
            raise jinja2.TemplateRuntimeError("an attribute has too many parts")
    elif attribute is not None and type(attribute) not in SCALARS:
        raise TypeError(f"an attribute must be text or a number, not {type(attribute).__name__!r}")
    return attribute


def _lazy(name: str) -> Callable[..., Any]:
    function: Any = FILTERS[name]
    attribute_first = name.endswith("attr")

    @pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> LazyItems:
        environment: Any = context.environment
        _path(kwargs.get("attribute"))
        if attribute_first and args:
            _path(args[0])
        return LazyItems(environment.meter, function(context, value, *args, **kwargs))

    return run


@pass_environment
def _list(environment: Any, value: Any) -> list[Any]:
    items: list[Any] = environment.meter.to_list(value)
    environment.meter.weigh(items)
    return items


def _ordered(name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """Return jinja2's filter `name`, which compares items, wrapped so that it charges for the comparisons.

    Args:
        name: the filter's name.
        parameters: names of the filter's arguments after the value, in order.
    """
    function: Any = FILTERS[name]

    @pass_environment
    def run(environment: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        items = environment.meter.to_list(value)
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        _charge_order(environment.meter, items, _path(arguments.get("attribute")))
        result = function(environment, items, *args, **kwargs)
        if isinstance(result, list):
            environment.meter.weigh(result)
        return result

    return run


def _charge_order(meter: Meter, items: list[Any], attribute: Any) -> None:
    """Charge for a merge sort, which compares each item once a level, and for a lower-case copy of each item."""
    weight = meter.weigh(items)
    keys = 1 + attribute.count(",") if isinstance(attribute, str) else 1
    levels = math.ceil(math.log2(len(items) + 2)) + 7
    meter.step(keys * levels * weight.steps)
    meter.step(keys * weight.text >> 2)
    meter.allocate((64 + 200 * keys) * len(items), temporary=12 * keys * weight.text)


@pass_environment
def _dictsort(
    environment: Any, value: Any, case_sensitive: Any = False, by: Any = "key", reverse: Any = False
) -> list[Any]:
    if isinstance(value, dict):
        _charge_order(environment.meter, environment.meter.to_list(value.items()), None)
    elif not isinstance(value, Undefined):
        raise TypeError(f"dictsort expects a dict, not {type(value).__name__!r}")
    result: list[Any] = FILTERS["dictsort"](value, case_sensitive, by, reverse)
    environment.meter.weigh(result)
    return result


@pass_environment
def _unique(environment: Any, value: Any, case_sensitive: Any = False, attribute: Any = None) -> LazyItems:
    items = _charged_items(environment.meter, value)
    return LazyItems(
        environment.meter, FILTERS["unique"](environment, items, case_sensitive, _path(attribute))
    )


def _charged_items(meter: Meter, value: Any) -> Any:
    """Yield the items of `value`, and charge for hashing and comparing each item."""
    for item in value:
        weight = meter.weigh(item)
        meter.step(1 + 2 * weight.steps + (weight.text >> 2))
        meter.allocate(256 + 12 * weight.text)
        meter.check_time()  # numbers with colliding hashes take long to look up
        yield item


@pass_environment
def _reverse(environment: Any, value: Any) -> Any:
    meter: Meter = environment.meter
    if isinstance(value, str):
        meter.allocate(size(value))
        meter.step(len(value) >> 4)
        return value[::-1]
    try:
        return LazyItems(meter, reversed(value))
    except TypeError:
        return meter.to_list(value)[::-1]


@pass_environment
def _items(environment: Any, value: Any) -> LazyItems:
    return LazyItems(environment.meter, FILTERS["items"](value))


@pass_environment
def _attr(environment: Any, obj: Any, name: Any) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"attribute name must be text, not {type(name).__name__!r}")
    if len(name) > 1000:
        return environment.undefined(obj=obj, name=name)
    return FILTERS["attr"](environment, obj, name)


ALLOWED_FILTERS: dict[str, Callable[..., Any]] = {
    # These are jinja2's own filters, unchanged, because each one only inspects a value or returns one item.
    **{name: FILTERS[name] for name in ("abs", "count", "d", "default", "first", "last", "length")},
    **{name: _lazy(name) for name in ("map", "reject", "rejectattr", "select", "selectattr")},
    **dict.fromkeys(("e", "escape"), _on_text("e", _per_character(24, 16))),
    "attr": _attr,
    "capitalize": _on_text("capitalize", _like("capitalize")),
    "dictsort": _dictsort,
    "float": _float,
    "format": _format,
    "groupby": _ordered("groupby", ("attribute", "default", "case_sensitive")),
    "indent": _on_plain_text("indent", _cost_indent),
    "int": _int,
    "items": _items,
    "join": _join,
    "list": _list,
    "lower": _on_text("lower", _like("lower")),
    "max": _ordered("max", ("case_sensitive", "attribute")),
    "min": _ordered("min", ("case_sensitive", "attribute")),
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "safe": _on_text("safe", _per_character(4, 64)),
    "sort": _ordered("sort", ("reverse", "case_sensitive", "attribute")),
    "string": _on_text("string", _per_character(0, 64)),
    "sum": _sum,
    "title": _on_text("title", _per_character(192, 1)),
    "tojson": _tojson,
    "trim": _on_text("trim", _like("strip")),
    "truncate": _on_plain_text("truncate", _cost_truncate),
    "unique": _unique,
    "upper": _on_text("upper", _like("upper")),
    "urlencode": _urlencode,
    "wordcount": _on_text("wordcount", _per_character(72, 1)),
}


# Tests

TESTS: dict[str, Any] = {**JINJA_TESTS}


def _comparison(name: str) -> Callable[..., Any]:
    function: Any = TESTS[name]

    @pass_environment
    def run(environment: Any, value: Any, other: Any) -> Any:
        return function(environment.metered_operand(value), environment.metered_operand(other))

    return run


def _of_number(name: str) -> Callable[..., Any]:
    """Return jinja2's test `name`, wrapped to refuse strings: the test computes with `%`, which formats a string."""
    function: Any = TESTS[name]

    def run(value: Any, *args: Any) -> Any:
        for number in (value, *args):
            if type(number) not in SCALARS and not isinstance(number, Undefined):
                raise TypeError(f"{name} expects a number, not {type(number).__name__!r}")
            check_number(number)
        return function(value, *args)

    return run


def _of_text(name: str) -> Callable[..., Any]:
    function: Any = TESTS[name]

    @pass_environment
    def run(environment: Any, value: Any) -> Any:
        text = environment.meter.to_text(value)
        environment.meter.step(len(text) >> 3)
        return function(text)

    return run


def _of_name(name: str) -> Callable[..., Any]:
    function: Any = TESTS[name]

    @pass_environment
    def run(environment: Any, value: Any) -> Any:
        return function(environment, environment.metered_operand(value))

    return run


@pass_environment
def _in(environment: Any, value: Any, seq: Any) -> Any:
    return environment.metered_operand(value) in environment.metered_container(seq)


ALLOWED_TESTS: dict[str, Callable[..., Any]] = {
    **{
        name: TESTS[name]
        for name in (
            *(
                "boolean",
                "callable",
                "defined",
                "escaped",
                "false",
                "float",
                "integer",
                "iterable",
                "mapping",
            ),
            *("none", "number", "sameas", "sequence", "string", "true", "undefined"),
        )
    },
    **{
        name: _comparison(name)
        for name in (
            *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan"),
            *("<=", "le"),
        )
    },
    **{name: _of_number(name) for name in ("odd", "even", "divisibleby")},
    **{name: _of_text(name) for name in ("lower", "upper")},
    **{name: _of_name(name) for name in ("filter", "test")},
    "in": _in,
}
