"""From a folder to a model that generates."""

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

from .artifact import compat, files
from .artifact.custom_calls import check_calls
from .artifact.errors import PrecastError, printable
from .artifact.machine import Machine
from .artifact.manifest import WEIGHTS_FILE, Manifest, Program, Target
from .artifact.weights import map_weights, numpy_dtype
from .compiling import trial
from .generation.engine import Engine
from .generation.model import Model
from .locate import find_artifact, read_manifest
from .required_key import required_key
from .runtime import installed, limits, pjrt
from .runtime.interface import Client, Executable
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .compiling.cache import Made

# Arrays by name, and what raises once their file is written to.
_Constants = tuple[dict[str, np.ndarray], Callable[[], None]]


def load(
    path: str | Path,
    *,
    verify: bool = False,
    target: str | None = None,
    compile: bool = False,
    trusted: bool = False,
    require_signature: str | Path | None = None,
    threads: int | None = None,
    log: Callable[[str], None] | None = None,
    at: Callable[[str], None] | None = None,
) -> Model:
    """Load an artifact without tracing, and without compiling unless requested.

    Several threads may load at once, and share a model. Loading changes no state that other code in the process sees.

    Args:
        path: the artifact's folder, a folder with exactly one artifact in it, or the URL string of a pushed one, which
            is pulled into the cache folder unless it is there already.
        verify: hash every file again, including unchanged files that were hashed before.
        target: name of the target to run; the first that fits the machine by default.
        compile: allow compiling a target from its StableHLO. Each compilation is logged.
        trusted: load programs that never ran on this machine directly, without a trial in a child process
            (`precast.loaders.compiling.trial`).
        require_signature: file of a public key. The artifact must be signed with it; only the manifest is read before
            the check. A signed artifact is trusted. None applies PRECAST_REQUIRE_SIGNATURE and the machine's own key
            (`precast.loaders.required_key`), which no argument switches off.
        threads: number of XLA's computing threads on the CPU. The default is one per usable core, within a container's
            CPU quota. Models with the same number share the threads.
        log: receives messages; standard error by default.
        at: called with the name of each program before it is loaded.

    Raises:
        PrecastError: the artifact is incomplete, has an unknown format, or does not run on this machine.
    """
    log = log or _to_stderr
    key = required_key(require_signature)
    if (problem := files.cache_problem("verified")) is not None:
        log(f"{problem}.")
    url = path if isinstance(path, str) and "://" in path else None
    if url is not None:
        from .store.pull import fetch

        path = fetch(url, require_signature=key, log=log)
    root = find_artifact(Path(path))
    manifest = read_manifest(root, require_signature=key)
    try:
        return _load(
            root,
            manifest,
            verify=verify,
            target=target,
            compile=compile,
            trusted=trusted or key is not None,
            threads=limits.checked_threads(threads),
            log=log,
            at=at or _nowhere,
        )
    except _NotWhole as error:
        if url is None:
            raise
        raise PrecastError(
            f"{error} It was pulled to {root}: remove that folder, and pull it again."
        ) from None


def load_made(root: Path, *, target: str, compile: bool = False) -> Model:
    """Load a target of an artifact that this process has just written, and that is therefore unsigned.

    Args:
        root: the artifact.
        target: name of the target.
        compile: allow compiling it from its StableHLO.

    Raises:
        PrecastError: as `load`.
    """
    return _load(
        root,
        read_manifest(root),
        verify=False,
        target=target,
        compile=compile,
        trusted=True,
        threads=limits.checked_threads(None),
        log=_nowhere,
        at=_nowhere,
    )


class _NotWhole(PrecastError):
    """A file of the artifact is not what its manifest says."""


def _load(
    root: Path,
    manifest: Manifest,
    *,
    verify: bool,
    target: str | None,
    compile: bool,
    trusted: bool,
    threads: int,
    log: Callable[[str], None],
    at: Callable[[str], None],
) -> Model:
    machine = installed.this_machine(cuda=any(t.platform == "cuda" for t in manifest.targets))
    chosen = compat.choose_target(manifest, machine, str(root), name=target, allow_compile=compile)
    if chosen.runtime != "savedmodel" and chosen.platform != "cuda" and not pjrt.has_client(threads):
        limits.ensure(root, manifest, chosen, threads)
    try:
        contents, constants = _read(root, manifest, chosen, verify=verify)
    except PrecastError as error:
        raise _NotWhole(str(error)) from None
    check_calls(root, chosen, contents, machine.kernels)
    _check_weights(chosen, constants[0], root)
    # Before the target is tried, so that the child that tries it finds it compiled.
    made = _compile_first(root, chosen, contents, machine, log)
    if not trusted:
        trial.ensure(root, manifest, chosen, machine, compile=compile, threads=threads, log=log)
    client, executables_of = _runtime(
        root, manifest, chosen, contents, made, verify=verify, threads=threads, log=log, at=at
    )
    return _model(manifest, chosen, contents, constants, client, executables_of)


def assemble(root: Path, manifest: Manifest, target: Target, executables: Mapping[str, bytes]) -> Model:
    """A model of a target whose executables are not in the artifact yet.

    Args:
        root: the artifact.
        manifest: of it, as it will be.
        target: the new one.
        executables: contents of its files, by name. They are trusted.

    Raises:
        PrecastError: as `load`.
    """
    names = sorted(_needed(manifest, target) - set(executables))
    contents = {name: files.read_checked(root, name, manifest.files[name]) for name in names}
    contents |= executables
    constants = _weights(root, manifest, target, verify=False)
    _check_weights(target, constants[0], root)
    client, executables_of = _runtime(
        root,
        manifest,
        target,
        contents,
        {},
        verify=False,
        threads=limits.checked_threads(None),
        log=_to_stderr,
        at=_nowhere,
    )
    return _model(manifest, target, contents, constants, client, executables_of)


def _read(
    root: Path, manifest: Manifest, target: Target, *, verify: bool
) -> tuple[dict[str, bytes], _Constants]:
    """The files that a target needs, each compared with the manifest: contents by name, and the weights."""
    contents = {
        name: files.read_checked(root, name, manifest.files[name])
        for name in sorted(_needed(manifest, target))
    }
    if verify:
        for name in sorted(set(manifest.files) - set(contents) - {WEIGHTS_FILE}):
            files.open_checked(root, name, manifest.files[name], rehash=True).close()
    return contents, _weights(root, manifest, target, verify=verify)


class _Beside(Thread):
    """A call in a thread of its own. Not concurrent.futures, which takes 5 ms to import."""

    def __init__(self, call: Callable[[], Mapping[str, Executable]]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._error: BaseException | None = None
        self._value: Mapping[str, Executable] = {}
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Mapping[str, Executable]:
        """What the call gave, once it is joined; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._value


def _model(
    manifest: Manifest,
    target: Target,
    contents: dict[str, bytes],
    constants: _Constants,
    client: Client,
    executables_of: Callable[[], Mapping[str, Executable]],
) -> Model:
    weights, unchanged = constants
    # XLA loads programs without holding Python's lock, and the tokenizer is parsed meanwhile: both take about as long.
    loading = _Beside(executables_of)
    try:
        tokenizer = _tokenizer(manifest, contents)
    finally:
        loading.join()
    executables = loading.result()
    engine = Engine(
        manifest=manifest,
        target=target,
        executables=executables,
        weights=weights,
        client=client,
        unchanged=unchanged,
    )
    return Model(
        engine=engine,
        tokenizer=tokenizer,
        manifest=manifest,
        target=target,
        compiles=sum(executable.compiled for executable in executables.values()),
    )


def _to_stderr(message: str) -> None:
    print(printable(message), file=sys.stderr)


def _nowhere(_: str) -> None:
    pass


def _needed(manifest: Manifest, target: Target) -> set[str]:
    """Return the files to read whole: programs, tokenizer, templates."""
    # TensorFlow reads a SavedModel itself.
    programs = {target.file_of(p) for p in target.programs if target.runtime != "savedmodel"}
    texts = manifest.tokenizer
    names = (*programs, texts.file, texts.chat_template, *texts.named_templates.values())
    return {n for n in names if n is not None}


def _weights(
    root: Path, manifest: Manifest, target: Target, *, verify: bool
) -> tuple[dict[str, np.ndarray], Callable[[], None]]:
    """Weights and tables that the programs of a target take, and what raises once their file is written to.

    Those of a SavedModel have their own.
    """
    own = target.runtime == "savedmodel"
    if own and not verify:
        return {}, lambda: None
    with files.open_checked(root, WEIGHTS_FILE, manifest.files[WEIGHTS_FILE], rehash=verify) as file:
        return ({}, lambda: None) if own else (map_weights(file), files.Watch(file).check)


def _runtime(
    root: Path,
    manifest: Manifest,
    target: Target,
    contents: dict[str, bytes],
    made: "Mapping[str, Made]",
    *,
    verify: bool,
    threads: int,
    log: Callable[[str], None],
    at: Callable[[str], None],
) -> tuple[Client, Callable[[], Mapping[str, Executable]]]:
    """Where a target runs, and what loads its programs."""
    if target.runtime != "savedmodel":
        client = _client(target, threads)
        return client, partial(_executables, root, target, contents, made, client, at)
    from .runtime import savedmodel  # which imports TensorFlow

    log(f"{root}: TensorFlow runs target {target.name!r}, and compiles each program when it is first called")
    at("the SavedModel")
    return savedmodel.client(), partial(savedmodel.load, root, target, manifest.files, verify=verify)


def _client(target: Target, threads: int) -> pjrt.Client:
    """The device that a target of XLA's runs on; "any" is the CPU."""
    if target.platform != "cuda":
        return pjrt.client(threads)
    from .runtime import cuda  # which takes the GPU

    return cuda.client(target.device)


def _compile_first(
    root: Path,
    target: Target,
    contents: Mapping[str, bytes],
    machine: Machine,
    log: Callable[[str], None],
) -> "dict[str, Made]":
    """Executables of a target that is compiled on request, by program; none where it holds its own."""
    if target.runtime != "stablehlo":
        return {}
    if date.today().isoformat() > target.stablehlo_expires:
        log(
            f"{root}: the StableHLO was promised to compile until {target.stablehlo_expires}; trying all the same"
        )
    if target.platform == "cuda":
        # What the child compiles, and the cache keeps, is for the CPU.
        log(f"{root}: target {target.name!r}: compiling its programs for the GPU, as at every start …")
        return {}
    from .compiling.cache import executables

    programs = [(p.name, contents[_file_of(target, p)]) for p in target.programs]
    return executables(programs, machine, f"{root}: target {target.name!r}", log)


def _file_of(target: Target, program: Program) -> str:
    name = target.file_of(program)
    assert name is not None  # the manifest has been checked for that
    return name


def _executables(
    root: Path,
    target: Target,
    contents: Mapping[str, bytes],
    made: "Mapping[str, Made]",
    client: pjrt.Client,
    at: Callable[[str], None],
) -> dict[str, pjrt.Executable]:
    executables = {}
    for program in target.programs:
        results = [
            pjrt.Result(shape=value.physical, dtype=numpy_dtype(value.dtype)) for value in program.results
        ]
        name = _file_of(target, program)
        at(program.name)
        if (own := made.get(program.name)) is not None:
            executables[program.name] = _load_made(client, own, results, str(root / name))
        else:
            make = client.compile if target.runtime == "stablehlo" else client.load
            executables[program.name] = make(contents[name], results, str(root / name))
    return executables


def _load_made(
    client: pjrt.Client, made: "Made", results: Sequence[pjrt.Result], where: str
) -> pjrt.Executable:
    try:
        executable = client.load(made.executable, results, where)
    except PrecastError:
        if made.now:
            raise
        # Compiled before, by a jaxlib of the same version that is not the same after all.
        made = made.again()
        executable = client.load(made.executable, results, where)
    executable.compiled = made.now
    return executable


def _check_weights(target: Target, weights: dict, root: Path) -> None:
    for program in target.programs:
        for value in program.arguments:
            if value.role not in ("table", "weight"):
                continue
            array = weights.get(value.name)
            if array is None or array.shape != value.shape or array.dtype.name != value.dtype:
                found = "nothing" if array is None else f"{array.dtype.name} {list(array.shape)}"
                raise PrecastError(
                    f"{root}: program {program.name!r} expects weight {value.name!r} of {value.dtype}"
                    f" {list(value.shape)}, {WEIGHTS_FILE} holds {found}."
                )


def _tokenizer(manifest: Manifest, contents: dict[str, bytes]) -> Tokenizer:
    spec = manifest.tokenizer

    def text(file: str) -> str:
        try:
            return contents[file].decode("utf-8")
        except UnicodeDecodeError:
            raise PrecastError(
                f"{manifest.name}: {file} is not UTF-8 text; export the model again."
            ) from None

    return Tokenizer.from_json(
        contents[spec.file],
        chat_template=None if spec.chat_template is None else text(spec.chat_template),
        named_templates={name: text(file) for name, file in spec.named_templates.items()},
        bos_token=spec.bos_token,
        eos_token=spec.eos_token,
    )
