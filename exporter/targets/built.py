"""What every builder of a target needs: the record of a built program, and programs without this machine's paths."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import jax

from precast.loaders.artifact.manifest import Program

# jax.export promises to read what it wrote for six months.
STABLEHLO_LIFE = timedelta(days=180)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A program that has been written, for progress and summary.

    Attributes:
        lower_s: seconds to trace and lower it, twice: for the executable and for the StableHLO.
        compile_s: seconds to compile it; 0 where nothing was compiled.
        bytes: of its files.
    """

    target: str
    program: Program
    lower_s: float
    compile_s: float
    bytes: int


@contextmanager
def without_source_locations() -> Iterator[None]:
    """Keeps paths and lines of this machine's Python files out of the programs."""
    before = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)
