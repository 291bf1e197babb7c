"""The kernels as plain functions of NumPy arrays, on each instruction set this CPU has."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from layers_calls import F32, LAYERS_CACHE, OUTS, STEPS, WEIGHTS, ones

from precast import kernels


@pytest.fixture(params=kernels.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test once for each instruction set; restore the choice afterwards."""
    if request.param not in kernels.supported_isas():
        pytest.skip(f"this CPU does not run {request.param}")
    kernels.force_isa(request.param)
    yield request.param
    kernels.force_isa(None)


@pytest.fixture(scope="session")
def jax() -> ModuleType:
    """jax, with precast's kernels registered."""
    jax = pytest.importorskip("jax")
    # Imported late, so that the tests of this folder skip without jaxlib.
    from precast.loaders.runtime import pjrt

    pjrt.register_kernels()
    return jax


@pytest.fixture(scope="session")
def refusal(jax: ModuleType) -> Callable[[Callable[[], object]], str]:
    """Return the error text of a refused call."""

    def refused(call: Callable[[], object]) -> str:
        # The type depends on whether jax has compiled this call before.
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="INVALID_ARGUMENT") as error:
            jax.block_until_ready(call())
        return str(error.value)

    return refused


@pytest.fixture(scope="session")
def linear(jax: ModuleType) -> Callable[..., list[np.ndarray]]:
    """``(x [M, in], layer, weights each a list of stacks, outs, …) -> results each [M, out]``.

    Keyword arguments: used, norm and eps, biases, residual, gate.
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
    """``(x [R, V], used: rows to compare, by default all) -> [R]``; version 1 has no `used` and compares all."""

    def run(x: np.ndarray, used: int | None = None, version: int = 2) -> np.ndarray:
        result = jax.ShapeDtypeStruct(x.shape[:1], np.int32)
        call = jax.ffi.ffi_call(f"precast.argmax.v{version}", result)
        rows = [np.int32(len(x) if used is None else used)] if version == 2 else []
        return np.asarray(call(x, *rows))

    return run


@pytest.fixture(scope="session")
def attention(jax: ModuleType) -> Callable[..., tuple[np.ndarray, list[np.ndarray]]]:
    """``(q, k, v, cos, sin, caches, layer, slots, starts, lengths, scale=, ...) -> (out, caches)``.

    `caches` are keys and values, for int8 followed by the scales of each; the call copies them. `aliases` maps operands
    to the results that reuse their memory; by default each cache result reuses its argument.
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


@pytest.fixture(scope="session")
def layers(jax: ModuleType) -> Callable[..., Any]:
    """Make a valid call of precast.layers, two sequences of four tokens, with some arguments replaced."""

    def run(**changed: Any) -> Any:
        good: dict[str, Any] = {
            "x": ones(8, 10),
            "used": np.int32(8),
            "cos": ones(1, 2, 4, 2),
            "sin": np.zeros((1, 2, 4, 2), F32),
            "caches": [np.zeros(LAYERS_CACHE, F32)] * 2,
            "slots": np.int32([2, 0]),
            "starts": np.int32([5, 0]),
            "lengths": np.int32([4, 3]),
            "weights": WEIGHTS,
            "heads": (6, 2, 4),
            "windows": (0, 0),
            "ropes": (0, 0),
            "steps": STEPS,
            "outs": OUTS,
            "numbers": (1e-5, 0, 0.5, 0, 0, 0, 0, 0, 0, 0),
            "y": (8, 10),
            "results": None,
            "aliases": None,
        }
        assert changed.keys() <= good.keys()
        c = SimpleNamespace(**(good | changed))
        shapes = [(a.shape, a.dtype) for a in c.caches] if c.results is None else c.results
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in ((c.y, F32), *shapes)]
        own = {4 + i: 1 + i for i in range(len(c.caches))}
        aliases = own if c.aliases is None else c.aliases
        call = jax.ffi.ffi_call("precast.layers.v2", results, input_output_aliases=aliases)
        return call(
            *(c.x, c.used, c.cos, c.sin, *c.caches, c.slots, c.starts, c.lengths, *c.weights),
            heads=np.array(c.heads, np.int64),
            windows=np.array(c.windows, np.int64),
            ropes=np.array(c.ropes, np.int64),
            steps=np.array([code for step in c.steps for code in step], np.int64),
            outs=np.array(c.outs, np.int64),
            numbers=np.array(c.numbers, F32),
        )

    return run
