"""An engine without a model, whose next token depends on every token in the slot, and sequences for it."""

import itertools
import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from precast.loaders.generation.engine import DecodeRow
from precast.loaders.generation.sampling import Sampler
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.generation.sequence import TokenSequence
from precast.loaders.generation.stopping import StopStrings

VOCAB = 40


def scores(tokens: Sequence[int], memory: int = 1000) -> np.ndarray:
    """Return logits [V] that depend on the last `memory` tokens of a sequence."""
    seed = zlib.crc32(np.array(tokens[-memory:], np.int32))
    return np.random.default_rng(seed).standard_normal(VOCAB, np.float32)


class FakeCache:
    """The tokens written to each slot, by position."""

    def __init__(self, slots: int) -> None:
        self.slots: list[dict[int, int]] = [{} for _ in range(slots)]


class FakeEngine:
    """An engine that records its calls.

    Attributes:
        calls: name and slots of each call.
        before: called with the name of each call before it runs; if it raises an exception, the call fails.
        poisoned: token whose appearance in a slot makes the slot's logits NaN, or None.
    """

    def __init__(
        self,
        *,
        slots: int = 3,
        context: int = 64,
        buckets: tuple[int, ...] = (4, 8),
        score_tokens: int = 0,
        memory: int = 1000,
    ) -> None:
        self.context, self.slots, self.vocab = context, slots, VOCAB
        self.buckets, self.score_tokens = buckets, score_tokens
        self._memory = memory
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.lengths: list[int] = []
        self.before: Callable[[str], None] = lambda name: None
        self.poisoned: int | None = None

    def filled_bytes(self, filled: list[int]) -> int:
        return sum(filled)

    def new_cache(self) -> FakeCache:
        self._call("cache", ())
        return FakeCache(self.slots)

    def prefill_chunk(self, tokens: Sequence[int], cache: FakeCache, *, start: int, slot: int) -> Any:
        assert 0 < len(tokens) <= self.buckets[-1]
        self._call("prefill", (slot,))
        self.lengths.append(len(tokens))
        return self._results([self._write(cache, slot, start, tokens)[-1]])

    def decode(self, rows: Sequence[DecodeRow], cache: FakeCache) -> Any:
        slots = tuple(row.slot for row in rows)
        assert len(set(slots)) == len(rows) > 0
        self._call("decode", slots)
        return self._results([self._write(cache, r.slot, r.position, [r.token])[0] for r in rows])

    def score(self, tokens: Sequence[int], cache: FakeCache, *, start: int, slot: int) -> Any:
        assert 0 < len(tokens) <= self.score_tokens
        self._call("score", (slot,))
        self.lengths.append(len(tokens))
        return self._results(self._write(cache, slot, start, tokens))

    def logits(self, step: Any) -> np.ndarray:
        return step.logits

    def _call(self, name: str, slots: tuple[int, ...]) -> None:
        self.before(name)
        self.calls.append((name, slots))

    def _write(self, cache: FakeCache, slot: int, start: int, tokens: Sequence[int]) -> list[np.ndarray]:
        """Write tokens to a slot, and return the logits after each token."""
        held, found = cache.slots[slot], []
        assert start + len(tokens) <= self.context
        for position, token in enumerate(tokens, start):
            held[position] = token
            known = [held[p] for p in range(position + 1)]  # a position that was never written is a KeyError
            is_poisoned = self.poisoned in known
            found.append(np.full(VOCAB, np.nan, np.float32) if is_poisoned else scores(known, self._memory))
        return found

    def _results(self, logits: list[np.ndarray]) -> Any:
        stacked = np.stack(logits)
        return SimpleNamespace(token=stacked.argmax(-1).astype(np.int32), logits=stacked)


class FakePrefixes:
    """A store of prefixes that keeps every captured sequence."""

    every_chunk = False

    def __init__(self, spare_bytes: int = 0) -> None:
        self.known: list[list[int]] = []
        self.spare_bytes = spare_bytes

    def restore(self, tokens: list[int], cache: Any, slot: int) -> int:
        def common(known: list[int]) -> int:
            pairs = zip(tokens, known, strict=False)
            return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

        length = max(map(common, self.known), default=0)
        cache.slots[slot].update(enumerate(tokens[:length]))
        return length

    def capture(self, tokens: list[int], cache: Any, slot: int, *, restored: int, written: int) -> None:
        assert tokens == [cache.slots[slot][p] for p in range(len(tokens))]
        self.known.append(tokens)


class LetterStream:
    """A decoder that spells each token as one character."""

    def push(self, token: int) -> str:
        return chr(ord("A") + token)

    def finish(self) -> str:
        return ""


@pytest.fixture(scope="session")
def fake_engine() -> type[FakeEngine]:
    """Return the class of engines without a model."""
    return FakeEngine


@pytest.fixture(scope="session")
def fake_prefixes() -> type[FakePrefixes]:
    """Return the class of stores of prefixes for fake engines."""
    return FakePrefixes


@pytest.fixture(scope="session")
def new_sequence() -> Callable[..., TokenSequence]:
    """Return a function that makes a sequence for a fake engine; `params` are those of `SamplingParams`."""

    def make(
        prompt: Sequence[int],
        *,
        limit: int = 8,
        ends: Sequence[int] = (),
        most_unread: int | None = None,
        notify: Callable[[], None] | None = None,
        decoder: Any = None,
        wants_drafts: bool = False,
        **params: Any,
    ) -> TokenSequence:
        chosen = SamplingParams(**params)
        return TokenSequence(
            prompt,
            sampler=Sampler(chosen, prompt, VOCAB, ends),
            decoder=decoder or LetterStream(),
            stops=StopStrings(chosen.stop),
            ends=frozenset(ends),
            limit=limit,
            timeout_s=chosen.timeout_s,
            most_unread=most_unread,
            notify=notify,
            wants_drafts=wants_drafts,
        )

    return make


@pytest.fixture(scope="session")
def alone() -> Callable[..., list[int]]:
    """Return a function that computes the answer to a sequence that runs alone, without an engine or scheduler."""

    def answer(
        prompt: Sequence[int],
        *,
        limit: int = 8,
        ends: Sequence[int] = (),
        memory: int = 1000,
        **params: Any,
    ) -> list[int]:
        chosen = SamplingParams(**params)
        sampler, tokens = Sampler(chosen, prompt, VOCAB, ends), list(prompt)
        while len(tokens) < len(prompt) + limit:
            tokens.append(sampler.sample(scores(tokens, memory)))
            if tokens[-1] in ends:
                break
        return tokens[len(prompt) :]

    return answer
