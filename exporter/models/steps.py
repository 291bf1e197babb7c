"""A layer as a list of steps, for the kernel that runs all layers in one call.

`record` calls a layer with stand-ins for its arrays, and notes what it asks of the target. A layer that does anything
else with them fails here; `xla_ops.looped` is for such.
"""

from dataclasses import dataclass
from math import prod

from .ops import Calls, ExpertsCall, LinearCall, NormCall, Stack

GATES = ("", "silu", "gelu_tanh")
_LINEAR, _ATTENTION, _NORM, _EXPERTS = range(4)


@dataclass(frozen=True)
class Stand:
    """What stands for an array ``[…, width]`` of the call's rows while a layer is recorded.

    Attributes:
        value: its number: 0 is what the layer is given, every step adds its results.
    """

    value: int
    shape: tuple[int, ...]

    def reshape(self, *shape: int) -> "Stand":
        size = prod(self.shape)
        if -1 in shape:
            rest = -prod(shape)
            shape = tuple(size // rest if n == -1 else n for n in shape)
        if prod(shape) != size:
            raise TypeError(f"cannot reshape {self.shape} into {shape}")
        return Stand(self.value, shape)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A layer, as attributes and operands of ``precast.layers``; kernels/src/layers_ffi.cc describes them."""

    codes: tuple[int, ...]
    outs: tuple[int, ...]
    numbers: tuple[float, ...]
    calls: tuple[LinearCall | NormCall | ExpertsCall, ...]


class _Recorder:
    def __init__(self, rows: int, stack: Stack) -> None:
        self._rows, self._stack, self._values = rows, stack, 1
        self.codes: list[int] = []
        self.outs: list[int] = []
        self.numbers: list[float] = []
        self.calls: list[LinearCall | NormCall | ExpertsCall] = []

    def recording(self) -> Calls:
        return Calls(
            project=self.project,  # type: ignore[arg-type]
            normalize=self.normalize,  # type: ignore[arg-type]
            attend=self.attend,  # type: ignore[arg-type]
            mix=self.mix,  # type: ignore[arg-type]
        )

    def _new(self, shape: tuple[int, ...]) -> Stand:
        self._values += 1
        return Stand(self._values - 1, shape)

    def _note(self, code: tuple[int, ...], numbers: tuple[float, float]) -> None:
        self.codes += [*code, *[0] * (8 - len(code))]
        self.numbers += numbers

    def project(self, x: Stand, call: LinearCall) -> list[Stand]:
        given = _values(x, call.residual)
        flags = (call.norm is not None, bool(call.biases), GATES.index(call.gate), len(call.weights))
        self._note((_LINEAR, *given, *map(int, flags)), (call.eps, 0.0))
        self.outs += call.outs
        self.calls.append(call)
        return [self._new((self._rows, n)) for n in call.results]

    def normalize(self, x: Stand, call: NormCall) -> Stand:
        given = _values(x, call.residual)
        self._note((_NORM, *given, call.width, int(call.bias is not None)), (call.eps, 0.0))
        self.calls.append(call)
        return self._new(x.shape)

    def attend(self, q: Stand, k: Stand, v: Stand) -> Stand:
        n, kv, h = self._stack.heads
        if [a.shape[-2:] for a in (q, k, v)] != [(n, h), (kv, h), (kv, h)]:
            raise TypeError(
                f"attention of heads {[a.shape[-2:] for a in (q, k, v)]} where {self._stack.heads} were said"
            )
        self._note((_ATTENTION, q.value, k.value, v.value), (self._stack.scale, self._stack.soft_cap))
        return self._new(q.shape)

    def mix(self, x: Stand, scores: Stand, call: ExpertsCall) -> Stand:
        given = _values(x, scores, call.residual)
        how = (int(call.norm is not None), GATES.index(call.activation), call.experts, call.chosen)
        self._note((_EXPERTS, *given, *how), (call.eps, float(call.renormalised)))
        self.outs.append(call.ff_width)
        self.calls.append(call)
        return self._new(x.shape)


def _values(*arrays: object) -> tuple[int, ...]:
    """The numbers of values; -1 where there is none."""
    if not all(isinstance(a, Stand | None) for a in arrays):
        raise TypeError("a layer's steps are of what it is given and of other steps' results")
    return tuple(-1 if a is None else a.value for a in arrays)  # type: ignore[attr-defined]


def record(stack: Stack, shape: tuple[int, ...]) -> Steps:
    """Records what a layer does to an x of ``shape``, ``[R, T, D]``.

    Raises:
        TypeError: when the layer computes anything but what `Calls` offers.
    """
    recorder = _Recorder(prod(shape[:-1]), stack)
    result = stack.layer(Stand(0, shape), recorder.recording())  # type: ignore[arg-type]
    if (
        not isinstance(result, Stand)
        or result.value != recorder._values - 1
        or prod(result.shape) != prod(shape)
    ):
        raise TypeError("a layer's result must be that of its last step")
    return Steps(
        codes=tuple(recorder.codes),
        outs=tuple(recorder.outs),
        numbers=tuple(recorder.numbers),
        calls=tuple(recorder.calls),
    )
