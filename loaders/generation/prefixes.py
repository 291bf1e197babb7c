"""A radix tree over token ids that stores the keys and values of earlier sequences, so that new prompts can reuse them.

Each node stores a segment of tokens, and copies of the segment's keys and values. The tree has a memory limit, and
evicts the least recently used leaf first. Segments whose arrays are mapped from files are pinned, and do not count
towards the limit.

In the KV cache, the arrays of layers with a sliding window are ring buffers. A prompt can continue from a position only
if the tree stores the whole window before that position. A `Span` records the positions of an array that a segment
stores.

The method is RadixAttention by Zheng et al., SGLang (https://arxiv.org/abs/2312.07104).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import NamedTuple, Protocol
from weakref import ref

import numpy as np

from . import kv_state
from .engine import KVCache
from .kv_state import Span

# The default limit is an eighth of the memory that is available when the first prompt ends, but at most this much.
MAX_DEFAULT_BYTES = 512 << 20
_DEFAULT_SHARE = 8
# An idle KV cache that takes at most this much stays in memory for the next prompt.
_SPARE_BYTES = 128 << 20
# Maximum number of seconds that `capture` waits for the tree's lock before it discards the keys and values.
_LONGEST_WAIT_S = 1.0


class SlotEngine(Protocol):
    """The methods of an engine that the tree uses."""

    def new_cache(self) -> KVCache:
        """Return an empty KV cache."""

    def prefill(self, tokens: Sequence[int], cache: KVCache, *, start: int, slot: int) -> object:
        """Compute the keys and values of tokens, and store them in a slot, starting at position `start`."""

    @property
    def windows(self) -> Mapping[str, int]:
        """The sliding window of each array of the KV cache, in positions; 0 for an array without a window."""

    def slot_views(self, cache: KVCache, slot: int) -> dict[str, np.ndarray] | None:
        """Return writable views of a slot's arrays, by name."""


class Match(NamedTuple):
    """The longest known prefix of a prompt.

    Attributes:
        length: number of tokens in the prefix.
        spans: keys and values of these tokens, as pairs of an array's name and a span.
        checks: functions that raise PrecastError if a file that holds these keys and values was modified.
    """

    length: int
    spans: tuple[tuple[str, Span], ...]
    checks: tuple[Callable[[], None], ...]


class _Node:
    """A segment of tokens that follows the segments of its ancestors.

    Attributes:
        tokens: the segment, int32 [n].
        start: position of its first token.
        spans: keys and values by array. Each span ends at the end of the segment. In an array with a window, a span may
            start later than the segment, and may be empty.
        children: the nodes of the segments that follow, by first token.
        parent: the node of the preceding segment; None for the root. A node refers to its parent weakly, so that a tree
            is freed with its last reference.
        pinned: True for a segment that is never evicted.
        checks: functions that raise PrecastError if a file that holds the segment's keys and values was modified.
    """

    __slots__ = ("__weakref__", "_parent", "checks", "children", "pinned", "spans", "start", "tokens")

    def __init__(
        self,
        tokens: np.ndarray,
        start: int,
        spans: Mapping[str, Span],
        parent: "_Node | None",
        *,
        pinned: bool,
        checks: tuple[Callable[[], None], ...] = (),
    ) -> None:
        self.tokens, self.start, self.spans, self.pinned = tokens, start, spans, pinned
        self.checks = checks
        self.children: dict[int, _Node] = {}
        self.parent = parent
        if parent is not None:
            parent.children[int(tokens[0])] = self

    @property
    def parent(self) -> "_Node | None":
        return None if self._parent is None else self._parent()

    @parent.setter
    def parent(self, node: "_Node | None") -> None:
        self._parent = None if node is None else ref(node)

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    @property
    def bytes(self) -> int:
        """The memory of the node's keys and values, in bytes; 0 for a pinned node."""
        return 0 if self.pinned else sum(span.array.nbytes for span in self.spans.values())


class PrefixTree:
    """The known prefixes of one model and target, with their keys and values.

    Threads may share a tree.

    Args:
        engine: the engine whose KV caches are read and written.
        limit: maximum memory for segments that are not pinned, in bytes; 0 stores no such segments. None uses
            the result of `default_limit` at the end of the first prompt.

    Attributes:
        every_chunk: True if each chunk of a prompt must be captured before the next chunk overwrites it.
    """

    def __init__(self, engine: SlotEngine, limit: int | None = None) -> None:
        self._engine, self._limit = engine, limit
        self._rings = {name: window for name, window in engine.windows.items() if window}
        self.every_chunk = bool(self._rings)
        self._root = _Node(np.empty(0, np.int32), 0, {}, None, pinned=True)
        # Segments that are not pinned, least recently used first. The use of a segment moves the segment and then its
        # ancestors to the end, so the first segment is always a leaf.
        self._recent: OrderedDict[_Node, None] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    @property
    def bytes(self) -> int:
        """The memory of the tree's keys and values, in bytes, without mapped files."""
        return self._bytes

    @property
    def spare_bytes(self) -> int:
        """The scheduler keeps an idle KV cache only if it takes at most this many bytes; 0 if the tree's limit is 0."""
        return 0 if self._limit == 0 else _SPARE_BYTES

    def match(self, tokens: Sequence[int]) -> Match:
        """Return the longest prefix of the tokens that can be restored from the tree."""
        with self._lock:
            path = self._walk(np.asarray(tokens, np.int32))
            length = self._possible_cut(path, sum(count for _, count in path))
            checks = {check: None for node, _ in path if node.start < length for check in node.checks}
            return Match(length, tuple(self._needed(path, length)), tuple(checks))

    def restore(self, tokens: Sequence[int], cache: KVCache, slot: int) -> int:
        """Copy the keys and values of the longest known prefix to a slot's first positions; return the prefix's length.

        Args:
            tokens: a prompt without its last token. The model must read the last token, to compute its logits.
            cache: the KV cache.
            slot: the slot.

        Raises:
            PrecastError: a file with pinned keys and values was modified.
        """
        match = self.match(tokens)
        if match.length:
            kv_state.write(self._views(cache, slot), match.spans)
            for check_unchanged in match.checks:
                check_unchanged()
        return match.length

    def capture(
        self, tokens: Sequence[int], cache: KVCache, slot: int, *, restored: int, written: int = 0
    ) -> None:
        """Copy a slot's keys and values to the tree, except the keys and values that the tree already stores.

        Args:
            tokens: the tokens whose keys and values are in the slot's first positions.
            cache: the KV cache.
            slot: the slot.
            restored: the result of `restore` for this sequence. In arrays with a window, the slot contains only the
                window before position `restored`, and later positions.
            written: number of positions that calls with drafts have filled. It exceeds ``len(tokens)`` if drafts were
                rejected. In arrays with a window, each filled position may have overwritten an earlier position.
        """
        if self._bound() == 0:
            return
        # Time out, because a finaliser that ends a generation may run in the thread that holds the lock.
        if not self._lock.acquire(timeout=_LONGEST_WAIT_S):
            return
        try:
            self._capture(
                np.asarray(tokens, np.int32), self._views(cache, slot), restored, max(written, len(tokens))
            )
        finally:
            self._lock.release()

    def _capture(self, ids: np.ndarray, views: Mapping[str, np.ndarray], restored: int, written: int) -> None:
        path, stop = self._walk(ids), len(ids)
        known = sum(count for _, count in path)
        if known >= stop:
            return
        starts = {}
        for name, view in views.items():
            window = self._rings.get(name, 0)
            intact = max(restored - window + 1, written - view.shape[2]) if window else 0
            starts[name] = min(max(known, intact), stop)
        if kv_state.size(views, starts, stop) <= self._bound():
            try:
                spans = kv_state.read(views, starts, stop)
            except MemoryError:  # drop the prefix, because answers do not depend on it
                return
            self._add(_Node(ids[known:], known, spans, self._end(path), pinned=False))
            self._evict()

    def compute(self, tokens: Sequence[int]) -> dict[str, Span]:
        """Return the keys and values of tokens, by array. The model computes the keys and values that the tree lacks.

        Args:
            tokens: at least one token, and no more than the context length.

        Raises:
            PrecastError: a program fails.
        """
        cache, last = self._engine.new_cache(), len(tokens) - 1
        # The model always computes the last token. `restore` may write one position less than a window, and this token
        # completes the window.
        known = self.restore(tokens[:last], cache, 0)
        self._engine.prefill(tokens[known:], cache, start=known, slot=0)
        windows = self._engine.windows
        starts = {name: max(0, len(tokens) - window) if window else 0 for name, window in windows.items()}
        return kv_state.read(self._views(cache, 0), starts, len(tokens))

    def pin(
        self,
        tokens: Sequence[int],
        spans: Mapping[str, Span],
        check_unchanged: Callable[[], None] = lambda: None,
    ) -> None:
        """Add a prefix that is never evicted.

        Args:
            tokens: the prefix.
            spans: the prefix's keys and values by array, up to the last token. Arrays with a window need only the last
                window.
            check_unchanged: a function that raises PrecastError if the file of the arrays was modified. `restore` calls
                it after each copy from the arrays.
        """
        ids = np.asarray(tokens, np.int32)
        with self._lock:
            path = self._walk(ids)
            parent = self._end(path)
            for node, _ in path[:-1]:
                self._pin(node, spans, check_unchanged)
            if parent is not self._root:
                self._pin(parent, spans, check_unchanged)
            known = parent.stop
            if known < len(ids):
                parts = {name: span.part(known, len(ids)) for name, span in spans.items()}
                _Node(ids[known:], known, parts, parent, pinned=True, checks=(check_unchanged,))

    # --- the tree -----------------------------------------------------------------------------------------------

    def _walk(self, ids: np.ndarray) -> list[tuple[_Node, int]]:
        """Return the segments that match the tokens, each with its number of matching tokens; mark them as used."""
        node, at, path = self._root, 0, list[tuple[_Node, int]]()
        while at < len(ids) and (child := node.children.get(int(ids[at]))) is not None:
            count = _common(child.tokens, ids[at:])
            path.append((child, count))
            at += count
            if count < len(child.tokens):
                break
            node = child
        for used, _ in reversed(path):
            if not used.pinned:
                self._recent.move_to_end(used)
        return path

    def _end(self, path: Sequence[tuple[_Node, int]]) -> _Node:
        """Return the node that ends at the end of a path; split the path's last segment if necessary."""
        if not path:
            return self._root
        node, count = path[-1]
        return node if count == len(node.tokens) else self._split(node, count)

    def _split(self, node: _Node, count: int) -> _Node:
        """Move the first `count` tokens of a segment to a new parent node, and return the new node."""
        assert node.parent is not None
        cut = node.start + count
        # The parts of a mapped array are views. The parts of an array in memory are copies, so that each part can be
        # freed separately.
        copied = _same if node.pinned else _copied
        upper = {name: copied(span.part(span.start, cut)) for name, span in node.spans.items()}
        lower = {name: copied(span.part(cut, span.stop)) for name, span in node.spans.items()}
        first = _Node(
            node.tokens[:count], node.start, upper, node.parent, pinned=node.pinned, checks=node.checks
        )
        if not node.pinned:
            self._recent[first] = None
        node.tokens, node.start, node.spans, node.parent = node.tokens[count:], cut, lower, first
        first.children[int(node.tokens[0])] = node
        return first

    def _pin(self, node: _Node, spans: Mapping[str, Span], check_unchanged: Callable[[], None]) -> None:
        """Pin a segment. Replace each of its arrays with the array in `spans`, if that covers the same positions."""
        self._forget(node)
        given = {name: spans[name].part(node.start, node.stop) for name in node.spans}
        node.spans = {
            name: given[name] if given[name].start <= own.start else own for name, own in node.spans.items()
        }
        is_replaced = all(node.spans[name] is span for name, span in given.items())
        node.checks = (check_unchanged,) if is_replaced else (*node.checks, check_unchanged)
        node.pinned = True

    def _add(self, node: _Node) -> None:
        self._recent[node] = None
        self._bytes += node.bytes
        # Adding a node counts as a use of its ancestors.
        parent = node.parent
        while parent is not None:
            if not parent.pinned:
                self._recent.move_to_end(parent)
            parent = parent.parent

    def _forget(self, node: _Node) -> None:
        if not node.pinned:
            self._bytes -= node.bytes
            del self._recent[node]

    def _evict(self) -> None:
        while self._bytes > self._bound():
            leaf = next(iter(self._recent))
            assert leaf.parent is not None
            self._forget(leaf)
            del leaf.parent.children[int(leaf.tokens[0])]

    def _bound(self) -> int:
        if self._limit is None:
            self._limit = default_limit()
        return self._limit

    def _views(self, cache: KVCache, slot: int) -> dict[str, np.ndarray]:
        views = self._engine.slot_views(cache, slot)
        assert views is not None  # a model has a tree only if the host can access the device's memory
        return views

    # --- arrays with a window -----------------------------------------------------------------------------------

    def _possible_cut(self, path: Sequence[tuple[_Node, int]], length: int) -> int:
        """Return the last position up to `length` whose preceding window the tree stores for every array."""
        known = {name: list(_runs(path, name)) for name in self._rings}
        while length:
            lower = min((_last_cut(known[n], w, length) for n, w in self._rings.items()), default=length)
            if lower == length:
                break
            length = lower
        return length

    def _needed(self, path: Sequence[tuple[_Node, int]], length: int) -> Iterator[tuple[str, Span]]:
        """Yield pairs of an array's name and a span that a slot needs to continue at position `length`."""
        for node, _ in path:
            for name, span in node.spans.items():
                window = self._rings.get(name, 0)
                part = span.part(max(0, length - window) if window else 0, length)
                if len(part.array[0, 0]):
                    yield name, part


def default_limit() -> int:
    """Return the default limit of a tree's memory: 512 MiB, or an eighth of the available memory if that is less."""
    from ..runtime.resources import memory  # a lazy import, because only the first prompt needs it

    available = memory().available
    return MAX_DEFAULT_BYTES if available is None else min(MAX_DEFAULT_BYTES, available // _DEFAULT_SHARE)


def _same(span: Span) -> Span:
    return span


def _copied(span: Span) -> Span:
    return Span(span.start, span.array.copy())


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Return the length of the common prefix of two arrays."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size


def _runs(path: Sequence[tuple[_Node, int]], name: str) -> Iterator[tuple[int, int]]:
    """Yield, in order, the start and stop of each contiguous range of positions that a path stores for one array."""
    begin = end = 0
    for node, count in path:
        start, stop = node.spans[name].start, node.start + count
        if start > end:
            yield begin, end
            begin = start
        end = max(stop, begin)
    yield begin, end


def _last_cut(runs: Sequence[tuple[int, int]], window: int, length: int) -> int:
    """Return the last position up to `length` whose preceding window lies in a single run; 0 if no position has one."""
    for begin, end in reversed(runs):
        end = min(end, length)
        if end > begin and (begin == 0 or end - begin >= window - 1):
            return end
    return 0
