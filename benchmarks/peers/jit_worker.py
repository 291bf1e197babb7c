"""This project's Flax model under plain jax.jit, in pure XLA. The first call with each shape compiles a program."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from contenders import CAPACITY
from worker import timed_run

from precast.exporter.models.registry import read_model
from precast.exporter.models.xla_ops import XLA_OPS
from precast.exporter.programs import Geometry, build_programs, stored_model
from precast.exporter.sources.open import open_source


class Jit:
    packages = ("precast", "jax", "jaxlib", "flax")

    def __init__(self, model: str) -> None:
        source = open_source(str(Path(model)))
        self._stored = stored_model(read_model(source.config, source.name), "float32")
        read = [np.stack([source.tensors[s].read() for s in p.sources]) for p in self._stored.parameters]
        shapes = [array.shape for _, array in self._stored.arrays()]
        weights = [jax.numpy.asarray(a.reshape(s)) for a, s in zip(read, shapes, strict=True)]
        tables = [jax.numpy.asarray(t) for t in self._stored.spec.tables(CAPACITY)]
        self._constants = (*tables, *weights)
        self._programs = {}

    def _program(self, name: str, bucket: int):
        """Return the jitted function for decode or for a prefill bucket."""
        if name not in self._programs:
            geometry = Geometry(context=CAPACITY, slots=1, buckets=(bucket,))
            programs = {p.name: p for p in build_programs(self._stored, geometry, XLA_OPS)}
            program = programs[name]
            self._programs[name] = jax.jit(program.function, donate_argnums=program.donated)
            self._empty = jax.jit(programs["cache"].function)
        return self._programs[name]

    def _call(self, name: str, bucket: int, *inputs) -> np.ndarray:
        program = self._program(name, bucket)
        if name != "decode":
            self._cache = self._empty()
        self._token, logits, *self._cache = program(*inputs, *self._cache, *self._constants)
        return logits

    def _prompt(self, ids: Sequence[int]):
        scalars = [np.int32(value) for value in (len(ids), 0, 0)]
        return self._call(f"prefill_{len(ids)}", len(ids), np.array(ids, np.int32), *scalars)

    def _next(self, token: int, position: int):
        return self._call("decode", 1, np.array([token], np.int32), np.array([position], np.int32))

    def prefill(self, ids: Sequence[int]) -> int:
        self._prompt(ids)
        return int(self._token[0])

    def step(self, token: int, position: int) -> int:
        self._next(token, position)
        return int(self._token[0])

    def run(self, ids: Sequence[int], steps: int) -> tuple[float, float, list[int]]:
        return timed_run(self, ids, steps)

    def logits(self, ids: Sequence[int], first: int) -> Iterator[object]:
        yield np.asarray(self._prompt(ids[: first + 1]))[0]
        for position in range(first + 1, len(ids) - 1):
            yield np.asarray(self._next(ids[position], position))[0]


def load(model: str, options: dict) -> Jit:
    return Jit(model, **options)
