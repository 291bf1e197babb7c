"""The kernels as plain functions of NumPy arrays, on each instruction set this CPU has."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from precast import kernels


@pytest.fixture(params=kernels.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for every instruction set, and always gives back the choice."""
    if request.param not in kernels.supported_isas():
        pytest.skip(f"this CPU does not run {request.param}")
    kernels.force_isa(request.param)
    yield request.param
    kernels.force_isa(None)


@pytest.fixture(scope="session")
def jax() -> ModuleType:
    """jax, with precast's kernels registered."""
    jax = pytest.importorskip("jax")
    # Not at the top: without jaxlib nothing in this folder could say what is missing.
    from precast.loaders.runtime import pjrt

    pjrt.register_kernels()
    return jax


@pytest.fixture(scope="session")
def refusal(jax: ModuleType) -> Callable[[Callable[[], object]], str]:
    """What a call was refused with."""

    def refused(call: Callable[[], object]) -> str:
        # Which of the two depends on whether jax has made this call before.
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="INVALID_ARGUMENT") as error:
            jax.block_until_ready(call())
        return str(error.value)

    return refused


@pytest.fixture(scope="session")
def linear(jax: ModuleType) -> Callable[..., list[np.ndarray]]:
    """``(x [M, in], layer, weights each a list of stacks, outs, …) -> results each [M, out]``.

    What may follow: used, norm and eps, biases, residual, gate.
    """

    @partial(jax.jit, static_argnames=("outs", "eps", "norm", "residual", "bias", "gate"))
    def call(*operands: Any, outs: tuple[int, ...], eps: float, **attributes: Any) -> Any:
        results = [jax.ShapeDtypeStruct((operands[0].shape[0], n), np.float32) for n in outs]
        target = jax.ffi.ffi_call("precast.linear.v1", results)
        return target(*operands, eps=np.float32(eps), **attributes)

    def run(
        x: np.ndarray,
        layer: int,
        weights: Sequence[Sequence[np.ndarray]],
        outs: Sequence[int],
        *,
        used: int | None = None,
        norm: np.ndarray | None = None,
        eps: float = 0.0,
        biases: Sequence[np.ndarray] = (),
        residual: np.ndarray | None = None,
        gate: str = "",
    ) -> list[np.ndarray]:
        operands = [a for a in (norm, residual) if a is not None]
        for i, arrays in enumerate(weights):
            operands += [*arrays, *biases[i : i + 1]]
        results = call(
            x,
            np.int32(layer),
            np.int32(len(x) if used is None else used),
            *operands,
            outs=tuple(outs[:1] if gate else outs),
            eps=eps,
            norm=norm is not None,
            residual=residual is not None,
            bias=bool(biases),
            gate=gate,
        )
        return [np.asarray(y) for y in results]

    return run


@pytest.fixture(scope="session")
def embed(jax: ModuleType) -> Callable[..., np.ndarray]:
    """``(tokens [M], arrays of the weights, V, D) -> [M, D]``."""

    def run(tokens: np.ndarray, arrays: Sequence[np.ndarray], vocab: int, width: int) -> np.ndarray:
        result = jax.ShapeDtypeStruct((len(tokens), width), np.float32)
        return np.asarray(
            jax.ffi.ffi_call("precast.embed.v1", result)(tokens, *arrays, vocab=np.int64(vocab))
        )

    return run


@pytest.fixture(scope="session")
def argmax(jax: ModuleType) -> Callable[..., np.ndarray]:
    """``x [R, V] -> [R]``."""

    def run(x: np.ndarray) -> np.ndarray:
        result = jax.ShapeDtypeStruct(x.shape[:1], np.int32)
        return np.asarray(jax.ffi.ffi_call("precast.argmax.v1", result)(x))

    return run


@pytest.fixture(scope="session")
def attention(jax: ModuleType) -> Callable[..., tuple[np.ndarray, list[np.ndarray]]]:
    """``(q, k, v, cos, sin, caches, layer, slots, starts, lengths, scale=, ...) -> (out, caches)``.

    `caches` are keys and values, for int8 followed by the scales of each; those given are copied, not changed.
    `aliases` says which operand which result reuses, instead of every cache its own.
    """

    @partial(jax.jit, static_argnames=("aliases", "attributes"))
    def call(
        operands: Any, caches: Any, places: Any, *, aliases: tuple[tuple[int, int], ...], attributes: Any
    ) -> Any:
        results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (operands[0], *caches)]
        target = jax.ffi.ffi_call("precast.attention.v2", results, input_output_aliases=dict(aliases))
        return target(*operands, *caches, *places, **dict(attributes))

    def run(
        *operands: Any,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
        aliases: dict[int, int] | None = None,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        caches, places = operands[5], [np.asarray(a, np.int32) for a in operands[6:]]
        own = {5 + i: 1 + i for i in range(len(caches))}
        pairs = tuple((own if aliases is None else aliases).items())
        numbers = {"scale": np.float32(scale), "window": np.int64(window), "soft_cap": np.float32(soft_cap)}
        attributes = tuple(numbers.items())
        out, *after = call(operands[:5], caches, places, aliases=pairs, attributes=attributes)
        return np.asarray(out), [np.asarray(a) for a in after]

    return run
