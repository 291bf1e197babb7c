"""The record of a built program, and the removal of source paths from programs, for the builders of all targets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import jax

from precast.loaders.artifact.manifest import Program
from precast.loaders.progress import Step

# jax.export promises that its output can be read for six months.
STABLEHLO_LIFE = timedelta(days=180)


class BuiltProgram(Step):
    """A program that has been written: its record in the manifest, and the numbers that an export prints.

    Attributes:
        target: name of its target.
        program: its record in the manifest.
        lower_s: seconds spent on tracing and lowering; 0 if the program was lowered for an earlier target.
        compile_s: seconds spent on compiling; 0 for StableHLO alone.
        bytes: size of its files.
    """

    text: str = "building programs"
    target: str
    program: Program
    lower_s: float
    compile_s: float
    bytes: int


# Called with each program that has been written.
OnBuilt = Callable[[BuiltProgram], None]


@contextmanager
def without_source_locations() -> Iterator[None]:
    """Keep the paths and line numbers of Python files out of lowered programs."""
    before = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)
