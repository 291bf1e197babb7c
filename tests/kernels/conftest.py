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
def matmul(jax: ModuleType) -> Callable[..., list[np.ndarray]]:
    """``(x [M, in], layer, weights each [L, out, in], used=M) -> results each [M, out]``."""

    @jax.jit
    def call(x: Any, layer: Any, used: Any, *weights: Any) -> Any:
        results = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), np.float32) for w in weights]
        return jax.ffi.ffi_call("precast.matmul.v1", results)(x, layer, used, *weights)

    def run(
        x: np.ndarray, layer: int, weights: Sequence[np.ndarray], used: int | None = None
    ) -> list[np.ndarray]:
        true_rows = np.int32(len(x) if used is None else used)
        return [np.asarray(y) for y in call(x, np.int32(layer), true_rows, *weights)]

    return run


@pytest.fixture(scope="session")
def attention(jax: ModuleType) -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``(q, k, v, keys, values, layer, slots, starts, lengths, scale=, aliases=) -> (out, keys, values)``.

    The caches given are copied, not changed. `aliases` says which argument which result reuses.
    """

    @partial(jax.jit, static_argnames=("scale", "aliases"))
    def call(*arrays: Any, scale: float, aliases: tuple[tuple[int, int], ...]) -> Any:
        results = [jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in (0, 3, 4)]
        target = jax.ffi.ffi_call("precast.attention.v1", results, input_output_aliases=dict(aliases))
        return target(*arrays, scale=np.float32(scale))

    def run(
        *arrays: Any, scale: float, aliases: dict[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pairs = tuple(({3: 1, 4: 2} if aliases is None else aliases).items())
        integers = [np.asarray(a, np.int32) for a in arrays[5:]]
        out, keys, values = call(*arrays[:5], *integers, scale=scale, aliases=pairs)
        return np.asarray(out), np.asarray(keys), np.asarray(values)

    return run
