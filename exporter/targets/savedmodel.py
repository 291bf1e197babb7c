"""A SavedModel, written with orbax-export: a signature for each program, and shared variables for the weights.

TensorFlow and orbax-export are slow to import, so they are imported only when a SavedModel is written.
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
from .built import STABLEHLO_LIFE, BuiltProgram, OnBuilt, without_source_locations
from .kinds import TargetKind

# Roles of the arguments that become variables. Constants would be part of the graph, a protobuf of at most 2 GB.
_VARIABLES = ("table", "weight")


def check_packages() -> None:
    """Check that the packages for writing a SavedModel are installed, without importing them.

    Raises:
        PrecastError: a package is missing; the message has the command that installs it.
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
    except (ImportError, ValueError):  # the parent package is missing or blocked
        return False


def build_savedmodel(
    kind: TargetKind,
    programs: Sequence[ProgramSpec],
    root: Path,
    created: date,
    on_built: OnBuilt,
) -> Target:
    """Write one SavedModel of all programs, with the weights of ``weights.safetensors``.

    The weights are mapped, and copied once into the SavedModel's variables. In the manifest, the programs of this
    target therefore have no weight arguments. No result reuses the memory of an argument.

    Args:
        kind: the kind of target.
        programs: the programs, of pure XLA operations.
        root: the artifact's folder, which already contains the weights.
        created: day of the export.
        on_built: called with each program that has been lowered.

    Raises:
        PrecastError: packages are missing, or TensorFlow refuses the model.
        OSError: a file cannot be written.
    """
    check_packages()
    folder = root / "programs" / kind.name
    with without_source_locations(), _quietly():
        records = _write(kind, programs, root, folder, on_built)
    gc.collect()  # TensorFlow's functions are reference cycles, which keep the variables alive
    # The fingerprint contains a random number, so exports would differ; no reader needs the fingerprint.
    (folder / "fingerprint.pb").unlink(missing_ok=True)
    for empty in [path for path in folder.iterdir() if path.is_dir() and not any(path.iterdir())]:
        empty.rmdir()  # the manifest lists only files, so a copy of the artifact would lack an empty folder
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
        # The SavedModel contains StableHLO written by jax.export, so `STABLEHLO_LIFE` applies to it.
        stablehlo_expires=(created + STABLEHLO_LIFE).isoformat(),
        programs=records,
    )


def _write(
    kind: TargetKind,
    programs: Sequence[ProgramSpec],
    root: Path,
    folder: Path,
    on_built: OnBuilt,
) -> tuple[Program, ...]:
    tf = import_tensorflow()
    from orbax.export import ExportManager, JaxModule

    weights = map_weights(root / WEIGHTS_FILE)
    used = {v.name for spec in programs for v in spec.arguments if v.role in _VARIABLES}
    module = JaxModule(
        {name: weights[name] for name in sorted(used)},
        {spec.name: _method(spec) for spec in programs},
        trainable=False,
        jax2tf_kwargs={spec.name: {"native_serialization_platforms": kind.lowered_for} for spec in programs},
    )
    manager = ExportManager(module, [_serving(tf, spec) for spec in programs])
    records = []
    for spec in programs:
        started = time.perf_counter()
        function: Any = manager.serving_signatures[spec.name]
        graph = function.get_concrete_function().graph.as_graph_def()
        program = _record(spec, (folder / SAVED_MODEL).relative_to(root).as_posix())
        seconds = time.perf_counter() - started
        on_built(
            BuiltProgram(
                target=kind.name, program=program, lower_s=seconds, compile_s=0.0, bytes=graph.ByteSize()
            )
        )
        records.append(program)
    try:
        manager.save(str(folder))
    except (
        tf.errors.ResourceExhaustedError,
        tf.errors.PermissionDeniedError,
        tf.errors.UnknownError,
    ) as error:
        raise OSError(error.message) from error  # TensorFlow raises one of these if the disk is full
    except tf.errors.OpError as error:
        raise PrecastError(
            f"target {kind.name!r}: TensorFlow cannot write the SavedModel ({error.message}); nothing was written:"
            " please report this."
        ) from error
    return tuple(records)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide TensorFlow's log lines about the files that it writes."""
    logger = logging.getLogger("tensorflow")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _inputs(spec: ProgramSpec) -> tuple[Value, ...]:
    """Return the arguments that are passed at each call; all others are variables."""
    return tuple(v for v in spec.arguments if v.role not in _VARIABLES)


def _method(spec: ProgramSpec) -> Callable[[Mapping[str, Array], Sequence[Array]], tuple[Array, ...]]:
    """Return a program in orbax's form: ``(parameters by name, inputs) -> results``."""
    variables = [v.name for v in spec.arguments if v.role in _VARIABLES]

    def method(parameters: Mapping[str, Array], inputs: Sequence[Array]) -> tuple[Array, ...]:
        return spec.function(*inputs, *(parameters[name] for name in variables))

    return method


def _serving(tf: Any, spec: ProgramSpec) -> Any:
    """Return the configuration of a program's signature, with the inputs and results that the manifest names."""
    from orbax.export import ServingConfig

    results = [_checked_name(v.name) for v in spec.results]
    return ServingConfig(
        spec.name,
        input_signature=[
            tf.TensorSpec(v.shape, numpy_dtype(v.dtype), name=_checked_name(v.name)) for v in _inputs(spec)
        ],
        tf_preprocessor=lambda *inputs: inputs,
        tf_postprocessor=lambda arrays: dict(zip(results, arrays, strict=True)),
        method_key=spec.name,
    )


def _checked_name(name: str) -> str:
    """Convert a name in the manifest to a name in a signature, and check that it converts back."""
    translated = signature_name(name)
    if manifest_name(translated) != name:
        raise RuntimeError(f"{name!r} becomes {translated!r} in a signature, which does not convert back")
    return translated


def _record(spec: ProgramSpec, executable: str) -> Program:
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
