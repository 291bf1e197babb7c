"""Copy keys and values between the slots of a KV cache and arrays on the host.

For n positions, the arrays of a slot have the shape ``[L, K, n, H]``, or ``[L, K, n]`` for scales. Their elements are
bit patterns, stored in unsigned integers of the same width as the cache's type. NumPy has no bfloat16, and copies
integers faster than the types of extension packages.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from threading import Thread
from typing import NamedTuple

import numpy as np

from ..artifact.manifest import DTYPE_BYTES, CacheArray

# The axes of a slot's arrays, in order.
_AXES = "LKSH"
# Minimum size of a copy that uses several threads. One thread copies this much in about a millisecond.
_ONE_THREAD_BYTES = 4 << 20
_THREADS = 2

_Pair = tuple[np.ndarray, np.ndarray]


class Span(NamedTuple):
    """Consecutive positions of one array of a slot.

    Attributes:
        start: the first position.
        array: the bit patterns, [L, K, n, H] or [L, K, n].
    """

    start: int
    array: np.ndarray

    @property
    def stop(self) -> int:
        """The position after the last position of the span."""
        return self.start + len(self.array[0, 0])

    def part(self, start: int, stop: int) -> "Span":
        """Return a view of the part of the span from position `start` to `stop`, exclusive; the part may be empty."""
        stop = min(stop, self.stop)
        start = min(max(start, self.start), stop)
        # If the range ends before the span begins, the part is empty and starts at `stop`.
        return Span(start, self.array[:, :, max(start - self.start, 0) : max(stop - self.start, 0)])


def bits(dtype: str) -> np.dtype:
    """Return the unsigned integer type for the bit patterns of `dtype`, which is a key of `DTYPE_BYTES`."""
    return np.dtype(f"<u{DTYPE_BYTES[dtype]}")


def slot_view(memory: np.ndarray, array: CacheArray, layout: Sequence[int], slot: int) -> np.ndarray:
    """Return one slot of a cache array as a view [L, K, S, H] or [L, K, S].

    Args:
        memory: the array's bytes, uint8.
        array: the array's description.
        layout: the array's axes in memory order, from the largest stride to the smallest.
        slot: the slot.
    """
    physical = memory.view(bits(array.dtype)).reshape([array.shape[axis] for axis in layout])
    letters = [array.axes[axis] for axis in layout]
    one = physical[tuple(slot if letter == "B" else slice(None) for letter in letters)]
    letters.remove("B")
    return one.transpose([letters.index(letter) for letter in _AXES if letter in letters])


def size(views: Mapping[str, np.ndarray], starts: Mapping[str, int], stop: int) -> int:
    """Return the number of bytes that `read` copies; the arguments are those of `read`."""
    return sum(view[:, :, :1].nbytes * (stop - starts[name]) for name, view in views.items())


def read(views: Mapping[str, np.ndarray], starts: Mapping[str, int], stop: int) -> dict[str, Span]:
    """Copy a range of positions of a slot to new arrays, and return them as spans, by array.

    Args:
        views: the slot's arrays, as returned by `Engine.slot_views`.
        starts: the first position to copy, by array.
        stop: the position after the last one to copy, the same for all arrays.
    """
    spans = {}
    for name, view in views.items():
        shape = (*view.shape[:2], stop - starts[name], *view.shape[3:])
        spans[name] = Span(starts[name], np.empty(shape, view.dtype))
    _copy([(there, here) for name, span in spans.items() for here, there in _pairs(views[name], span)])
    return spans


def write(views: Mapping[str, np.ndarray], spans: Iterable[tuple[str, Span]]) -> None:
    """Copy spans to a slot.

    Args:
        views: the slot's arrays, as returned by `Engine.slot_views`.
        spans: pairs of an array's name and a span to copy to that array. No span may be longer than the array.
    """
    _copy([pair for name, span in spans for pair in _pairs(views[name], span)])


def _pairs(view: np.ndarray, span: Span) -> Iterator[_Pair]:
    """Yield pairs of views of the same positions: a view of a slot's array, and a view of a span.

    An array with a window is a ring buffer of S positions, in which position p is at index p mod S.
    """
    size, at = view.shape[2], span.start
    while at < span.stop:
        index = at % size
        count = min(size - index, span.stop - at)
        yield view[:, :, index : index + count], span.part(at, at + count).array
        at += count


def _copy(pairs: Sequence[_Pair]) -> None:
    """Copy the second array of each pair to the first. Large copies use several threads."""
    if sum(source.nbytes for _, source in pairs) < _ONE_THREAD_BYTES:
        _copy_layers(pairs, 0)
        return
    threads = [Thread(target=_copy_layers, args=(pairs, i, _THREADS)) for i in range(1, _THREADS)]
    try:
        for thread in threads:
            thread.start()
        _copy_layers(pairs, 0, _THREADS)
    finally:
        # After Ctrl-C, the KV cache may be freed, so no thread may continue to write to it.
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _copy_layers(pairs: Sequence[_Pair], first: int, step: int = 1) -> None:
    for target, source in pairs:
        target[first::step] = source[first::step]
