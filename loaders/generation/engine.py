"""An artifact's programs, loaded and bound to its weights: token ids in, logits and greedy tokens out.

What runs them is behind `precast.loaders.runtime.interface`.
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
    """What a call gives for each of its sequences.

    Attributes:
        token: the greedy token, ``[R]`` int32.
        logits: ``[R, V]`` float32, still on the device.
    """

    # Made for every token: after weights have passed through the caches, a `Frozen` takes 35 µs.
    __slots__ = ("logits", "token")

    def __init__(self, token: np.ndarray, logits: Buffer) -> None:
        self.token = token
        self.logits = logits


@dataclass(kw_only=True)
class KVCache:
    """The cache of B slots. It belongs to one generation at a time.

    Attributes:
        buffers: by array name. A call takes them over and puts new ones in their place.
        inputs: of each program that was called with it, by program and input name: written anew for every call.
    """

    buffers: dict[str, Buffer]
    inputs: dict[str, dict[str, tuple[np.ndarray, Buffer]]] = field(default_factory=dict)


class _Bound(Frozen):
    """A program with everything but its inputs and caches in place."""

    program: Program
    executable: Executable
    client: Client
    constants: Sequence[Buffer]
    inputs: Sequence[Value]
    caches: Sequence[str]

    def __call__(self, inputs: Mapping[str, Sequence[int] | int], cache: KVCache) -> dict[str, Buffer]:
        """Runs the program on `cache`; returns the other results by role.

        Args:
            inputs: by name; what is shorter than the program's is zero behind it.
            cache: to append to.
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
) -> _Bound:
    # Arguments are inputs, then caches, then constants: the manifest has been checked for that.
    return _Bound(
        program=program,
        executable=executable,
        client=client,
        constants=[constants[v.name] for v in program.arguments if v.role in ("table", "weight")],
        inputs=[v for v in program.arguments if v.role not in ("cache", "table", "weight")],
        caches=[v.name for v in program.arguments if v.role == "cache"],
    )


def _laid_out(array: np.ndarray, layout: tuple[int, ...] | None) -> np.ndarray:
    """An array with its axes in the order of a layout: as it is, where that is its own or None."""
    if layout is None or layout == tuple(range(array.ndim)):
        return array
    return np.ascontiguousarray(array.transpose(layout))


class Engine:
    """The programs of one target.

    Args:
        manifest: of the artifact.
        target: the target chosen.
        executables: one for each of its programs, by name.
        weights: arrays by name, those that the programs take: weights and tables.
        client: where to run.
        unchanged: called before and after each step; raises when the weights have been written to meanwhile.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        target: Target,
        executables: Mapping[str, Executable],
        weights: Mapping[str, np.ndarray],
        client: Client,
        unchanged: Callable[[], None] = lambda: None,
    ) -> None:
        self.context = manifest.context
        self.slots = manifest.slots
        self.vocab = manifest.model.vocab
        self._client, self._unchanged = client, unchanged
        layouts = {v.name: v.layout for p in target.programs for v in p.arguments}
        constants = {n: client.put(_laid_out(a, layouts.get(n))) for n, a in weights.items()}
        release = weakref.finalize(self, client.free, tuple(constants.values()))
        release.atexit = False  # process exit frees them faster
        bound = {p.name: _bind(p, executables[p.name], client, constants) for p in target.programs}
        self._cache = bound[target.of_kind("cache")[0].name]
        self._decode = bound[target.of_kind("decode")[0].name]
        prefills = sorted(target.of_kind("prefill"), key=lambda p: p.tokens)
        self._prefills = [(p.tokens, bound[p.name]) for p in prefills]

    def new_cache(self) -> KVCache:
        """An empty cache of every slot. Memory is taken from the system as positions are filled."""
        cache = KVCache(buffers={})
        self._cache({}, cache)
        return cache

    def prefill(
        self, tokens: Sequence[int], cache: KVCache, *, start: SupportsIndex = 0, slot: SupportsIndex = 0
    ) -> StepOutput:
        """Runs a prompt through the smallest bucket that holds it, or through the largest in chunks.

        Args:
            tokens: one or more ids; ``start + len(tokens)`` must not exceed the context.
            cache: to append to.
            start: position of the first token.
            slot: which sequence of the cache.

        Returns:
            The step after the last token (R = 1).

        Raises:
            ValueError: for no tokens, positions outside the cache, or a slot that is not there.
        """
        start, slot = index(start), index(slot)  # NumPy's integers too
        if not tokens or start < 0 or start + len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens at position {start} do not fit {self.context} positions")
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} of {self.slots}")
        self._unchanged()
        largest = self._prefills[-1][0]
        for begin in range(0, len(tokens), largest):
            chunk = tokens[begin : begin + largest]
            results = self._prefill_chunk(chunk, cache, start + begin, slot)
        return self._step(results)

    def _prefill_chunk(
        self, chunk: Sequence[int], cache: KVCache, start: int, slot: int
    ) -> dict[str, Buffer]:
        program = next(p for t, p in self._prefills if t >= len(chunk))
        return program({"tokens": chunk, "length": len(chunk), "start": start, "slot": slot}, cache)

    def decode(self, tokens: Sequence[int], positions: Sequence[int], cache: KVCache) -> StepOutput:
        """Runs one token of every slot.

        Args:
            tokens: the newest token of each slot, ``[B]``.
            positions: where it stands, ``[B]``; −1 for a slot that is not in use.
            cache: to append to.

        Returns:
            The step of every slot (R = B); meaningless for slots not in use.

        Raises:
            ValueError: for another number of slots, or a position outside the cache.
        """
        if len(tokens) != self.slots or len(positions) != self.slots or max(positions) >= self.context:
            raise ValueError(
                f"tokens and positions {positions} do not fit {self.slots} slots of {self.context}"
            )
        self._unchanged()
        return self._step(self._decode({"tokens": tokens, "positions": positions}, cache))

    def logits(self, step: StepOutput) -> np.ndarray:
        """The step's logits ``[R, V]`` as a view."""
        return self._client.get(step.logits)

    def _step(self, results: Mapping[str, Buffer]) -> StepOutput:
        self._unchanged()
        return StepOutput(self._client.get(results["token"]), results["logits"])
