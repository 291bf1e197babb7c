"""The device and the precision that an export computes with."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from precast.loaders.artifact.errors import PrecastError


@contextmanager
def on_cpu(work: str) -> Iterator[None]:
    """Use the CPU as JAX's default device.

    Args:
        work: the work that needs the CPU, as the subject of an error message, such as "the export".

    Raises:
        PrecastError: JAX's CPU backend does not load.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        raise PrecastError(
            f"{work} needs JAX's CPU backend, which JAX_PLATFORMS excludes; add cpu to that variable, or unset it."
        ) from None
    with jax.default_device(cpu):
        yield


@contextmanager
def on_cpu_in_float32() -> Iterator[None]:
    """Use the CPU as JAX's default device, and compute matrix products in full float32 precision.

    Raises:
        PrecastError: JAX's CPU backend does not load.
    """
    with on_cpu("the reference"), jax.default_matmul_precision("highest"):
        yield
