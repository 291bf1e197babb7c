"""Meter the work, the memory and the time of one rendering of a chat template.

Work is counted in steps. A step is, for example, the evaluation of one node or a visit to one item. An operation is
charged before it runs: the meter adds the operation's steps and the bytes that it will allocate to its totals, and
raises `LimitExceeded` if a total exceeds its limit. The cost of an operation often depends on the weight of a value.
The weight is the size of the value, in which a shared part counts each time that it occurs.

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
    """The limits of compiling and rendering a template. Published templates stay far below them."""

    source: int = 1 << 17
    """Characters of the template."""
    nodes: int = 20_000
    """Nodes of the template's syntax tree."""
    tables: int = 500_000
    """Number of names, multiplied by the number of conditions, loops and macros."""
    code: int = 400_000
    """Characters of the Python code that jinja2 generates from the template."""
    steps: int = 20_000_000
    """Nodes evaluated and items visited in one rendering; copying 64 characters counts as one step."""
    operation: int = 2_000_000
    """Steps of one operation that Ctrl-C cannot interrupt. The limit corresponds to about 0.2 seconds."""
    allocated: int = 1 << 27
    """Bytes of text and lists allocated in one rendering, including bytes that are freed before its end."""
    depth: int = 100
    """Levels of lists within lists."""
    output: int = 1 << 24
    """Characters of the prompt."""
    seconds: float = 2.0
    """CPU time of the thread for one compilation or one rendering. Time spent waiting for a CPU does not count."""
    wall_seconds: float = 60.0
    """Wall-clock time for one compilation or one rendering. It limits the wait on a machine that swaps."""

    def for_probe(self) -> "Limits":
        """Return the limits for rendering one short message. They allow too few steps to reach the time limit."""
        steps = min(self.steps, 500_000)
        allocated = min(self.allocated, 1 << 24)
        return replace(self, steps=steps, operation=min(self.operation, steps), allocated=allocated)


class LimitExceeded(Exception):
    """A template exceeded a limit. jinja2 never catches this exception while rendering."""


class Weight:
    """The size of a value. A part that occurs several times counts each time that it occurs."""

    __slots__ = ("depth", "items", "opaque", "other", "text", "width")

    def __init__(self) -> None:
        self.items = 1
        self.text = 0  # characters of its strings
        self.width = 1  # bytes of the widest character
        self.other = 0  # characters of its numbers and other small values when printed
        self.depth = 0
        self.opaque = ""  # type of a part that cannot be printed; empty if all parts can be printed

    def add(self, part: "Weight") -> None:
        """Add the weight of a part."""
        self.items += part.items
        self.text += part.text
        self.other += part.other
        self.width = max(self.width, part.width)
        self.depth = max(self.depth, part.depth + 1)
        self.opaque = self.opaque or part.opaque

    @property
    def steps(self) -> int:
        """Return the number of steps that comparing, hashing or copying the value takes."""
        return self.items + (self.text >> 6)

    @property
    def printed(self) -> int:
        """Return the maximum length of the value's `repr` or JSON.

        An escape takes 6 characters, or 12 for a character beyond U+FFFF.
        """
        return self.text * (12 if self.width == 4 else 6) + self.other + 8 * self.items


def width(text: str) -> int:
    """Return an upper bound on the bytes that each character of `text` occupies in memory."""
    if text.isascii():
        return 1
    size = sys.getsizeof(text)  # too large if the text has a cached encoding
    return 4 if size >= 76 + 4 * len(text) else 2 if size >= 74 + 2 * len(text) else 1


def size(text: str) -> int:
    """Return an upper bound on the bytes that a copy of `text` occupies."""
    return 80 + len(text) * width(text)


class Meter:
    """The resources that one rendering has used."""

    # Steps between two checks of the clocks: about a millisecond.
    _INTERVAL = 10_000

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._steps = 0
        self._next_check = 0
        self._allocated = 0
        self._cpu_deadline = time.thread_time() + limits.seconds
        self._wall_deadline = time.monotonic() + limits.wall_seconds
        # The weights of containers, by id. The stored reference keeps a container alive, because Python reuses the ids
        # of freed objects.
        self._weights: dict[int, tuple[Any, Weight]] = {}

    def step(self, count: int = 1) -> None:
        """Charge the steps of an operation before it runs."""
        self._steps += count
        if self._steps > self._next_check:
            self._check(count)

    def _check(self, count: int) -> None:
        limits = self.limits
        if count > limits.operation:
            raise LimitExceeded(f"one operation would take more than {limits.operation:,} steps")
        if self._steps > limits.steps:
            raise LimitExceeded(f"it took more than {limits.steps:,} steps")
        self.check_time()
        self._next_check = min(self._steps + self._INTERVAL, limits.steps)

    def check_time(self) -> None:
        """Check both time limits. Call this method from the thread that created the meter.

        Raises:
            LimitExceeded: the CPU time or the wall-clock time exceeds its limit.
        """
        if time.thread_time() > self._cpu_deadline:
            raise LimitExceeded(f"it took more than {self.limits.seconds:g} seconds of CPU time")
        if time.monotonic() > self._wall_deadline:
            raise LimitExceeded(f"it took longer than {self.limits.wall_seconds:g} seconds")

    def allocate(self, count: int, temporary: int = 0) -> None:
        """Charge the bytes that an operation will allocate.

        Args:
            count: bytes of the result.
            temporary: further bytes, which the operation frees before it ends.
        """
        self._allocated += count
        if self._allocated + temporary > self.limits.allocated:
            raise LimitExceeded(f"it allocated more than {self.limits.allocated:,} bytes of text and lists")

    def release(self) -> None:
        """Release the values of this rendering."""
        self._weights.clear()  # a stored error may keep this meter alive
        # jinja2's objects form reference cycles. Python starts a collection after a number of allocations, regardless
        # of their size.
        if self._allocated > self.limits.allocated >> 2:
            gc.collect()

    # Weighing

    def weigh(self, value: Any) -> Weight:
        """Return the weight of any value. The time is proportional to the memory that the value occupies."""
        return self._weigh(value, 0)

    def _weigh(self, value: Any, level: int) -> Weight:
        children, count = _children(value)
        if children is None:
            return _leaf(value)
        if (known := self._weights.get(id(value))) is not None:
            return known[1]
        if level > self.limits.depth:
            raise LimitExceeded(f"it nested lists more than {self.limits.depth} deep")
        self.step(2 * count)
        self.allocate(256 + 8 * count)
        weight = self._sum(children, level)
        if weight.depth > self.limits.depth:
            raise LimitExceeded(f"it nested lists more than {self.limits.depth} deep")
        if weight.steps > self.limits.operation:
            raise LimitExceeded(f"a nested list has more than {self.limits.operation:,} items")
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

    def to_text(self, value: Any) -> str:
        """Charge for `str(value)`, and return it."""
        if type(value) is str:
            return value
        if isinstance(value, str):
            self.allocate(size(value))
            return str(value)
        weight = self.weigh(value)
        if weight.opaque:
            raise jinja2.TemplateRuntimeError(f"a value of type {weight.opaque} cannot become text")
        self.step(weight.printed >> 5)
        self.allocate(80 + weight.printed * weight.width)
        return str(value)

    def join(self, separator: str, texts: list[str]) -> str:
        """Charge for `separator.join(texts)`, and return it."""
        count, widest = 0, width(separator)
        for text in texts:
            count += len(text)
            if not text.isascii():
                widest = max(widest, width(text))
        count += len(separator) * len(texts)
        self.step(len(texts) + (count >> 6))
        self.allocate(80 + count * widest)
        return separator.join(texts)

    def to_list(self, value: Any) -> list[Any]:
        """Charge for `list(value)`, and return it."""
        if isinstance(value, (str, list, tuple, dict, range, *VIEWS)):
            self.step(len(value))
            self.allocate(64 + len(value) * _item_size(value))
            return list(value)
        items = []
        for item in value:
            self.step()
            self.allocate(96)
            items.append(item)
        return items


def _children(value: Any) -> tuple[Iterable[Any] | None, int]:
    """Return the parts of a container and their number, or None and 0 for any other value."""
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
    """Return the bytes for each item of `list(value)`: a pointer, plus the item itself if `list` creates the item."""
    if isinstance(value, str):
        return 8 if value.isascii() else 88
    return 88 if isinstance(value, (range, ITEMS)) else 8


class LazyItems:
    """The iterator of a lazy filter. It charges for each item."""

    __slots__ = ("_items", "_meter")

    def __init__(self, meter: Meter, items: Iterable[Any]) -> None:
        meter.allocate(1024)
        self._meter = meter
        self._items = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._meter.step()
        self._meter.allocate(96)
        return next(self._items)
