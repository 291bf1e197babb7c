"""A SavedModel, through orbax-export: a signature for each program, the weights as variables that all of them share.

TensorFlow and orbax-export are imported when one is written, and not before.
"""

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jax import Array

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import WEIGHTS_FILE, Program, Target, Value
from precast.loaders.artifact.weights import map_weights, numpy_dtype
from precast.loaders.runtime.savedmodel import (
    SAVED_MODEL,
    import_tensorflow,
    manifest_name,
    signature_name,
)

from ..programs import ProgramSpec
from . import TargetKind
from .built import STABLEHLO_LIFE, Built, without_source_locations

# Roles of what becomes a variable. Constants would stand in the graph, whose message holds 2 GB at most.
_CONSTANTS = ("table", "weight")


def check_packages() -> None:
    """Looks for what writing a SavedModel takes, without importing it.

    Raises:
        PrecastError: with the command that installs what is missing.
    """
    used = {"orbax.export": "orbax-export", "tensorflow": "TensorFlow"}
    missing = [package for module, package in used.items() if not _is_installed(module)]
    if missing:
        raise PrecastError(
            f"exporting a SavedModel needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not"
            " installed: pip install 'precast[export-savedmodel]'"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it is missing, or refused
        return False


def build_savedmodel(
    kind: TargetKind,
    programs: Sequence[ProgramSpec],
    root: Path,
    created: date,
    report: Callable[[Built], None],
) -> Target:
    """Writes one SavedModel of all programs, with the weights of ``weights.safetensors``.

    The weights are mapped, and copied once: into the variables. In the manifest they are no arguments of the programs,
    and nothing is aliased.

    Args:
        kind: which target.
        programs: built with operations in pure XLA.
        root: the artifact's folder, its weights in it.
        created: day of the export.
        report: called with each program as it is lowered.

    Raises:
        PrecastError: when packages are missing.
        OSError: when the disk does not take it.
    """
    check_packages()
    folder = root / "programs" / kind.name
    with without_source_locations(), _quietly():
        described = _write(kind, programs, root, folder, report)
    gc.collect()  # functions of TensorFlow's refer to themselves, and to the variables
    # A random number in it would make every export another; nothing needs it.
    (folder / "fingerprint.pb").unlink(missing_ok=True)
    for empty in [path for path in folder.iterdir() if path.is_dir() and not any(path.iterdir())]:
        empty.rmdir()  # for assets; what copies files alone would lose it
    return Target(
        name=kind.name,
        runtime=kind.runtime,
        platform=kind.platform,
        device="any",
        machine="any",
        jaxlib="any",
        cpu_features=(),
        kernel_abi=0,
        kernels=(),
        xla_flags="",
        # XLA's programs inside it keep what jax.export promises.
        stablehlo_expires=(created + STABLEHLO_LIFE).isoformat(),
        programs=described,
    )


def _write(
    kind: TargetKind,
    programs: Sequence[ProgramSpec],
    root: Path,
    folder: Path,
    report: Callable[[Built], None],
) -> tuple[Program, ...]:
    tf = import_tensorflow()
    from orbax.export import ExportManager, JaxModule

    weights = map_weights(root / WEIGHTS_FILE)
    used = {v.name for spec in programs for v in spec.arguments if v.role in _CONSTANTS}
    module = JaxModule(
        {name: weights[name] for name in sorted(used)},
        {spec.name: _method(spec) for spec in programs},
        trainable=False,
        jax2tf_kwargs={spec.name: {"native_serialization_platforms": kind.lowered_for} for spec in programs},
    )
    manager = ExportManager(module, [_serving(tf, spec) for spec in programs])
    described = []
    for spec in programs:
        started = time.perf_counter()
        function: Any = manager.serving_signatures[spec.name]
        graph = function.get_concrete_function().graph.as_graph_def()
        program = _described(spec, (folder / SAVED_MODEL).relative_to(root).as_posix())
        seconds = time.perf_counter() - started
        report(
            Built(target=kind.name, program=program, lower_s=seconds, compile_s=0.0, bytes=graph.ByteSize())
        )
        described.append(program)
    try:
        manager.save(str(folder))
    except (
        tf.errors.ResourceExhaustedError,
        tf.errors.PermissionDeniedError,
        tf.errors.UnknownError,
    ) as error:
        raise OSError(error.message) from error  # which a full disk is to TensorFlow
    except tf.errors.OpError as error:
        raise PrecastError(
            f"target {kind.name!r}: TensorFlow cannot write it ({error.message}); nothing was written: please report"
            " this."
        ) from error
    return tuple(described)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps TensorFlow from telling what it has written, and where."""
    logger = logging.getLogger("tensorflow")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _inputs(spec: ProgramSpec) -> tuple[Value, ...]:
    """Arguments that are given to every call."""
    return tuple(v for v in spec.arguments if v.role not in _CONSTANTS)


def _method(spec: ProgramSpec) -> Callable[[Mapping[str, Array], Sequence[Array]], tuple[Array, ...]]:
    """A program as orbax takes one: ``(parameters by name, inputs) -> results``."""
    constants = [v.name for v in spec.arguments if v.role in _CONSTANTS]

    def method(parameters: Mapping[str, Array], inputs: Sequence[Array]) -> tuple[Array, ...]:
        return spec.function(*inputs, *(parameters[name] for name in constants))

    return method


def _serving(tf: Any, spec: ProgramSpec) -> Any:
    """The signature of a program: flat, with the manifest's names."""
    from orbax.export import ServingConfig

    results = [_checked_name(v.name) for v in spec.results]
    return ServingConfig(
        spec.name,
        input_signature=[
            tf.TensorSpec(v.shape, numpy_dtype(v.dtype), name=_checked_name(v.name)) for v in _inputs(spec)
        ],
        tf_preprocessor=lambda *inputs: inputs,
        tf_postprocessor=lambda given: dict(zip(results, given, strict=True)),
        method_key=spec.name,
    )


def _checked_name(name: str) -> str:
    written = signature_name(name)
    if manifest_name(written) != name:
        raise RuntimeError(f"{name}: no name of a signature leads back to it")
    return written


def _described(spec: ProgramSpec, executable: str) -> Program:
    return Program(
        name=spec.name,
        kind=spec.kind,
        tokens=spec.tokens,
        executable=executable,
        stablehlo=None,
        arguments=_inputs(spec),
        results=tuple(dataclasses.replace(v, alias=None) for v in spec.results),
        flops=spec.flops,
        memory=None,
    )
