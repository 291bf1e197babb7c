"""Compile or load the executables of a checked artifact, and open the device that runs them."""

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from .artifact.errors import PrecastError
from .artifact.frozen import Frozen
from .artifact.machine import Machine
from .artifact.manifest import Manifest, Program, Target
from .artifact.weights import numpy_dtype
from .runtime import pjrt
from .runtime.interface import Buffer, Client, Executable

if TYPE_CHECKING:
    from .compiling.cache import LocalExecutable
    from .progress import Progress
    from .text.known_tokenizers import KnownTokenizers


class LoadSettings(Frozen):
    """The arguments of `load` after they have been checked; `load` describes those not listed here.

    Attributes:
        threads: number of threads that XLA computes with.
        requested_threads: the caller's argument `threads`; None if the caller left it out.
        prefix_memory: maximum number of bytes for keys and values of earlier prompts; None for the default.
    """

    target: str | None = None
    rehash: bool = False
    allow_compile: bool = False
    trusted: bool
    threads: int
    requested_threads: int | None = None
    prefix_memory: int | None = 0
    log: Callable[[str], None]
    progress: "Progress | None" = None
    tokenizers: "KnownTokenizers | None" = None


class CheckedArtifact(Frozen):
    """A target and the files that it needs, all checked against the manifest.

    Attributes:
        root: the artifact's folder.
        manifest: the artifact's manifest.
        target: the target to run.
        contents: contents of the programs, the tokenizer and the templates, by file name.
        weights: arrays by name, mapped from their file; empty for a SavedModel, which contains its own weights.
        check_unchanged: a function that raises PrecastError if the weight file has been written to since it was mapped.
    """

    root: Path
    manifest: Manifest
    target: Target
    contents: Mapping[str, bytes]
    weights: Mapping[str, np.ndarray]
    check_unchanged: Callable[[], None]


def runs_on_xla_cpu(target: Target) -> bool:
    """Return True if XLA's CPU client runs the target. It also runs targets for the platform "any"."""
    return target.runtime != "savedmodel" and target.platform != "cuda"


def compile_executables(
    artifact: CheckedArtifact, machine: Machine, settings: LoadSettings
) -> "dict[str, LocalExecutable]":
    """Compile a StableHLO target for the CPU in a child process, or take its executables from the cache folder.

    Returns:
        Executables by program name; empty for any other kind of target.
    """
    root, target = artifact.root, artifact.target
    if target.runtime != "stablehlo":
        return {}
    if date.today().isoformat() > target.stablehlo_expires:
        settings.log(
            f"{root}: its StableHLO was guaranteed to compile until {target.stablehlo_expires}; compiling it anyway"
        )
    if target.platform == "cuda":
        # The child process compiles for the CPU only, and the cache folder stores only executables for the CPU.
        settings.log(
            f"{root}: target {target.name!r}: compiling its programs for the GPU, which happens at every start …"
        )
        return {}
    from .compiling.cache import executables

    programs = [(p.name, artifact.contents[_file_of(target, p)]) for p in target.programs]
    where = f"{root}: target {target.name!r}"
    return executables(programs, machine, where, threads=settings.threads, log=settings.log)


def open_runtime(
    artifact: CheckedArtifact, compiled: "Mapping[str, LocalExecutable]", settings: LoadSettings
) -> tuple[Client, Callable[[], Mapping[str, Executable]]]:
    """Return a client for the device that runs the target, and a function that loads the target's programs."""
    root, target = artifact.root, artifact.target
    if target.runtime == "savedmodel":
        return _tensorflow(artifact, settings)
    if target.platform == "cuda":
        from .runtime import cuda  # a lazy import, because it loads CUDA's libraries

        if settings.requested_threads is not None:
            settings.log(
                f"{root}: target {target.name!r} runs on the GPU, so the number of threads is ignored"
            )
        client: pjrt.Client = cuda.client(target.device)
    else:
        client = pjrt.client(settings.threads)
    return client, partial(_load_executables, artifact, compiled, client, settings)


def _tensorflow(
    artifact: CheckedArtifact, settings: LoadSettings
) -> tuple[Client, Callable[[], Mapping[str, Executable]]]:
    from .runtime import savedmodel  # a lazy import, because it imports TensorFlow

    root, target = artifact.root, artifact.target
    settings.log(
        f"{root}: TensorFlow runs target {target.name!r}, and compiles each program when it is first called"
    )
    _report(settings, "the SavedModel")
    client = savedmodel.client()
    if settings.requested_threads is not None and not savedmodel.set_threads(settings.requested_threads):
        settings.log(f"{root}: TensorFlow already runs in this process, so the number of threads is ignored")
    return client, partial(savedmodel.load, root, target, artifact.manifest.files, rehash=settings.rehash)


def _load_executables(
    artifact: CheckedArtifact,
    compiled: "Mapping[str, LocalExecutable]",
    client: pjrt.Client,
    settings: LoadSettings,
) -> dict[str, Executable]:
    """Load the programs of an XLA target; prefer an executable in `compiled` to the artifact's file."""
    target = artifact.target
    executables: dict[str, Executable] = {}
    for program in target.programs:
        results = [
            pjrt.Result(shape=value.physical, dtype=numpy_dtype(value.dtype)) for value in program.results
        ]
        name = _file_of(target, program)
        where = str(artifact.root / name)
        _report(settings, program.name)
        if (local := compiled.get(program.name)) is not None:
            executables[program.name] = _load_local(client, local, results, where)
        elif target.runtime == "stablehlo":
            executables[program.name] = client.compile(artifact.contents[name], results, where)
        else:
            make = partial(client.load, artifact.contents[name], results, where)
            # The score program is deserialised at its first call, because many processes never score.
            executables[program.name] = _LazyExecutable(make) if program.kind == "score" else make()
    return executables


class _LazyExecutable:
    """An executable that is deserialised at its first call. Threads may share it."""

    compiled = False

    def __init__(self, load: Callable[[], Executable]) -> None:
        self._load: Callable[[], Executable] | None = load
        self._loading = Lock()
        self._loaded: Executable | None = None

    def __call__(self, arguments: Sequence[Buffer]) -> list[Buffer]:
        """Run the program, as `Executable` does.

        Raises:
            PrecastError: XLA cannot load the program, or the program refuses the arguments.
        """
        with self._loading:
            if self._loaded is None:
                assert self._load is not None
                self._loaded, self._load = self._load(), None  # frees the serialised bytes
        return self._loaded(arguments)


def _load_local(
    client: pjrt.Client, local: "LocalExecutable", results: Sequence[pjrt.Result], where: str
) -> pjrt.Executable:
    try:
        executable = client.load(local.executable, results, where)
    except PrecastError:
        if local.is_new:
            raise
        # The cached executable may come from another build of jaxlib with the same version.
        local = local.recompile()
        executable = client.load(local.executable, results, where)
    executable.compiled = local.is_new
    return executable


def _file_of(target: Target, program: Program) -> str:
    name = target.file_of(program)
    assert name is not None  # `parse_manifest` has checked this
    return name


def _report(settings: LoadSettings, name: str) -> None:
    """Report that a program is about to be loaded."""
    if settings.progress is not None:
        from .progress import Step  # a lazy import, because few callers ask for progress

        settings.progress(Step(text=f"loading {name}"))
