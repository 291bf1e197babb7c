"""Where an export computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from precast.loaders.artifact.errors import PrecastError


@contextmanager
def on_cpu(what: str) -> Iterator[None]:
    """Computes on the CPU, whatever else JAX finds here.

    Args:
        what: begins the message: who needs a CPU.

    Raises:
        PrecastError: where JAX is told to leave CPUs alone.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        raise PrecastError(
            f"{what} CPUs, which JAX is told to leave alone here; add cpu to JAX_PLATFORMS or unset it."
        ) from None
    with jax.default_device(cpu):
        yield


@contextmanager
def precisely() -> Iterator[None]:
    """On the CPU, whatever else JAX finds here, and with products that are float32 throughout."""
    with on_cpu("the reference runs on"), jax.default_matmul_precision("highest"):
        yield
