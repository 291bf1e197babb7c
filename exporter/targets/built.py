"""Shared parts of the builders: the record of a built program, and programs free of this machine's paths."""

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
        lower_s: seconds of tracing and lowering; a target with executables does both twice.
        compile_s: seconds of compiling; 0 for StableHLO alone.
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
