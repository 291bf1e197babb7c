"""The methods and attributes that a chat template may use, and the cost of each method call.

The sandbox refuses all other names, including methods that future versions of Python add.
Importing this module imports jinja2.
"""

from collections.abc import Callable
from typing import Any

from jinja2.filters import _GroupTuple
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.utils import Cycler, Joiner
from markupsafe import Markup

from .chat_meter import ITEMS, KEYS, VALUES, Meter, size, width

Cost = tuple[int, int]
"""The cost of a call: bytes allocated, and steps."""
CostOf = Callable[[Meter, Any, tuple[Any, ...]], Cost]
"""A function that returns the cost of a method call from the meter, the method's object, and all arguments."""

_SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
# Bytes of a string in a list without the string's characters: the object's header and the list's pointer.
_PIECE = 104


def _text(args: tuple[Any, ...], index: int) -> str:
    return args[index] if len(args) > index and isinstance(args[index], str) else ""


def _number(args: tuple[Any, ...], index: int, default: int) -> int:
    return args[index] if len(args) > index and isinstance(args[index], int) else default


def _longest(args: tuple[Any, ...]) -> int:
    return max((len(arg) for arg in args if isinstance(arg, str)), default=0)


# Text


def _copy(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    return size(text), len(text) >> 6


def _constant(meter: Meter, owner: Any, args: tuple[Any, ...]) -> Cost:
    return 256, 1


def _fold(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    if text.isascii():
        return size(text), len(text) >> 6
    return _title(meter, text, args)


def _title(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    # One character may become three characters of four bytes each. The interpreter's buffer needs the same size again.
    return 80 + 24 * len(text), len(text) >> 2


def _classify(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    return 0, len(text) >> 3


def _strip(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    """Return the cost of comparing each character with the characters to remove."""
    return size(text), len(text) * max(1, _longest(args)) >> 6


def _search(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    return 0, len(text) + _longest(args) >> 5


def _search_back(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    # Unlike a forward search, a backward search may take time proportional to the product of both lengths.
    return 0, (len(text) >> 5) + (len(text) * _longest(args) >> 7)


def _pieces(text: str, separator: str, most: int) -> Cost:
    count = text.count(separator) if separator else sum(map(text.count, _SPACES))
    count = 1 + (count if most < 0 else min(count, most))
    return size(text) + _PIECE * count, (len(text) >> 4) + count


def _split(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    return _pieces(text, _text(args, 0), _number(args, 1, -1))


def _split_back(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    allocated, steps = _split(meter, text, args)
    return allocated, steps + _search_back(meter, text, args)[1]


def _partition(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    return size(text) + 3 * _PIECE, len(text) >> 5


def _partition_back(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    return size(text) + 3 * _PIECE, _search_back(meter, text, args)[1]


def lines_cost(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    """Return the cost of splitting a text into lines, counting every character that may end a line."""
    count = 1 + sum(map(text.count, _LINE_ENDS))
    return size(text) + _PIECE * count, (len(text) >> 4) + count


def _pad(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    count = max(len(text), _number(args, 0, 0))
    return 80 + count * max(width(text), width(_text(args, 1))), count >> 6


def _tabs(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    count = len(text) + text.count("\t") * max(0, _number(args, 0, 8))
    return 80 + count * width(text), count >> 4


def replace_cost(meter: Meter, text: str, args: tuple[Any, ...]) -> Cost:
    """Return the cost of a replacement. The number of occurrences determines the size of the result."""
    old, new, most = _text(args, 0), _text(args, 1), _number(args, 2, -1)
    places = text.count(old)
    places = places if most < 0 else min(places, most)
    count = len(text) + places * max(0, len(new) - len(old))
    # If the result needs more bytes per character than the text, `str.replace` first widens the text.
    return 80 + (count + len(text)) * max(width(text), width(new)), places + (len(text) >> 4) + (count >> 6)


def _join(meter: Meter, separator: str, args: tuple[Any, ...]) -> Cost:
    texts = [item for item in args[0] if isinstance(item, str)] if args else []
    count = sum(map(len, texts)) + len(separator) * len(texts)
    return 80 + count * max(map(width, (separator, *texts))), len(texts) + (count >> 6)


# Lists, dicts and numbers


def _find_item(meter: Meter, owner: Any, args: tuple[Any, ...]) -> Cost:
    """Return the cost of a comparison with every item, and of the error text that prints a missing item."""
    wanted = meter.weigh(args)
    return wanted.printed * wanted.width, meter.weigh(owner).steps + wanted.steps


def _copy_list(meter: Meter, owner: Any, args: tuple[Any, ...]) -> Cost:
    return 64 + 8 * len(owner), len(owner)


def _copy_dict(meter: Meter, owner: Any, args: tuple[Any, ...]) -> Cost:
    return 256 + 128 * len(owner), len(owner)


def _look_up(meter: Meter, owner: Any, args: tuple[Any, ...]) -> Cost:
    """Return the cost of hashing the key."""
    return 0, 1 if args and type(args[0]) is str else meter.weigh(args).steps


def _compare(meter: Meter, owner: Any, args: tuple[Any, ...]) -> Cost:
    return 256, meter.weigh(args).steps


_TEXT_METHODS: dict[str, CostOf] = {
    **dict.fromkeys(("lower", "upper", "casefold"), _fold),
    **dict.fromkeys(("title", "capitalize", "swapcase"), _title),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _strip),
    **dict.fromkeys(("removeprefix", "removesuffix"), _copy),
    **dict.fromkeys(("find", "index", "count", "startswith", "endswith"), _search),
    **dict.fromkeys(("rfind", "rindex"), _search_back),
    "split": _split,
    "rsplit": _split_back,
    "partition": _partition,
    "rpartition": _partition_back,
    "splitlines": lines_cost,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _pad),
    "expandtabs": _tabs,
    "replace": replace_cost,
    "join": _join,
    **dict.fromkeys(
        (
            *(
                "isalnum",
                "isalpha",
                "isascii",
                "isdecimal",
                "isdigit",
                "isidentifier",
                "islower",
                "isnumeric",
            ),
            *("isprintable", "isspace", "istitle", "isupper"),
        ),
        _classify,
    ),
}
_NUMBER_METHODS: dict[str, CostOf] = dict.fromkeys(("as_integer_ratio", "conjugate", "is_integer"), _constant)
_INTEGER_METHODS: dict[str, CostOf] = {
    **_NUMBER_METHODS,
    **dict.fromkeys(("bit_count", "bit_length"), _constant),
}
_SEQUENCE_METHODS: dict[str, CostOf] = {"count": _find_item, "index": _find_item}

METHODS: dict[type, dict[str, CostOf]] = {
    str: _TEXT_METHODS,
    Markup: _TEXT_METHODS,
    int: _INTEGER_METHODS,
    bool: _INTEGER_METHODS,
    float: {**_NUMBER_METHODS, "hex": _constant},
    list: {**_SEQUENCE_METHODS, "copy": _copy_list},
    tuple: _SEQUENCE_METHODS,
    _GroupTuple: _SEQUENCE_METHODS,
    range: _SEQUENCE_METHODS,
    dict: {
        **dict.fromkeys(("items", "keys", "values"), _constant),
        "get": _look_up,
        "copy": _copy_dict,
    },
    LoopContext: {"cycle": _constant, "changed": _compare},
    Cycler: dict.fromkeys(("next", "reset"), _constant),
}

# Attributes that a template may read, in addition to the names in METHODS.
_DATA: dict[type, tuple[str, ...]] = {
    str: ("format", "format_map"),
    Markup: ("format", "format_map"),
    **dict.fromkeys((int, bool), ("denominator", "imag", "numerator", "real")),
    float: ("imag", "real"),
    range: ("start", "step", "stop"),
    _GroupTuple: ("grouper", "list"),
    LoopContext: (
        *("depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem"),
        *("revindex", "revindex0"),
    ),
    Cycler: ("current", "items", "pos"),
    Joiner: ("sep", "used"),
    Macro: ("arguments", "caller", "catch_kwargs", "catch_varargs", "explicit_caller", "name"),
    BlockReference: ("name", "super"),
    **dict.fromkeys((KEYS, VALUES, ITEMS), ()),
}

ATTRIBUTES: dict[type, frozenset[str]] = {
    kind: frozenset((*METHODS.get(kind, ()), *_DATA.get(kind, ()))) for kind in (*METHODS, *_DATA)
}
"""The attributes that a template may read, by type. A template may read no attribute of any other type."""


def charge(meter: Meter, owner: Any, name: str, args: tuple[Any, ...]) -> None:
    """Charge for a call of a method in `METHODS` before it runs."""
    texts = [value for value in (owner, *args) if isinstance(value, str)]
    meter.step(1 + (sum(map(len, texts)) >> 5))  # computing the cost reads the texts
    allocated, steps = METHODS[type(owner)][name](meter, owner, args)
    # Markup escapes the text that it is combined with, and one escaped character may need five characters.
    factor = 6 if isinstance(owner, Markup) else 1
    meter.step(factor * steps)
    meter.allocate(factor * allocated)
