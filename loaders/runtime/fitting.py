"""Refuse a CPU that jaxlib was not compiled for before jaxlib loads: an illegal instruction would end the process."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..artifact.errors import PrecastError
from ..artifact.machine import cpu_features, processor_family


@contextmanager
def jaxlib_for_this_cpu() -> Iterator[None]:
    """Guard the import of jaxlib's library.

    Raises:
        PrecastError: this CPU lacks a feature that jaxlib was compiled for, which is AVX in its wheels.
    """
    features = cpu_features()
    if features and processor_family() == "x86_64" and "avx" not in features:
        from jaxlib import cpu_feature_guard  # which records how jaxlib was built

        try:
            cpu_feature_guard.check_cpu_features()
        except RuntimeError:
            raise PrecastError(
                "jaxlib cannot run on this CPU, which lacks AVX; use a CPU of 2011 or later, or have the virtual"
                " machine show the features of its host (CPU type host)."
            ) from None
    yield
