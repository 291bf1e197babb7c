"""A Jinja sandbox with limits on time, memory and work, for untrusted templates.

A template can use only a closed set of operations. Each operation is charged before it runs:

- `chat_instrument` rewrites the syntax tree before compilation, so that loop iterations, macros, comparisons, slices,
  lists and `~` call the sandbox. jinja2 itself makes operators, calls and attributes call the sandbox.
- `chat_meter` weighs values. The weight is the size of a value, in which a shared part counts each time that it occurs.
  For example, suppose that a list contains the same list twice, which again contains the same list twice, and so on for
  forty levels. It weighs a trillion items, although it occupies a few kilobytes.
- `chat_filters` and `chat_methods` list the filters, tests and methods that a template may use, and compute their cost
  from the arguments.

A child process with resource limits would be too slow, because its start takes longer than a hundred renderings. Many
host programs cannot start child processes at all. Importing this module imports jinja2.
"""

from collections.abc import Callable, Iterable
from datetime import datetime
from types import BuiltinMethodType, CodeType, FunctionType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import SandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, missing, pass_context, pass_environment
from markupsafe import Markup

from .chat_filters import ALLOWED_FILTERS, ALLOWED_TESTS, NUMBER_BITS, WIDE, charge_format, check_number
from .chat_instrument import MeteredCodeGenerator, TemplateTags, instrument
from .chat_meter import SCALARS, VIEWS, LazyItems, LimitExceeded, Limits, Meter, width
from .chat_methods import ATTRIBUTES, METHODS, charge

_OPERANDS = (str, int, float, list, tuple, dict, range, type(None), Undefined)
_DICT_NAMES = frozenset(dir(dict))


class TemplateRefusal(jinja2.TemplateError):
    """The exception for a template that calls `raise_exception`."""


def compile_template(source: str, limits: Limits) -> tuple["Sandbox", CodeType]:
    """Compile a template within the limits.

    Raises:
        LimitExceeded: the template exceeds a limit.
        TemplateSyntaxError: the source is not a template.
    """
    sandbox = Sandbox(Meter(limits))
    return sandbox, sandbox.compile(instrument(sandbox, sandbox.parse(source), limits))


class ShortUndefined(Undefined):
    """An undefined value with a short message. It stores only its owner's type, so that the owner can be freed."""

    __slots__ = ()

    def __init__(
        self,
        hint: str | None = None,
        obj: Any = missing,
        name: Any = None,
        exc: type[jinja2.TemplateRuntimeError] = UndefinedError,
    ) -> None:
        if isinstance(name, str):
            name = name if len(name) <= 200 else f"{name[:200]}…"
        elif type(name) not in SCALARS or (isinstance(name, int) and name.bit_length() > 64):
            name = type(name)
        super().__init__(hint, obj if obj is missing else type(obj), name, exc)

    @property
    def _undefined_message(self) -> str:
        if self._undefined_hint:
            return self._undefined_hint
        name: Any = self._undefined_name
        if self._undefined_obj is missing:
            return f"{name!r} is undefined"
        owner = "None" if self._undefined_obj is type(None) else f"{self._undefined_obj.__name__} object"
        if isinstance(name, str):
            return f"{owner!r} has no attribute {name!r}"
        return (
            f"{owner} has no element {f'of type {name.__name__}' if isinstance(name, type) else repr(name)}"
        )


class Sandbox(SandboxedEnvironment):
    """The environment of one compilation or rendering, with its meter."""

    code_generator_class = MeteredCodeGenerator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, meter: Meter) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=ShortUndefined,
            # Turn off constant folding, because operations are charged only while a template is rendered.
            optimized=False,
            finalize=_print_value,
            extensions=[TemplateTags, "jinja2.ext.loopcontrols"],
        )
        self.meter = meter
        self.filters = {**ALLOWED_FILTERS}
        self.tests = {**ALLOWED_TESTS}
        self.globals = {**FUNCTIONS}

    def with_meter(self, meter: Meter) -> "Sandbox":
        """Return a copy of the environment for another rendering, which uses `meter`."""
        other = object.__new__(Sandbox)
        other.__dict__.update(self.__dict__)
        other.meter = meter
        return other

    def _compile(self, source: str, filename: str) -> CodeType:
        if len(source) > self.meter.limits.code:
            raise LimitExceeded(f"it becomes more than {self.meter.limits.code:,} characters of Python")
        return super()._compile(source, filename)

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """Raise the current error. jinja2's own handler creates a reference cycle that keeps every value alive."""
        raise

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the output of a macro, a block or the whole template."""
        return self.meter.join("", list(pieces))

    # Attributes and items

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return `obj.attribute`, or else `obj["attribute"]`, or else an undefined value."""
        if type(obj) is dict and attribute not in _DICT_NAMES:
            value = obj.get(attribute, missing)
        else:
            value = self._attribute(obj, attribute)
            if value is missing:
                try:
                    value = obj[attribute]
                except (TypeError, LookupError):
                    value = missing
        return self.undefined(obj=obj, name=attribute) if value is missing else value

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return `obj[argument]`, or else the attribute with this name, or else an undefined value."""
        if type(argument) is not str:
            self.metered_operand(argument)
        try:
            return obj[argument]
        except (TypeError, LookupError):
            value = self._attribute(obj, str(argument)) if isinstance(argument, str) else missing
        return self.undefined(obj=obj, name=argument) if value is missing else value

    def _attribute(self, obj: Any, name: str) -> Any:
        """Return an allowed attribute, an undefined value for a refused one, or `missing` for an absent one."""
        if name in ATTRIBUTES.get(type(obj), ()):
            value = getattr(obj, name)
            if isinstance(obj, str) and name in ("format", "format_map"):
                return FormatMethod(self, value)
            return value
        if type(obj) is TemplateNamespace and not name.startswith("_"):
            return getattr(obj, name, missing)
        if len(name) <= 200 and hasattr(obj, name):
            return self.unsafe_undefined(obj, name)
        return missing

    # Calls and operators

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Charge for the call `obj(…)`, and return its result."""
        meter, kind = __self.meter, type(__obj)
        meter.step()
        if kind is BuiltinMethodType or kind is MethodType:
            named = {name: value for name, value in kwargs.items() if name not in _JINJA_ARGUMENTS}
            return __self._call_method(__obj, args, named)
        if kind is Macro:
            if __obj.catch_varargs or __obj.catch_kwargs:
                meter.weigh([args, kwargs])
        elif kind in (FunctionType, type) and __obj in _CALLABLE_FUNCTIONS:
            meter.allocate(512 + 16 * len(args) + 128 * len(kwargs))
        elif kind not in _CALLABLE_TYPES and not isinstance(__obj, Undefined):
            raise TypeError(f"{kind.__name__!r} object is not callable")
        return __context.call(__obj, *args, **kwargs)

    def _call_method(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner, name = method.__self__, method.__name__
        if name not in METHODS.get(type(owner), ()):
            raise SecurityError(f"the method {name!r} is not allowed")
        if name == "join" and args:
            args = (self.meter.to_list(args[0]), *args[1:])
        charge(self.meter, owner, name, (*args, *kwargs.values()))
        return method(*args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charge for `left operator right`, and return the result."""
        _charge_operator(self.meter, operator, left, right)
        return self.binop_table[operator](left, right)

    # Methods that the rewritten syntax tree calls

    def metered_turn(self, steps: int, kept: int) -> None:
        """Charge for one run of a body."""
        self.meter.step(steps)
        self.meter.allocate(kept)

    def metered_test(self) -> bool:
        """Charge for one evaluation of a loop's condition, and return True."""
        self.meter.step()
        self.meter.allocate(96)
        return True

    def metered_operand(self, value: Any) -> Any:
        """Charge for comparing or hashing `value`, and return it."""
        if type(value) is str:
            self.meter.step(len(value) >> 6)
        elif type(value) not in SCALARS:
            self.meter.step(self.meter.weigh(value).steps)
        return value

    def metered_container(self, value: Any) -> Any:
        """Charge for a search in `value`, and return it; an iterator charges for each item instead."""
        if isinstance(value, LazyItems):
            return (self.metered_operand(item) for item in value)
        if isinstance(value, (str, dict)):
            return self.metered_sequence(value)
        return self.metered_operand(value)

    def metered_sequence(self, value: Any) -> Any:
        """Charge for a search for a constant in `value`, and return `value`."""
        if isinstance(value, str):
            self.meter.step(len(value) >> 5)
        elif isinstance(value, (list, tuple, range, *VIEWS)):
            self.meter.step(len(value))
        return value

    def metered_new(self, value: Any) -> Any:
        """Charge for a new list, tuple or dict, and return it."""
        self.meter.weigh(value)
        return value

    def metered_key(self, value: Any) -> Any:
        """Return a dict key after a check of its type, because a template could make hashes of other types collide.

        Raises:
            TemplateRuntimeError: the key is not a string, a small integer, a float, a boolean or None.
        """
        if type(value) is str or type(value) in SCALARS - {int}:
            return value
        if type(value) is int and value.bit_length() < 60:
            return value
        raise jinja2.TemplateRuntimeError(f"a key of type {type(value).__name__} is not allowed")

    def metered_arguments(self, value: Any) -> list[Any]:
        """Charge for unpacking `value` into positional arguments, as in `f(*value)`, and return them."""
        return self.meter.to_list(value)

    def metered_keywords(self, value: Any) -> Any:
        """Charge for unpacking `value` into keyword arguments, as in `f(**value)`, and return `value`."""
        if not isinstance(value, dict):
            raise TypeError(f"argument after ** must be a mapping, not {type(value).__name__!r}")
        self.meter.step(len(value))
        self.meter.allocate(256 + 128 * len(value))
        return value

    def metered_concat(self, *values: Any) -> str:
        """Charge for `a ~ b`, and return the result."""
        return self.meter.join("", [self.meter.to_text(value) for value in values])

    def metered_slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """Charge for `value[start:stop:step]`, and return the result."""
        part = slice(start, stop, step)
        if isinstance(value, (str, list, tuple)):
            count = len(range(*part.indices(len(value))))
            self.meter.step(count >> 3)
            self.meter.allocate(80 + count * (width(value) if isinstance(value, str) else 8))
        return value[part]


# jinja2 adds these arguments to each call.
_JINJA_ARGUMENTS = ("_loop_vars", "_block_vars")


@pass_context
def _print_value(context: Context, value: Any) -> str:
    """Return the text of `{{ value }}`."""
    if type(value) is str:
        return value
    environment: Any = context.environment
    text: str = environment.meter.to_text(value)
    return text


def _charge_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    if not isinstance(left, _OPERANDS) or not isinstance(right, _OPERANDS):
        kinds = f"{type(left).__name__!r} and {type(right).__name__!r}"
        raise TypeError(f"unsupported operand type(s) for {operator}: {kinds}")
    if isinstance(left, str) and operator == "%":
        charge_format(meter, left, right)
    elif isinstance(left, (int, float)) and isinstance(right, (int, float)):
        _check_numbers(operator, left, right)
    elif operator == "+":
        _charge_sum(meter, left, right)
    elif operator == "*":
        _charge_repeat(meter, left, right)


def _check_numbers(operator: str, left: Any, right: Any) -> None:
    check_number(left)
    check_number(right)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else 0
        if operator == "**" and right > 0:
            bits = left.bit_length() * right
        if bits > NUMBER_BITS:
            raise jinja2.TemplateRuntimeError(f"a number grew beyond {NUMBER_BITS} bits")


def _charge_sum(meter: Meter, left: Any, right: Any) -> None:
    if isinstance(left, str) and isinstance(right, str):
        count = len(left) + len(right)
        factor = 6 if isinstance(left, Markup) or isinstance(right, Markup) else 1
        meter.step(factor * count >> 6)
        meter.allocate(80 + factor * count * max(width(left), width(right)))
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        meter.step(len(left) + len(right) >> 3)
        meter.allocate(64 + 8 * (len(left) + len(right)))


def _charge_repeat(meter: Meter, left: Any, right: Any) -> None:
    times, value = (left, right) if isinstance(left, int) else (right, left)
    if isinstance(times, int) and isinstance(value, (str, list, tuple)):
        count = len(value) * max(0, times)
        meter.step(count >> 6)
        meter.allocate(80 + count * (width(value) if isinstance(value, str) else 8))


class FormatMethod:
    """The method `format` or `format_map` of a string."""

    __slots__ = ("_call", "_meter", "_text")

    def __init__(self, sandbox: Sandbox, method: Any) -> None:
        self._call: Any = sandbox.wrap_str_format(method)
        self._meter = sandbox.meter
        self._text: str = method.__self__

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        charge_format(self._meter, self._text, [args, kwargs])
        text: str = self._call(*args, **kwargs)
        return text


# Functions


class TemplateNamespace(Namespace):
    """A namespace that refuses private names, as in transformers."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"a namespace accepts no name that begins with an underscore, such as {name[:100]!r}"
        )


@pass_environment
def _dict(environment: Any, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    if len(args) > 1:
        raise TypeError(f"dict expected at most 1 argument, got {len(args)}")
    pairs = args[0].items() if args and isinstance(args[0], dict) else args[0] if args else ()
    result = {}
    for key, value in environment.meter.to_list(pairs):
        environment.meter.allocate(128)
        result[environment.metered_key(key)] = value
    result.update(kwargs)
    environment.metered_new(result)
    return result


@pass_environment
def _namespace(environment: Any, *args: Any, **kwargs: Any) -> TemplateNamespace:
    attributes = _dict(environment, *args, **kwargs)
    for name in attributes:
        _check_name(name)
    return TemplateNamespace(attributes)


def _range(*args: Any) -> range:
    if any(isinstance(arg, int) and arg.bit_length() > 62 for arg in args):
        raise OverflowError("Range too big")
    return safe_range(*args)


@pass_environment
def _raise_exception(environment: Any, message: Any) -> NoReturn:
    raise TemplateRefusal(environment.meter.to_text(message))


@pass_environment
def _strftime_now(environment: Any, format: Any) -> str:  # noqa: A002  # transformers' name
    if not isinstance(format, str):
        raise TypeError(f"strftime_now expects text, not {type(format).__name__!r}")
    if len(format) > 256 or WIDE.search(format):
        raise jinja2.TemplateRuntimeError("the format of strftime_now is too long")
    return datetime.now().strftime(format)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "cycler": Cycler,
    "dict": _dict,
    "joiner": Joiner,
    "namespace": _namespace,
    "raise_exception": _raise_exception,
    "range": _range,
    "strftime_now": _strftime_now,
}
_CALLABLE_FUNCTIONS = frozenset(FUNCTIONS.values())
_CALLABLE_TYPES = frozenset({BlockReference, FormatMethod, Joiner, LoopContext})
