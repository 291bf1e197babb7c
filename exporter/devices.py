"""Where an export computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def available_memory() -> int | None:
    """Bytes that this machine can give away without swapping; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None
