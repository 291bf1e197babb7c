"""Run an artifact's programs on its weights: token ids in, greedy tokens and logits out.

`precast.loaders.runtime.interface` describes the runtimes that execute the programs.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import SupportsIndex

import numpy as np

from ..artifact.frozen import Frozen
from ..artifact.manifest import Manifest, Program, Target, Value
from ..artifact.weights import numpy_dtype
from ..runtime.interface import Buffer, Client, Executable


class StepOutput:
    """The results of one call for each of its R sequences.

    Attributes:
        token: greedy tokens, int32 [R].
        logits: logits, float32 [R, V], still on the device.
    """

    # Not a `Frozen`: one is created for every token, after the weights have evicted everything else from the CPU's
    # caches; a `Frozen` then takes 35 µs.
    __slots__ = ("logits", "token")

    def __init__(self, token: np.ndarray, logits: Buffer) -> None:
        self.token = token
        self.logits = logits


@dataclass(kw_only=True)
class KVCache:
    """A KV cache of B slots. It is not thread-safe: one generation uses it at a time.

    Attributes:
        buffers: the cache's arrays by name. Each call donates them to the program and stores its results.
        inputs: staging buffers by program and input name, which every call overwrites.
    """

    buffers: dict[str, Buffer]
    inputs: dict[str, dict[str, tuple[np.ndarray, Buffer]]] = field(default_factory=dict)


class _BoundProgram(Frozen):
    """A program with its weights and tables; a call needs only inputs and a KV cache."""

    program: Program
    executable: Executable
    client: Client
    constants: Sequence[Buffer]
    inputs: Sequence[Value]
    caches: Sequence[str]

    def __call__(self, inputs: Mapping[str, Sequence[int] | int], cache: KVCache) -> dict[str, Buffer]:
        """Run the program, update the cache, and return the other results by role.

        Args:
            inputs: inputs by name; a short sequence is padded with zeros.
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
        executable=executable,
        client=client,
        constants=[constants[v.name] for v in program.arguments if v.role in ("table", "weight")],
        inputs=[v for v in program.arguments if v.role not in ("cache", "table", "weight")],
        caches=[v.name for v in program.arguments if v.role == "cache"],
    )


def _in_layout(array: np.ndarray, layout: tuple[int, ...] | None) -> np.ndarray:
    """Return an array with its axes in the order of a layout, without a copy if they are in that order already."""
    if layout is None or layout == tuple(range(array.ndim)):
        return array
    return np.ascontiguousarray(array.transpose(layout))


class Engine:
    """The programs of one target, bound to their weights.

    Threads may share an engine if each uses its own KV cache.

    Args:
        manifest: the artifact's manifest.
        target: the target to run.
        executables: the target's executables by program name.
        weights: weights and tables by name.
        client: the runtime's client.
        check_unchanged: called before and after each step; it raises PrecastError if the weights' file was written to.
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
        release.atexit = False  # process exit frees them faster
        bound = {p.name: _bind(p, executables[p.name], client, constants) for p in target.programs}
        self._cache = bound[target.of_kind("cache")[0].name]
        self._decode = bound[target.of_kind("decode")[0].name]
        prefills = sorted(target.of_kind("prefill"), key=lambda p: p.tokens)
        self._prefills = [(p.tokens, bound[p.name]) for p in prefills]

    def new_cache(self) -> KVCache:
        """Return an empty KV cache for all slots. The system allocates its memory as positions are filled."""
        cache = KVCache(buffers={})
        self._cache({}, cache)
        return cache

    def prefill(
        self, tokens: Sequence[int], cache: KVCache, *, start: SupportsIndex = 0, slot: SupportsIndex = 0
    ) -> StepOutput:
        """Run a prompt through the smallest bucket that holds it, or through the largest in chunks.

        Args:
            tokens: one or more ids; ``start + len(tokens)`` must not exceed the context.
            cache: the KV cache to append to.
            start: position of the first token.
            slot: the sequence's slot in the cache.

        Returns:
            Token and logits after the last token (R = 1).

        Raises:
            ValueError: there are no tokens, a position is outside the context, or the slot does not exist.
            PrecastError: the weights' file was written to.
        """
        start, slot = index(start), index(slot)  # accept NumPy's integers
        if not tokens or start < 0 or start + len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens at position {start} do not fit {self.context} positions")
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} of {self.slots}")
        self._check_unchanged()
        largest = self._prefills[-1][0]
        for begin in range(0, len(tokens), largest):
            chunk = tokens[begin : begin + largest]
            results = self._prefill_chunk(chunk, cache, start + begin, slot)
        return self._output(results)

    def _prefill_chunk(
        self, chunk: Sequence[int], cache: KVCache, start: int, slot: int
    ) -> dict[str, Buffer]:
        program = next(p for t, p in self._prefills if t >= len(chunk))
        return program({"tokens": chunk, "length": len(chunk), "start": start, "slot": slot}, cache)

    def decode(self, tokens: Sequence[int], positions: Sequence[int], cache: KVCache) -> StepOutput:
        """Run the next token of every slot.

        Args:
            tokens: the newest token of each slot, [B].
            positions: positions of these tokens, [B]; −1 for an idle slot.
            cache: the KV cache to append to.

        Returns:
            Token and logits of every slot (R = B); meaningless for idle slots.

        Raises:
            ValueError: the number of slots differs, or a position is outside the context.
            PrecastError: the weights' file was written to.
        """
        if len(tokens) != self.slots or len(positions) != self.slots or max(positions) >= self.context:
            raise ValueError(
                f"tokens and positions {positions} do not fit {self.slots} slots of {self.context}"
            )
        self._check_unchanged()
        return self._output(self._decode({"tokens": tokens, "positions": positions}, cache))

    def logits(self, step: StepOutput) -> np.ndarray:
        """Return a step's logits on the host, float32 [R, V]; do not write to them."""
        return self._client.get(step.logits)

    def _output(self, results: Mapping[str, Buffer]) -> StepOutput:
        self._check_unchanged()
        return StepOutput(self._client.get(results["token"]), results["logits"])
