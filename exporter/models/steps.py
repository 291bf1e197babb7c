"""A layer as a list of steps, for the kernel that runs all layers in one call.

`record` calls a layer with proxies for its arrays and records the operations that it asks of the target. A layer that
does anything else with the proxies fails here; `xla_ops.layer_loop` can run such a layer.
"""

from dataclasses import dataclass
from math import prod

from .ops import ExpertsCall, LayerOps, LayerStack, LinearCall, NormCall

GATES = ("", "silu", "gelu_tanh")
_LINEAR, _ATTENTION, _NORM, _EXPERTS = range(4)


@dataclass(frozen=True)
class Proxy:
    """A proxy for an array ``[…, width]`` of the call's rows while a layer is recorded.

    Attributes:
        value: number of the value: 0 is the layer's input, and each step adds its results.
        shape: shape of the array.
    """

    value: int
    shape: tuple[int, ...]

    def reshape(self, *shape: int) -> "Proxy":
        size = prod(self.shape)
        if -1 in shape:
            rest = -prod(shape)
            shape = tuple(size // rest if n == -1 else n for n in shape)
        if prod(shape) != size:
            raise TypeError(f"cannot reshape {self.shape} into {shape}")
        return Proxy(self.value, shape)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A layer in the form of attributes and operands of ``precast.layers``; see kernels/src/layers_ffi.cc.

    Attributes:
        codes: eight integers for each step.
        outs: widths of the results, in the order of the steps.
        numbers: two floats for each step.
        calls: the calls with weights, in the order of the steps.
    """

    codes: tuple[int, ...]
    outs: tuple[int, ...]
    numbers: tuple[float, ...]
    calls: tuple[LinearCall | NormCall | ExpertsCall, ...]


class _Recorder:
    """The target's operations on proxies; each call adds a step."""

    def __init__(self, rows: int, stack: LayerStack) -> None:
        self._rows, self._stack, self._values = rows, stack, 1
        self.codes: list[int] = []
        self.outs: list[int] = []
        self.numbers: list[float] = []
        self.calls: list[LinearCall | NormCall | ExpertsCall] = []

    def layer_ops(self) -> LayerOps:
        return LayerOps(
            project=self.project,  # type: ignore[arg-type]
            normalize=self.normalize,  # type: ignore[arg-type]
            attend=self.attend,  # type: ignore[arg-type]
            mix=self.mix,  # type: ignore[arg-type]
        )

    def _add_value(self, shape: tuple[int, ...]) -> Proxy:
        self._values += 1
        return Proxy(self._values - 1, shape)

    def _add_step(self, code: tuple[int, ...], numbers: tuple[float, float]) -> None:
        self.codes += [*code, *[0] * (8 - len(code))]
        self.numbers += numbers

    def project(self, x: Proxy, call: LinearCall) -> list[Proxy]:
        values = _values(x, call.residual)
        flags = (call.norm is not None, bool(call.biases), GATES.index(call.gate), len(call.weights))
        self._add_step((_LINEAR, *values, *map(int, flags)), (call.eps, 0.0))
        self.outs += call.outs
        self.calls.append(call)
        return [self._add_value((self._rows, n)) for n in call.results]

    def normalize(self, x: Proxy, call: NormCall) -> Proxy:
        values = _values(x, call.residual)
        self._add_step((_NORM, *values, call.width, int(call.bias is not None)), (call.eps, 0.0))
        self.calls.append(call)
        return self._add_value(x.shape)

    def attend(self, q: Proxy, k: Proxy, v: Proxy) -> Proxy:
        n, kv, h = self._stack.heads
        if [a.shape[-2:] for a in (q, k, v)] != [(n, h), (kv, h), (kv, h)]:
            raise TypeError(
                f"expected attention heads {self._stack.heads}, found {[a.shape[-2:] for a in (q, k, v)]}"
            )
        self._add_step((_ATTENTION, q.value, k.value, v.value), (self._stack.scale, self._stack.soft_cap))
        return self._add_value(q.shape)

    def mix(self, x: Proxy, scores: Proxy, call: ExpertsCall) -> Proxy:
        values = _values(x, scores, call.residual)
        routing = (
            int(call.norm is not None),
            GATES.index(call.activation),
            call.experts,
            call.experts_per_token,
        )
        self._add_step((_EXPERTS, *values, *routing), (call.eps, float(call.renormalised)))
        self.outs.append(call.ff_width)
        self.calls.append(call)
        return self._add_value(x.shape)


def _values(*arrays: object) -> tuple[int, ...]:
    """Return the numbers of values, −1 for None."""
    if not all(isinstance(a, Proxy | None) for a in arrays):
        raise TypeError("a layer's step takes only the layer's input and the results of other steps")
    return tuple(-1 if a is None else a.value for a in arrays)  # type: ignore[attr-defined]


def record(stack: LayerStack, shape: tuple[int, ...]) -> Steps:
    """Record the steps of a layer on an x of ``shape``, ``[R, T, D]``.

    Raises:
        TypeError: the layer computes something that `LayerOps` does not offer.
    """
    recorder = _Recorder(prod(shape[:-1]), stack)
    result = stack.layer(Proxy(0, shape), recorder.layer_ops())  # type: ignore[arg-type]
    if (
        not isinstance(result, Proxy)
        or result.value != recorder._values - 1
        or prod(result.shape) != prod(shape)
    ):
        raise TypeError("a layer must return the result of its last step")
    return Steps(
        codes=tuple(recorder.codes),
        outs=tuple(recorder.outs),
        numbers=tuple(recorder.numbers),
        calls=tuple(recorder.calls),
    )
