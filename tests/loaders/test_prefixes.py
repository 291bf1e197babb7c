"""The prefix tree restores the keys and values that the model computed, for any prompts, cuts and evictions."""

import gc
import hashlib
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.manifest import CacheArray
from precast.loaders.generation import kv_state, prefixes
from precast.loaders.generation.kv_state import Span
from precast.loaders.generation.prefixes import PrefixTree

CONTEXT, LAYERS, HEADS, WIDTH = 48, 2, 2, 3
CHUNK = 5
# The window, and the length of the ring: at least the window plus the largest chunk minus 1.
RINGS = {"cache.window_4.keys": (4, 8), "cache.window_7.keys": (7, 11)}


class FakeEngine:
    """KV caches of two slots whose contents at a position depend on all tokens up to it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.windows = {name: RINGS.get(name, (0, CONTEXT))[0] for name in names}
        self.sizes = {name: RINGS.get(name, (0, CONTEXT))[1] for name in names}

    def new_cache(self):
        random = np.random.default_rng(0)  # unwritten positions contain random values
        shape = {n: (LAYERS, 2, HEADS, s, WIDTH)[: 4 if "scale" in n else 5] for n, s in self.sizes.items()}
        return SimpleNamespace(
            arrays={name: random.integers(0, 1 << 16, s).astype(np.uint16) for name, s in shape.items()}
        )

    def slot_views(self, cache, slot):
        return {name: array[:, slot] for name, array in cache.arrays.items()}

    def read(self, tokens, cache, slot, start) -> None:
        """Write the values that a model computes for the tokens, at the positions ``start …``."""
        for name, view in self.slot_views(cache, slot).items():
            for position in range(start, len(tokens)):
                view[:, :, position % view.shape[2]] = expected(name, tokens[: position + 1], view[:, :, 0])


def expected(name: str, tokens: Sequence[int], like: np.ndarray) -> np.ndarray:
    return computed(name, bytes(tokens), like.size).reshape(like.shape)


@cache
def computed(name: str, tokens: bytes, size: int) -> np.ndarray:
    return np.frombuffer(hashlib.shake_128(name.encode() + tokens).digest(size * 2), np.uint16)


def check(engine: FakeEngine, tokens, cache, slot) -> None:
    """Check the positions of a slot that the next token attends to."""
    for name, view in engine.slot_views(cache, slot).items():
        window = engine.windows[name]
        for position in range(max(0, len(tokens) - window + 1) if window else 0, len(tokens)):
            found = view[:, :, position % view.shape[2]]
            np.testing.assert_array_equal(found, expected(name, tokens[: position + 1], found))


def recount(tree: PrefixTree) -> int:
    """Check the tree's structure, and return the memory that the tree takes."""
    total, left = 0, [tree._root]
    unpinned = 0
    while left:
        node = left.pop()
        assert node is tree._root or len(node.tokens) > 0
        for first, child in node.children.items():
            assert child.parent is node
            assert child.start == node.stop
            assert first == child.tokens[0]
            assert set(child.spans) == set(tree._engine.windows)
            assert not child.pinned or node.pinned
            left.append(child)
        total += node.bytes
        unpinned += not node.pinned
    assert unpinned == len(tree._recent)
    return total


def play(
    tree: PrefixTree,
    engine: FakeEngine,
    prompt: list[int],
    answer: list[int],
    slot: int,
    *,
    rejected: int = 0,
) -> int:
    """Compute a prompt in chunks after its prefix, then decode an answer; return the length of the prefix.

    Rejected drafts are written after the answer.
    """
    cache = engine.new_cache()
    length = tree.restore(prompt[:-1], cache, slot)
    assert length < len(prompt)
    check(engine, prompt[:length], cache, slot)
    for at in range(length, len(prompt), CHUNK):
        engine.read(prompt[: at + CHUNK], cache, slot, at)
        tree.capture(prompt[: at + CHUNK], cache, slot, restored=length)
    tokens = prompt + answer
    engine.read(tokens, cache, slot, len(prompt))
    engine.read(tokens + [9] * rejected, cache, slot, len(tokens))
    tree.capture(tokens, cache, slot, restored=length, written=len(tokens) + rejected)
    assert recount(tree) == tree.bytes
    return length


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=30)
NAMES = ("cache.keys", "cache.key_scale", *RINGS)
POSITION = LAYERS * HEADS * 2  # size in bytes of a position's scales


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(PROMPTS, st.integers(0, 1), st.integers(0, 15), st.integers(0, CHUNK - 1), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 90),
    st.sampled_from([NAMES[:2], NAMES[2:], NAMES]),
)
def test_restored_positions_are_those_computed(turns, limit, names):
    """Random prompts of three different tokens share beginnings; small limits evict at every turn."""
    engine = FakeEngine(names)
    tree = PrefixTree(engine, limit=limit * POSITION * 10)
    for prompt, slot, count, rejected, is_pinned in turns:
        play(tree, engine, prompt, [0] * count, slot, rejected=min(rejected, 47 - len(prompt) - count))
        if is_pinned:
            pin(tree, engine, prompt)
        assert tree.bytes <= limit * POSITION * 10


def pin(tree: PrefixTree, engine: FakeEngine, tokens: list[int]) -> None:
    """Pin a prefix in the form of a file, which contains only the window of a ring."""
    spans = {}
    for name, window in engine.windows.items():
        start = max(0, len(tokens) - window) if window else 0
        like = engine.slot_views(engine.new_cache(), 0)[name][:, :, 0]
        parts = [expected(name, tokens[: p + 1], like) for p in range(start, len(tokens))]
        spans[name] = Span(start, np.stack(parts, axis=2))
    tree.pin(tokens, spans)
    assert recount(tree) == tree.bytes


def test_the_whole_prompt_but_its_last_token_is_reused():
    engine = FakeEngine(["cache.keys"])
    tree = PrefixTree(engine, limit=1 << 20)
    assert play(tree, engine, [1, 2, 3, 4, 5, 6, 7], [8, 9], 0) == 0
    assert play(tree, engine, [1, 2, 3, 4, 5, 6, 7], [], 1) == 6
    assert play(tree, engine, [1, 2, 3, 4, 5, 6, 7, 8, 9, 1], [], 1) == 9
    assert play(tree, engine, [1, 2, 3, 0, 0], [], 0) == 3
    assert play(tree, engine, [2, 2], [], 0) == 0
    assert play(tree, engine, [2], [], 0) == 0


def test_a_ring_is_cut_where_its_window_is_known():
    engine = FakeEngine(["cache.window_4.keys"])
    tree = PrefixTree(engine, limit=1 << 20)
    tokens = list(range(30))
    pin(tree, engine, tokens)
    assert tree.match(tokens).length == 30
    assert tree.match(tokens[:29]).length == 29  # the token at 29 attends to itself and three more
    assert tree.match(tokens[:28]).length == 0
    assert tree.match([*tokens[:20], 99]).length == 0
    # If a conversation leaves the pinned prefix, its positions are reusable again one window after that point.
    assert play(tree, engine, [*tokens[:20], *range(50, 60)], [], 0) == 0
    assert tree.match([*tokens[:20], *range(50, 60)]).length == 30
    assert tree.match([*tokens[:20], *range(50, 53)]).length == 23
    assert tree.match([*tokens[:20], *range(50, 52)]).length == 0


def test_a_ring_forgets_what_an_answer_overwrote():
    engine = FakeEngine(["cache.keys", "cache.window_4.keys"])
    tree, cache = PrefixTree(engine, limit=1 << 20), engine.new_cache()
    tokens = list(range(40))
    engine.read(tokens, cache, 0, 0)
    tree.capture(tokens, cache, 0, restored=0)
    # The ring contains the last 8 positions; position 35 needs 32, 33 and 34.
    assert [tree.match(tokens[:n]).length for n in (40, 36, 35, 34)] == [40, 36, 35, 0]


def test_a_ring_forgets_what_rejected_drafts_overwrote():
    engine = FakeEngine(["cache.keys", "cache.window_4.keys"])
    tree, cache = PrefixTree(engine, limit=1 << 20), engine.new_cache()
    tokens = list(range(40))
    engine.read([*tokens, 9, 9, 9], cache, 0, 0)
    tree.capture(tokens, cache, 0, restored=0, written=43)
    assert [tree.match(tokens[:n]).length for n in (40, 39, 38, 37)] == [40, 39, 38, 0]


def test_the_least_recently_used_leaf_goes_first():
    engine = FakeEngine(["cache.key_scale"])
    tree = PrefixTree(engine, limit=30 * POSITION)
    one, two, three = [1] * 10, [2] * 10, [3] * 10
    for prompt in (one, two, three):
        play(tree, engine, prompt, [], 0)
    assert tree.bytes == 30 * POSITION
    tree.match(one)
    play(tree, engine, [4] * 8, [], 0)  # two segments, of 5 and 3 tokens
    assert [tree.match(p).length for p in (one, three, [4] * 8)] == [10, 10, 8]
    assert (
        tree.match(two).length == 0
    )  # the first segment alone would fit, but both were evicted, beginning with the leaf


def test_a_segment_larger_than_the_bound_is_not_kept():
    engine = FakeEngine(["cache.key_scale"])
    tree, cache = PrefixTree(engine, limit=10 * POSITION), engine.new_cache()
    tree.capture([1] * 10, cache, 0, restored=0)
    tree.capture([2] * 11, cache, 0, restored=0)
    assert (tree.match([1] * 10).length, tree.match([2] * 11).length) == (10, 0)


def test_pinned_segments_take_no_memory_and_stay():
    engine = FakeEngine(["cache.keys"])
    tree = PrefixTree(engine, limit=1 << 20)
    play(tree, engine, [1, 2, 3, 4], [5, 6], 0)
    before = tree.bytes
    pin(tree, engine, [1, 2, 3])
    assert tree.bytes == before // 2
    tree._limit = 1
    play(tree, engine, [7, 8], [], 0)
    assert (tree.bytes, tree.match([1, 2, 3, 4, 5]).length) == (before // 2, 5)
    tree._evict()
    assert (tree.bytes, tree.match([1, 2, 3, 4, 5]).length) == (0, 3)


def test_a_file_is_checked_for_its_own_tokens_until_another_replaces_it():
    """A replaced file is closed, and no longer checked."""
    engine = FakeEngine(["cache.keys"])
    tree, cache = PrefixTree(engine, limit=1 << 20), engine.new_cache()
    spans = {"cache.keys": Span(0, np.zeros((LAYERS, HEADS, 4, WIDTH), np.uint16))}
    checked: list[str] = []
    for name in ("first", "second"):
        tree.pin([1, 2, 3, 4], spans, partial(checked.append, name))
    tree.pin([1, 2, 8, 9], spans, partial(checked.append, "other"))
    for prompt, expected in (([1, 2, 3, 4, 5], ["other", "second"]), ([1, 2], ["other"]), ([7], [])):
        checked.clear()
        tree.restore(prompt, cache, 0)
        assert checked == expected


def test_an_answer_does_not_fail_for_lack_of_memory(monkeypatch):
    def read(*_):
        raise MemoryError

    engine = FakeEngine(["cache.keys"])
    tree, cache = PrefixTree(engine, limit=1 << 20), engine.new_cache()
    with monkeypatch.context() as patch:
        patch.setattr(kv_state, "read", read)
        tree.capture([1, 2, 3], cache, 0, restored=0)
    assert (tree.bytes, tree.match([1, 2, 3]).length) == (0, 0)
    tree.capture([1, 2, 3], cache, 0, restored=0)
    assert tree.match([1, 2, 3]).length == 3


def test_a_tree_is_freed_with_its_last_reference():
    """Without the help of the garbage collector, because a collection would stop a server for 0.1 s."""
    engine = FakeEngine(NAMES)
    tree = PrefixTree(engine, limit=None)
    for prompt in ([1, 2, 3], [1, 2, 4], [5]):
        play(tree, engine, prompt, [6, 7], 0)
    arrays = [weakref.ref(span.array) for node in tree._recent for span in node.spans.values()]
    assert len(arrays) > len(NAMES)
    gc.disable()
    try:
        del tree
        assert [array() for array in arrays] == [None] * len(arrays)
    finally:
        gc.enable()


def test_without_memory_nothing_is_captured():
    engine = FakeEngine(["cache.keys"])
    tree = PrefixTree(engine, limit=0)
    play(tree, engine, [1, 2, 3, 4], [5, 6], 0)
    assert (tree.bytes, tree.match([1, 2, 3]).length) == (0, 0)


def test_a_finaliser_in_a_thread_that_uses_the_tree_does_not_wait_for_itself(monkeypatch):
    """The garbage collector may end a generation while its thread looks up a prefix."""
    monkeypatch.setattr(prefixes, "_LONGEST_WAIT_S", 0.01)
    engine = FakeEngine(["cache.keys"])
    tree, cache = PrefixTree(engine, limit=1 << 20), engine.new_cache()
    with tree._lock:
        tree.capture([1, 2], cache, 0, restored=0)
    assert tree.match([1, 2]).length == 0
    tree.capture([1, 2], cache, 0, restored=0)
    assert tree.match([1, 2]).length == 2


@pytest.mark.parametrize(
    ("available", "limit"), [(None, 512 << 20), (16 << 30, 512 << 20), (1 << 30, 128 << 20)]
)
def test_the_default_bound(monkeypatch, available, limit):
    from precast.loaders.runtime import resources

    monkeypatch.setattr(resources, "memory", lambda: resources.Memory(limit=None, available=available))
    assert prefixes.default_limit() == limit


# --- copies -----------------------------------------------------------------------------------------------------


def cache_array(axes: str, sizes: Mapping[str, int], layout: tuple[int, ...]) -> CacheArray:
    shape = tuple(sizes[letter] for letter in axes)
    return CacheArray(
        name="cache.keys",
        shape=shape,
        axes=axes,
        dtype="bfloat16",
        layout=layout,
        window=0,
        layers=(0, 1),
        bytes=2 * int(np.prod(shape)),
    )


@pytest.mark.parametrize("layout", [(0, 1, 2, 3, 4), (1, 0, 3, 2, 4), (4, 3, 2, 1, 0)])
@pytest.mark.parametrize("axes", ["LBKSH", "BSHKL"])
def test_a_slot_of_any_layout(axes, layout):
    array = cache_array(axes, {"L": 2, "B": 3, "K": 4, "S": 5, "H": 6}, layout)
    whole = np.arange(2 * 3 * 4 * 5 * 6, dtype=np.uint16).reshape(array.shape)
    memory = np.ascontiguousarray(whole.transpose(layout)).reshape(-1).view(np.uint8)
    view = kv_state.slot_view(memory, array, layout, 1)
    ordered = whole.transpose([axes.index(letter) for letter in "LBKSH"])
    np.testing.assert_array_equal(view, ordered[:, 1])
    view[0, 1, 2, 3] = 9
    assert memory.view(np.uint16)[memory.view(np.uint16) == 9].size == 2


def test_large_copies_use_threads():
    view = np.random.default_rng(0).integers(0, 1 << 16, (3, 4, 4096, 64)).astype(np.uint16)
    spans = kv_state.read({"cache.keys": view}, {"cache.keys": 5}, 4090)
    span = spans["cache.keys"]
    assert span.array.nbytes > kv_state._ONE_THREAD_BYTES
    np.testing.assert_array_equal(span.array, view[:, :, 5:4090])
    copy = np.zeros_like(view)
    kv_state.write({"cache.keys": copy}, spans.items())
    np.testing.assert_array_equal(copy[:, :, 5:4090], view[:, :, 5:4090])
    assert not copy[:, :, :5].any()


def test_an_interrupted_copy_leaves_no_thread_that_writes(monkeypatch):
    """The KV cache may be freed as soon as the caller has the exception."""
    view = np.zeros((4, 4, 4096, 64), np.uint16)
    span = Span(0, np.ones_like(view))
    assert span.array.nbytes > kv_state._ONE_THREAD_BYTES
    begun, copy_layers = threading.Event(), kv_state._copy_layers

    def interrupted(pairs, first, step=1):
        if first == 0:
            begun.wait()
            raise KeyboardInterrupt
        begun.set()
        time.sleep(0.1)
        copy_layers(pairs, first, step)

    monkeypatch.setattr(kv_state, "_copy_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kv_state.write({"cache.keys": view}, [("cache.keys", span)])
    assert view[1::2].all()
