"""Code that all builders share: the record of a built program, and the removal of source paths from programs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import jax

from precast.loaders.artifact.manifest import Program
from precast.loaders.progress import Step

# jax.export promises that its output can be read for six months.
STABLEHLO_LIFE = timedelta(days=180)


class BuiltProgram(Step):
    """A program that has been written, as the progress and the summary of an export show it.

    Attributes:
        target: name of its target.
        program: its record in the manifest.
        lower_s: seconds spent on tracing and lowering, which happen twice for a target with executables for a GPU.
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
