"""A layer as a list of steps, for the kernel that runs all layers in one call.

`record` calls a layer with stand-ins for its arrays, and notes what it asks of the target: products and attention.
A layer that does anything else with them fails here; `xla_ops.looped` is for such.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from jax import Array

from .ops import LinearCall

GATES = ("", "silu", "gelu_tanh")
_LINEAR, _ATTENTION = 0, 1


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
    calls: tuple[LinearCall, ...]


Layer = Callable[[Array, Callable, Callable], Array]


class _Recorder:
    def __init__(self, rows: int, heads: tuple[int, int, int], scale: float) -> None:
        self._rows, self._heads, self._scale, self._values = rows, heads, scale, 1
        self.codes: list[int] = []
        self.outs: list[int] = []
        self.numbers: list[float] = []
        self.calls: list[LinearCall] = []

    def _new(self, shape: tuple[int, ...]) -> Stand:
        self._values += 1
        return Stand(self._values - 1, shape)

    def project(self, x: Stand, call: LinearCall) -> list[Stand]:
        if not all(isinstance(a, Stand | None) for a in (x, call.residual)):
            raise TypeError("a layer's products are of what it is given and of other steps' results")
        residual = -1 if call.residual is None else call.residual.value  # type: ignore[attr-defined]
        flags = (call.norm is not None, bool(call.biases), GATES.index(call.gate), len(call.weights))
        self.codes += [_LINEAR, x.value, residual, *map(int, flags), 0]
        self.outs += call.outs
        self.numbers += [call.eps, 0.0]
        self.calls.append(call)
        return [self._new((self._rows, n)) for n in call.results]

    def attend(self, q: Stand, k: Stand, v: Stand) -> Stand:
        n, kv, h = self._heads
        if [a.shape[-2:] for a in (q, k, v)] != [(n, h), (kv, h), (kv, h)]:
            raise TypeError(
                f"attention of heads {[a.shape[-2:] for a in (q, k, v)]} where {self._heads} were said"
            )
        self.codes += [_ATTENTION, q.value, k.value, v.value, 0, 0, 0, 0]
        self.numbers += [self._scale, 0.0]
        return self._new(q.shape)


def record(layer: Layer, shape: tuple[int, ...], heads: tuple[int, int, int], scale: float) -> Steps:
    """Records what a layer does to an x of ``shape``, ``[R, T, D]``.

    Args:
        layer: ``(x, attend, project) -> x``.
        heads: N, K and H.
        scale: of attention scores.

    Raises:
        TypeError: when the layer computes anything but products and attention.
    """
    recorder = _Recorder(prod(shape[:-1]), heads, scale)
    result = layer(Stand(0, shape), recorder.attend, recorder.project)  # type: ignore[arg-type]
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
