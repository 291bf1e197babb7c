"""The device and the precision that an export computes with."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from precast.loaders.artifact.errors import PrecastError


@contextmanager
def on_cpu(user: str) -> Iterator[None]:
    """Make the CPU JAX's default device.

    Args:
        user: the work that needs the CPU, which begins the error message.

    Raises:
        PrecastError: JAX may not use the CPU.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        raise PrecastError(
            f"{user} needs the CPU, which JAX may not use here; add cpu to JAX_PLATFORMS or unset it."
        ) from None
    with jax.default_device(cpu):
        yield


@contextmanager
def on_cpu_in_float32() -> Iterator[None]:
    """Make the CPU JAX's default device, and compute matrix products in full float32 precision.

    Raises:
        PrecastError: JAX may not use the CPU.
    """
    with on_cpu("the reference"), jax.default_matmul_precision("highest"):
        yield
