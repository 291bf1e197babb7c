"""A layer as a list of steps, for the kernel that runs all layers in one call.

`record` calls a layer with proxies in place of arrays and records the operations of `LayerOps` that the layer calls.
`record` raises an error for a layer that does anything else with the proxies; `xla_ops.layer_loop` can run such layers.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from .ops import ExpertsCall, LayerOps, LayerStack, LinearCall, NormCall

GATES = ("", "silu", "gelu_tanh")
STEP_INTEGERS = 8


# A step code describes an operation of a layer to the kernel, in integers. kernels/src/step_codes.h has the same fields
# and documents them.
class LinearCode(NamedTuple):
    """The step code of a `LinearCall`."""

    x: int
    residual: int
    has_norm: int
    has_bias: int
    gate: int
    weights: int


class AttentionCode(NamedTuple):
    """The step code of a call of `LayerOps.attend`."""

    q: int
    k: int
    v: int


class NormCode(NamedTuple):
    """The step code of a `NormCall`."""

    x: int
    residual: int
    width: int
    has_bias: int


class ExpertsCode(NamedTuple):
    """The step code of an `ExpertsCall`."""

    x: int
    scores: int
    residual: int
    has_norm: int
    gate: int
    experts: int
    chosen: int


Code = LinearCode | AttentionCode | NormCode | ExpertsCode
# The first integer of a step is its kind: the index of its class in this tuple.
CODES: tuple[type[Code], ...] = (LinearCode, AttentionCode, NormCode, ExpertsCode)


@dataclass(frozen=True)
class Proxy:
    """A stand-in for an array ``[…, width]``, used while a layer is recorded.

    Attributes:
        value: index of the array; 0 is the layer's input, and the results of each step take the next indices.
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
    """A layer in the form that the kernel ``precast.layers`` expects; see kernels/src/step_codes.h.

    Attributes:
        codes: eight integers for each step (kind, code and padding).
        outs: the number of outputs of each weight of a `LinearCall`, and the feed-forward width of each
            `ExpertsCall`, in the order of the steps.
        numbers: two floats for each step, such as the epsilon of a norm.
        calls: the calls that have weights, in the order of the steps.
    """

    codes: tuple[int, ...]
    outs: tuple[int, ...]
    numbers: tuple[float, ...]
    calls: tuple[LinearCall | NormCall | ExpertsCall, ...]


class _Recorder:
    """The operations of `LayerOps` for proxies; each call records a step."""

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

    def _add_step(self, code: Code, numbers: tuple[float, float]) -> None:
        integers = (CODES.index(type(code)), *code)
        self.codes += [*integers, *[0] * (STEP_INTEGERS - len(integers))]
        self.numbers += numbers

    def project(self, x: Proxy, call: LinearCall) -> list[Proxy]:
        code = LinearCode(
            x=_value(x),
            residual=_value_or_none(call.residual),
            has_norm=int(call.norm is not None),
            has_bias=int(bool(call.biases)),
            gate=GATES.index(call.gate),
            weights=len(call.weights),
        )
        self._add_step(code, (call.eps, 0.0))
        self.outs += call.outs
        self.calls.append(call)
        return [self._add_value((self._rows, n)) for n in call.results]

    def normalize(self, x: Proxy, call: NormCall) -> Proxy:
        code = NormCode(
            x=_value(x),
            residual=_value_or_none(call.residual),
            width=call.width,
            has_bias=int(call.bias is not None),
        )
        self._add_step(code, (call.eps, 0.0))
        self.calls.append(call)
        return self._add_value(x.shape)

    def attend(self, q: Proxy, k: Proxy, v: Proxy) -> Proxy:
        n, kv, h = self._stack.heads
        if [a.shape[-2:] for a in (q, k, v)] != [(n, h), (kv, h), (kv, h)]:
            raise TypeError(
                f"expected attention heads {self._stack.heads}, found {[a.shape[-2:] for a in (q, k, v)]}"
            )
        code = AttentionCode(q=q.value, k=k.value, v=v.value)
        self._add_step(code, (self._stack.scale, self._stack.soft_cap))
        return self._add_value(q.shape)

    def mix(self, x: Proxy, scores: Proxy, call: ExpertsCall) -> Proxy:
        code = ExpertsCode(
            x=_value(x),
            scores=_value(scores),
            residual=_value_or_none(call.residual),
            has_norm=int(call.norm is not None),
            gate=GATES.index(call.activation),
            experts=call.experts,
            chosen=call.experts_per_token,
        )
        self._add_step(code, (call.eps, float(call.renormalised)))
        self.outs.append(call.ff_width)
        self.calls.append(call)
        return self._add_value(x.shape)


def _value(array: object) -> int:
    if not isinstance(array, Proxy):
        raise TypeError("a layer's step takes only the layer's input and the results of other steps")
    return array.value


def _value_or_none(array: object) -> int:
    """Return the index of the array that a proxy stands for, or −1 for None."""
    return -1 if array is None else _value(array)


def record(stack: LayerStack, shape: tuple[int, ...]) -> Steps:
    """Record the steps of a layer whose input has ``shape``, ``[R, T, D]``.

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
