"""Run an artifact's programs on its weights: token ids in, greedy tokens and logits out.

`precast.loaders.runtime.interface` describes the runtimes that execute the programs.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import NamedTuple, SupportsIndex

import numpy as np

from ..artifact.frozen import Frozen
from ..artifact.manifest import Manifest, Program, Target, Value
from ..artifact.weights import numpy_dtype
from ..runtime.interface import Buffer, Client, Executable
from .kv_state import slot_view


class DecodeRow(NamedTuple):
    """One sequence's input to a decode step.

    Attributes:
        slot: the sequence's slot in the KV cache.
        token: the sequence's newest token.
        position: the token's position.
    """

    slot: int
    token: int
    position: int


class StepOutput:
    """The R results of one call of the engine.

    Attributes:
        token: the greedy token of each result, int32 [R].
        logits: the logits of all rows of the program, float32, in the device's memory. `Engine.logits` selects the rows
            of the R results.
        rows: indices of the R results among the program's rows.
    """

    # Not a `Frozen`, because creating a `Frozen` would add 35 µs to every token. The creation is slow here, because the
    # weights have just evicted everything else from the CPU's caches.
    __slots__ = ("logits", "rows", "token")

    def __init__(self, token: np.ndarray, logits: Buffer, rows: slice | list[int]) -> None:
        self.token = token
        self.logits = logits
        self.rows = rows


@dataclass(kw_only=True)
class KVCache:
    """A KV cache of B slots. Only one call may use the cache at a time.

    Attributes:
        buffers: the cache's arrays by name. Each call donates the arrays to the program, and replaces them with the
            program's results.
        inputs: the staging buffers by program name and input name. Each call of a program overwrites them.
    """

    buffers: dict[str, Buffer]
    inputs: dict[str, dict[str, tuple[np.ndarray, Buffer]]] = field(default_factory=dict)


class _BoundProgram(Frozen):
    """A program with its weights and tables. A call needs only inputs and a KV cache."""

    program: Program
    rows: int
    has_slots: bool
    executable: Executable
    client: Client
    constants: Sequence[Buffer]
    inputs: Sequence[Value]
    caches: Sequence[str]

    def __call__(self, inputs: Mapping[str, Sequence[int] | int], cache: KVCache) -> dict[str, Buffer]:
        """Run the program, replace the cache's arrays, and return all other results by role.

        Args:
            inputs: inputs by name. A sequence that is shorter than the program's input is padded with zeros.
            cache: the KV cache to append to.
        """
        staged = cache.inputs.get(self.program.name)
        if staged is None:
            staged = {v.name: self.client.staging(v.shape, numpy_dtype(v.dtype)) for v in self.inputs}
            cache.inputs[self.program.name] = staged
        for name, (array, _) in staged.items():
            given = inputs[name]
            if isinstance(given, int):
                array[...] = given
            else:
                array[: len(given)] = given
                if len(given) < len(array):
                    array[len(given) :] = 0
        caches = [cache.buffers[name] for name in self.caches]
        results = self.executable([*(buffer for _, buffer in staged.values()), *caches, *self.constants])
        others = {}
        for value, buffer in zip(self.program.results, results, strict=True):
            if value.role == "cache":
                cache.buffers[value.name] = buffer
            else:
                others[value.role] = buffer
        return others


def _bind(
    program: Program, executable: Executable, client: Client, constants: Mapping[str, Buffer]
) -> _BoundProgram:
    # The manifest's check guarantees the order of arguments: inputs, caches, constants.
    return _BoundProgram(
        program=program,
        rows=program.rows,
        has_slots=program.has_slots,
        executable=executable,
        client=client,
        constants=[constants[v.name] for v in program.arguments if v.role in ("table", "weight")],
        inputs=[v for v in program.arguments if v.role not in ("cache", "table", "weight")],
        caches=[v.name for v in program.arguments if v.role == "cache"],
    )


def _in_layout(array: np.ndarray, layout: tuple[int, ...] | None) -> np.ndarray:
    """Return an array with its axes in the order of a layout; the array itself if its axes have this order already."""
    if layout is None or layout == tuple(range(array.ndim)):
        return array
    return np.ascontiguousarray(array.transpose(layout))


class Engine:
    """The programs of one target, bound to their weights.

    Threads may share an engine if each thread uses its own KV cache.

    Attributes:
        context: number of positions in a slot.
        slots: B, number of slots in a KV cache.
        vocab: V, size of the vocabulary.
        buckets: prompt lengths with a prefill program, ascending.
        score_tokens: maximum number of tokens for `score`; 0 if the artifact has no score program.

    Args:
        manifest: the artifact's manifest.
        target: the target to run.
        executables: the target's executables by program name.
        weights: weights and tables by name.
        client: the runtime's client.
        check_unchanged: a function that raises PrecastError if the weight file was modified; called before and after
            each step.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        target: Target,
        executables: Mapping[str, Executable],
        weights: Mapping[str, np.ndarray],
        client: Client,
        check_unchanged: Callable[[], None] = lambda: None,
    ) -> None:
        self.context = manifest.context
        self.slots = manifest.slots
        self.vocab = manifest.model.vocab
        self._client, self._check_unchanged = client, check_unchanged
        layouts = {v.name: v.layout for p in target.programs for v in p.arguments}
        constants = {n: client.put(_in_layout(a, layouts.get(n))) for n, a in weights.items()}
        release = weakref.finalize(self, client.free, tuple(constants.values()))
        release.atexit = False  # the operating system frees the constants faster
        bound = {p.name: _bind(p, executables[p.name], client, constants) for p in target.programs}
        self._cache = bound[target.of_kind("cache")[0].name]
        self._decodes = sorted((bound[p.name] for p in target.of_kind("decode")), key=lambda b: b.rows)
        self._arrays = [(array, layouts[array.name]) for array in manifest.cache]
        prefills = sorted(target.of_kind("prefill"), key=lambda p: p.tokens)
        self._prefills = [(p.tokens, bound[p.name]) for p in prefills]
        self.buckets = tuple(p.tokens for p in prefills)
        self._score = next((bound[p.name] for p in target.of_kind("score")), None)
        self.score_tokens = 0 if self._score is None else self._score.program.tokens

    def new_cache(self) -> KVCache:
        """Return an empty KV cache for all slots.

        The operating system allocates the cache's memory as positions are filled.
        """
        cache = KVCache(buffers={})
        self._cache({}, cache)
        return cache

    @property
    def windows(self) -> dict[str, int]:
        """The sliding window of each array of the KV cache, in positions; 0 for an array without a window."""
        return {array.name: array.window for array, _ in self._arrays}

    def filled_bytes(self, filled: Sequence[int]) -> int:
        """Return the number of bytes of memory that a KV cache occupies.

        Args:
            filled: number of positions that have been filled in each slot.
        """
        total = 0
        for array, _ in self._arrays:
            size = array.shape[array.axes.index("S")]
            total += array.bytes // (self.slots * size) * sum(min(positions, size) for positions in filled)
        return total

    def slot_views(self, cache: KVCache, slot: int) -> dict[str, np.ndarray] | None:
        """Return writable views of a slot's keys and values, by array; None if the host cannot access them.

        The views contain bit patterns, [L, K, S, H] or [L, K, S], as in `kv_state`. The next call of a program
        invalidates the views.
        """
        views = {}
        for array, layout in self._arrays:
            memory = self._client.view(cache.buffers[array.name])
            if memory is None:
                return None
            views[array.name] = slot_view(memory, array, layout, slot)
        return views

    def prefill(
        self, tokens: Sequence[int], cache: KVCache, *, start: SupportsIndex = 0, slot: SupportsIndex = 0
    ) -> StepOutput:
        """Compute the keys and values of prompt tokens, and the logits after the last token.

        Tokens that exceed the largest bucket are processed in several calls. Each call uses the smallest bucket that
        fits its tokens.

        Args:
            tokens: one or more ids; ``start + len(tokens)`` must not exceed the context.
            cache: the KV cache to append to.
            start: position of the first token.
            slot: the sequence's slot in the cache.

        Returns:
            The greedy token and the logits after the last token (R = 1).

        Raises:
            ValueError: there are no tokens, a position is outside the context, or the slot does not exist.
            PrecastError: the weight file was modified.
        """
        start, slot = index(start), index(slot)  # accept NumPy's integers
        self._check_span(tokens, start, slot)
        self._check_unchanged()
        largest = self.buckets[-1]
        for begin in range(0, len(tokens), largest):
            results = self._run_chunk(tokens[begin : begin + largest], cache, start + begin, slot)
        return self._output(results, slice(1))

    def prefill_chunk(
        self, tokens: Sequence[int], cache: KVCache, *, start: SupportsIndex, slot: SupportsIndex
    ) -> StepOutput:
        """Process part of a prompt as `prefill` does, but in a single call.

        Raises:
            ValueError: there are more tokens than the largest bucket holds; also the errors of `prefill`.
        """
        if len(tokens) > self.buckets[-1]:
            raise ValueError(f"{len(tokens)} tokens exceed the largest bucket of {self.buckets[-1]}")
        return self.prefill(tokens, cache, start=start, slot=slot)

    def _run_chunk(self, chunk: Sequence[int], cache: KVCache, start: int, slot: int) -> dict[str, Buffer]:
        program = next(p for t, p in self._prefills if t >= len(chunk))
        return program({"tokens": chunk, "length": len(chunk), "start": start, "slot": slot}, cache)

    def score(
        self, tokens: Sequence[int], cache: KVCache, *, start: SupportsIndex, slot: SupportsIndex
    ) -> StepOutput:
        """Run the model on a few tokens of a sequence in a single call, and return a result for each token.

        Args:
            tokens: 1 to `score_tokens` ids; ``start + len(tokens)`` must not exceed the context.
            cache: the KV cache to append to.
            start: position of the first token.
            slot: the sequence's slot in the cache.

        Returns:
            The greedy token and the logits after each token (R = ``len(tokens)``).

        Raises:
            ValueError: the artifact has no score program, the number of tokens is wrong, a position is outside the
                context, or the slot does not exist.
            PrecastError: the weight file was modified.
        """
        if self._score is None or len(tokens) > self.score_tokens:
            raise ValueError(f"{len(tokens)} tokens exceed the {self.score_tokens} that one call can score")
        start, slot = index(start), index(slot)
        self._check_span(tokens, start, slot)
        self._check_unchanged()
        results = self._score({"tokens": tokens, "length": len(tokens), "start": start, "slot": slot}, cache)
        return self._output(results, slice(len(tokens)))

    def _check_span(self, tokens: Sequence[int], start: int, slot: int) -> None:
        if not tokens or start < 0 or start + len(tokens) > self.context:
            raise ValueError(
                f"{len(tokens)} tokens at position {start} do not fit a context of {self.context}"
            )
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot}: expected a slot from 0 to {self.slots - 1}")

    def decode(self, rows: Sequence[DecodeRow], cache: KVCache) -> StepOutput:
        """Run one decode step for one or more sequences.

        Args:
            rows: the newest token of each sequence, with at most one row for each slot.
            cache: the KV cache to append to.

        Returns:
            The greedy token and the logits of each sequence, in the order of the rows (R = ``len(rows)``).

        Raises:
            ValueError: there are no rows, two rows have the same slot, or a slot or position does not exist.
            PrecastError: the weight file was modified.
        """
        slots, positions = [row.slot for row in rows], [row.position for row in rows]
        self._check_rows(slots, positions)
        self._check_unchanged()
        decode = next(b for b in self._decodes if b.rows >= len(rows))
        if not decode.has_slots:
            return self._decode_by_slot(decode, rows, cache)
        tokens, idle = [row.token for row in rows], [-1] * (decode.rows - len(rows))
        results = decode({"tokens": tokens, "positions": [*positions, *idle], "slots": slots}, cache)
        return self._output(results, slice(len(rows)))

    def _decode_by_slot(self, decode: _BoundProgram, rows: Sequence[DecodeRow], cache: KVCache) -> StepOutput:
        """Run a decode program from an artifact of format 5 or earlier. Such programs have one row for each slot."""
        tokens, positions = [0] * self.slots, [-1] * self.slots
        for row in rows:
            tokens[row.slot], positions[row.slot] = row.token, row.position
        results = decode({"tokens": tokens, "positions": positions}, cache)
        # Indexing with a slice returns a view; indexing with a list would copy the row's logits.
        places = slice(rows[0].slot, rows[0].slot + 1) if len(rows) == 1 else [row.slot for row in rows]
        return self._output(results, places)

    def _check_rows(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        if not slots or len(set(slots)) < len(slots) or min(slots) < 0 or max(slots) >= self.slots:
            raise ValueError(f"slots {slots}: expected distinct slots from 0 to {self.slots - 1}")
        if min(positions) < 0 or max(positions) >= self.context:
            raise ValueError(f"positions {positions}: expected positions from 0 to {self.context - 1}")

    def logits(self, step: StepOutput) -> np.ndarray:
        """Return the logits of a step's R results in the host's memory, float32 [R, V]. Do not modify this array."""
        return self._client.get(step.logits)[step.rows]

    def _output(self, results: Mapping[str, Buffer], rows: slice | list[int]) -> StepOutput:
        self._check_unchanged()
        return StepOutput(self._client.get(results["token"])[rows], results["logits"], rows)
