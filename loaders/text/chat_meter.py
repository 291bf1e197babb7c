"""Count the work, the memory and the time of one rendering of a chat template.

Importing this module imports jinja2.
"""

import gc
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import jinja2
from jinja2.runtime import Undefined

from ..artifact.frozen import Frozen

_dict_views: dict[str, Any] = {}
KEYS, VALUES, ITEMS = type(_dict_views.keys()), type(_dict_views.values()), type(_dict_views.items())
VIEWS = (KEYS, VALUES, ITEMS)
SCALARS = frozenset({int, float, bool, type(None)})


class Limits(Frozen):
    """The limits of one rendering; real templates stay far below."""

    source: int = 1 << 17
    """Characters of the template."""
    nodes: int = 20_000
    """Nodes of its syntax tree."""
    tables: int = 500_000
    """Names times conditions, loops and macros."""
    code: int = 400_000
    """Characters of the Python code that the template becomes."""
    steps: int = 20_000_000
    """Nodes evaluated and items visited in one rendering; 64 characters copied count as one."""
    operation: int = 2_000_000
    """Steps of one operation inside the interpreter, where Ctrl-C waits: 0.2 seconds at most."""
    made: int = 1 << 27
    """Bytes of text and lists made in one rendering, whether they are kept or not."""
    depth: int = 100
    """Lists within lists."""
    output: int = 1 << 24
    """Characters of the prompt."""
    seconds: float = 2.0
    """Time for one compilation, and for one rendering."""

    def for_probe(self) -> "Limits":
        """Return the limits of a rendering of one short message. They do not depend on how busy the machine is."""
        steps = min(self.steps, 500_000)
        return replace(self, steps=steps, operation=min(self.operation, steps), made=min(self.made, 1 << 24))


class OverLimit(Exception):
    """A template reached a limit. jinja2 never catches this exception while rendering."""


class Weight:
    """The size of a value, counting a shared part every time it occurs."""

    __slots__ = ("depth", "items", "opaque", "other", "text", "width")

    def __init__(self) -> None:
        self.items = 1
        self.text = 0  # characters of its strings
        self.width = 1  # bytes of the widest character
        self.other = 0  # characters of its numbers and other small values, printed
        self.depth = 0
        self.opaque = ""  # the type of a part that cannot be printed

    def add(self, part: "Weight") -> None:
        self.items += part.items
        self.text += part.text
        self.other += part.other
        self.width = max(self.width, part.width)
        self.depth = max(self.depth, part.depth + 1)
        self.opaque = self.opaque or part.opaque

    @property
    def steps(self) -> int:
        """Return the steps that comparing, hashing or copying takes."""
        return self.items + (self.text >> 6)

    @property
    def printed(self) -> int:
        """Return an upper bound of the characters in `repr` or JSON: an escape takes 6, for an astral character 12."""
        return self.text * (12 if self.width == 4 else 6) + self.other + 8 * self.items


def width(text: str) -> int:
    """Return the bytes that a character of `text` takes in memory."""
    if text.isascii():
        return 1
    size = sys.getsizeof(text)  # getsizeof also counts a cached encoding, so this is an upper bound
    return 4 if size >= 76 + 4 * len(text) else 2 if size >= 74 + 2 * len(text) else 1


def size(text: str) -> int:
    """Return the bytes that a copy of `text` takes."""
    return 80 + len(text) * width(text)


class Meter:
    """The resources that one rendering has used."""

    # Steps between two checks of the clock: about a millisecond.
    _INTERVAL = 10_000

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._steps = 0
        self._next_look = 0
        self._made = 0
        self._end = time.monotonic() + limits.seconds
        # Each container is weighed once. It is kept alive here, because Python reuses the ids of dead objects.
        self._weights: dict[int, tuple[Any, Weight]] = {}

    def step(self, count: int = 1) -> None:
        """Charge the steps of an operation before it runs."""
        self._steps += count
        if self._steps > self._next_look:
            self._check(count)

    def _check(self, count: int) -> None:
        limits = self.limits
        if count > limits.operation:
            raise OverLimit(f"one operation would take more than {limits.operation:,} steps")
        if self._steps > limits.steps:
            raise OverLimit(f"it took more than {limits.steps:,} steps")
        self.look()
        self._next_look = min(self._steps + self._INTERVAL, limits.steps)

    def look(self) -> None:
        """Check the clock."""
        if time.monotonic() > self._end:
            raise OverLimit(f"it took longer than {self.limits.seconds:g} seconds")

    def make(self, count: int, spare: int = 0) -> None:
        """Charge bytes before they are allocated; `spare` bytes are freed when the operation ends."""
        self._made += count
        if self._made + spare > self.limits.made:
            raise OverLimit(f"it made more than {self.limits.made:,} bytes of text and lists")

    def end(self) -> None:
        """Let go of the values: an error that somebody keeps may hold this meter, and objects of jinja2 are cycles."""
        self._weights.clear()
        if (
            self._made > self.limits.made >> 2
        ):  # Python counts objects before it collects cycles, not their bytes
            gc.collect()

    # Weighing

    def weigh(self, value: Any) -> Weight:
        """Return the weight of any value, in time proportional to its parts in memory."""
        return self._weigh(value, 0)

    def _weigh(self, value: Any, level: int) -> Weight:
        children, count = _children(value)
        if children is None:
            return _leaf(value)
        if (known := self._weights.get(id(value))) is not None:
            return known[1]
        if level > self.limits.depth:
            raise OverLimit(f"it put lists into lists, more than {self.limits.depth} deep")
        self.step(2 * count)
        self.make(256 + 8 * count)
        weight = self._sum(children, level)
        if weight.depth > self.limits.depth:
            raise OverLimit(f"it put lists into lists, more than {self.limits.depth} deep")
        if weight.steps > self.limits.operation:
            raise OverLimit(f"a list of its lists holds more than {self.limits.operation:,} items")
        self._weights[id(value)] = value, weight
        return weight

    def _sum(self, children: Iterable[Any], level: int) -> Weight:
        weight = Weight()
        items = text = other = 0
        widest = 1
        for child in children:
            kind = type(child)
            items += 1
            if kind is str:
                text += len(child)
                if not child.isascii():
                    widest = max(widest, width(child))
            elif kind is int:
                other += 24 + child.bit_length()
            else:
                weight.add(self._weigh(child, level + 1))
                items -= 1
        weight.items += items
        weight.text += text
        weight.other += other
        weight.width = max(weight.width, widest)
        return weight

    # Text and lists

    def text(self, value: Any) -> str:
        """Return `str(value)`."""
        if type(value) is str:
            return value
        if isinstance(value, str):
            self.make(size(value))
            return str(value)
        weight = self.weigh(value)
        if weight.opaque:
            raise jinja2.TemplateRuntimeError(f"a value of type {weight.opaque} cannot become text")
        self.step(weight.printed >> 5)
        self.make(80 + weight.printed * weight.width)
        return str(value)

    def joined(self, separator: str, texts: list[str]) -> str:
        """Join texts into one."""
        count, widest = 0, width(separator)
        for text in texts:
            count += len(text)
            if not text.isascii():
                widest = max(widest, width(text))
        count += len(separator) * len(texts)
        self.step(len(texts) + (count >> 6))
        self.make(80 + count * widest)
        return separator.join(texts)

    def listed(self, value: Any) -> list[Any]:
        """Return `list(value)`."""
        if isinstance(value, (str, list, tuple, dict, range, *VIEWS)):
            self.step(len(value))
            self.make(64 + len(value) * _item_size(value))
            return list(value)
        made = []
        for item in value:
            self.step()
            self.make(96)
            made.append(item)
        return made


def _children(value: Any) -> tuple[Iterable[Any] | None, int]:
    """Return the parts of a container and their number; None if the value is not a container."""
    if isinstance(value, (list, tuple)):
        return value, len(value)
    if isinstance(value, dict):
        return chain(value, value.values()), 2 * len(value)
    if isinstance(value, ITEMS):
        return chain(value.mapping, value.mapping.values()), 3 * len(value)
    if isinstance(value, (KEYS, VALUES)):
        return value, len(value)
    return None, 0


def _leaf(value: Any) -> Weight:
    weight = Weight()
    if isinstance(value, str):
        weight.text, weight.width = len(value), width(value)
    elif isinstance(value, int):
        weight.other = 24 + value.bit_length()
    elif isinstance(value, range):
        weight.other = 24 + sum(part.bit_length() for part in (value.start, value.stop, value.step))
    elif value is None or isinstance(value, (float, Undefined)):
        weight.other = 24
    else:
        weight.opaque = type(value).__name__
    return weight


def _item_size(value: Any) -> int:
    """Return the bytes of a list per item: a pointer, plus the item itself if it is created for the list."""
    if isinstance(value, str):
        return 8 if value.isascii() else 88
    return 88 if isinstance(value, (range, ITEMS)) else 8


class Lazy:
    """A lazy filter's iterator, charged item by item."""

    __slots__ = ("_items", "_meter")

    def __init__(self, meter: Meter, items: Iterable[Any]) -> None:
        meter.make(1024)
        self._meter = meter
        self._items = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._meter.step()
        self._meter.make(96)
        return next(self._items)
