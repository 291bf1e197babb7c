"""Load an artifact: locate it, choose a target, check the files that it needs, and return a model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .artifact import cache_folder, compat, files
from .artifact.custom_calls import check_calls
from .artifact.errors import PrecastError, log_to_stderr
from .artifact.manifest import WEIGHTS_FILE, Manifest, Target
from .artifact.origin import has_row_invariance
from .artifact.weights import map_weights
from .background import BackgroundCall
from .compiling import trial
from .executables import (
    CheckedArtifact,
    LoadSettings,
    compile_executables,
    open_runtime,
    runs_on_xla_cpu,
)
from .generation.engine import Engine
from .generation.model import Model
from .generation.prefixes import PrefixTree
from .locate import find_artifact, read_manifest
from .required_key import required_key
from .runtime import installed, limits, pjrt
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .artifact.machine import Machine
    from .compiling.cache import LocalExecutable
    from .generation.stored_prefixes import StoredPrefix
    from .progress import Progress
    from .text.known_tokenizers import KnownTokenizers


def load(
    path: str | Path,
    *,
    rehash: bool = False,
    target: str | None = None,
    allow_compile: bool = False,
    trusted: bool = False,
    require_signature: str | Path | None = None,
    threads: int | None = None,
    prefix_memory: int | None = None,
    log: Callable[[str], None] | None = None,
    progress: "Progress | None" = None,
    tokenizers: "KnownTokenizers | None" = None,
) -> Model:
    """Load an artifact without tracing, and without compiling unless requested.

    Several threads may load artifacts at the same time, and may share a model. Loading changes no state that other code
    in the process can see.

    Args:
        path: the artifact's folder, a folder with exactly one artifact in it, or the URL string of a pushed artifact,
            which is pulled into the cache folder on first use.
        rehash: hash every file again, including unchanged files that were hashed before.
        target: name of the target to run; by default the best one for the machine.
        allow_compile: allow compiling a target from its StableHLO. Each compilation is logged.
        trusted: skip the trial of a target that has never run on this machine. The trial loads the target in a child
            process first (`precast.loaders.compiling.trial`).
        require_signature: file of the public key that must verify the artifact's signature. Only the manifest and the
            signature are read before the check. The trial is skipped for an artifact that passes. If
            `require_signature` is None, the key that PRECAST_REQUIRE_SIGNATURE names applies, or else the machine's own
            key, if there is one (`precast.loaders.required_key`).
        threads: number of computing threads on the CPU; one per usable core by default, within a container's CPU quota.
            A message is logged if the number has no effect: TensorFlow accepts one number per process, and a GPU
            ignores the number.
        prefix_memory: maximum number of bytes for keys and values of earlier prompts and answers. A prompt that begins
            like an earlier one reuses the keys and values of the shared prefix. The answer stays the same. 0 stores no
            keys and values; None chooses 512 MiB, or an eighth of the available memory if that is less. Only targets
            with precast's own kernels for the CPU reuse keys and values.
        log: receives messages; standard error by default.
        progress: receives the number of bytes pulled and hashed, and the name of each program before it is loaded. By
            default, only pulls show progress, on standard error.
        tokenizers: tokenizers that other models have used. A tokenizer among them is not parsed again.

    Raises:
        PrecastError: the artifact is incomplete, has an unknown format, or does not run on this machine.
    """
    log = log or log_to_stderr
    key = required_key(require_signature)
    if (problem := cache_folder.cache_problem("verified")) is not None:
        log(f"{problem}.")
    settings = LoadSettings(
        target=target,
        rehash=rehash,
        allow_compile=allow_compile,
        trusted=trusted or key is not None,
        threads=limits.checked_threads(threads),
        requested_threads=threads,
        prefix_memory=_checked_bytes(prefix_memory),
        log=log,
        progress=progress,
        tokenizers=tokenizers,
    )
    root = _locate(path, key, settings)
    manifest = read_manifest(root, require_signature=key)
    try:
        return _load(root, manifest, settings)
    except _DamagedArtifact as error:
        if not _is_url(path):
            raise
        raise PrecastError(
            f"{error} The artifact was pulled to {root}; remove that folder, and load the URL again."
        ) from None


def load_export(root: Path, *, target: str, allow_compile: bool = False) -> Model:
    """Load a target of an artifact that this process has just exported, without a trial or a signature check.

    Args:
        root: the artifact's folder.
        target: name of the target.
        allow_compile: allow compiling the target from its StableHLO.

    Raises:
        PrecastError: see `load`.
    """
    settings = LoadSettings(
        target=target,
        allow_compile=allow_compile,
        trusted=True,
        threads=limits.checked_threads(None),
        log=_ignore,
    )
    return _load(root, read_manifest(root), settings)


def load_new_target(
    root: Path, manifest: Manifest, target: Target, executables: Mapping[str, bytes]
) -> Model:
    """Load a target whose executables are not in the artifact yet.

    Args:
        root: the artifact's folder.
        manifest: the artifact's manifest, including the new target.
        target: the new target.
        executables: the new target's executables, by file name in the artifact. They are trusted.

    Raises:
        PrecastError: see `load`.
    """
    settings = LoadSettings(trusted=True, threads=limits.checked_threads(None), log=log_to_stderr)
    artifact = _check_files(root, manifest, target, settings, trusted=executables)
    _check_weights(artifact)
    return _model(artifact, {}, settings)


class _DamagedArtifact(PrecastError):
    """A file of the artifact differs from its entry in the manifest."""


def _load(root: Path, manifest: Manifest, settings: LoadSettings) -> Model:
    machine = installed.this_machine(cuda=any(t.platform == "cuda" for t in manifest.targets))
    target = compat.choose_target(
        manifest, machine, str(root), name=settings.target, allow_compile=settings.allow_compile
    )
    if runs_on_xla_cpu(target):
        has_client = pjrt.has_client(settings.threads)
        limits.ensure(root, manifest, target, settings.threads, has_client=has_client)
    try:
        artifact = _check_files(root, manifest, target, settings, trusted={})
        prefixes = _stored_prefixes(artifact, machine, settings) if manifest.prefixes else []
    except PrecastError as error:
        raise _DamagedArtifact(str(error)) from None
    check_calls(root, target, artifact.contents, machine.kernels)
    _check_weights(artifact)
    # Compile before the trial, so that the trial's child process finds the executables in the cache.
    compiled = compile_executables(artifact, machine, settings)
    if not settings.trusted:
        trial.ensure(
            root,
            manifest,
            target,
            machine,
            allow_compile=settings.allow_compile,
            threads=settings.requested_threads,
            log=settings.log,
        )
    return _model(artifact, compiled, settings, prefixes)


def _locate(path: str | Path, key: Path | None, settings: LoadSettings) -> Path:
    """Return the artifact's folder, after pulling it from a URL if needed."""
    if _is_url(path):
        from .store.pull import fetch

        path = fetch(str(path), require_signature=key, log=settings.log, progress=settings.progress)
    return find_artifact(Path(path))


def _checked_bytes(prefix_memory: int | None) -> int | None:
    is_size = isinstance(prefix_memory, int) and not isinstance(prefix_memory, bool) and prefix_memory >= 0
    if prefix_memory is not None and not is_size:
        raise PrecastError(
            f"prefix_memory: expected a number of bytes, 0 or more, found {prefix_memory!r:.40}; 0 keeps no prefixes."
        )
    return prefix_memory


def _is_url(path: str | Path) -> bool:
    return isinstance(path, str) and "://" in path


# --- check --------------------------------------------------------------------------------------------------


def _check_files(
    root: Path, manifest: Manifest, target: Target, settings: LoadSettings, *, trusted: Mapping[str, bytes]
) -> CheckedArtifact:
    """Read the files that a target needs, and compare them with the manifest.

    Args:
        root: the artifact's folder.
        manifest: the artifact's manifest.
        target: the target.
        settings: the settings. With `rehash`, every file of the artifact is hashed, even if its hash is recorded.
        trusted: contents of the files that the caller provides, by name. These files are not read.

    Raises:
        PrecastError: a file differs; the message names the first.
    """
    names = _needed(manifest, target) - set(trusted)
    contents = {name: files.read_checked(root, name, manifest.files[name]) for name in sorted(names)}
    if settings.rehash:
        for name in sorted(set(manifest.files) - set(contents) - {WEIGHTS_FILE}):
            files.open_checked(root, name, manifest.files[name], rehash=True).close()
    weights, check_unchanged = _read_weights(root, manifest, target, settings)
    return CheckedArtifact(
        root=root,
        manifest=manifest,
        target=target,
        contents={**contents, **trusted},
        weights=weights,
        check_unchanged=check_unchanged,
    )


def _stored_prefixes(
    artifact: CheckedArtifact, machine: "Machine", settings: LoadSettings
) -> "list[StoredPrefix]":
    """Check and map the prefixes that the target can use; log every other prefix with the reason.

    Raises:
        PrecastError: a file differs from the manifest; the message names the first.
    """
    from .generation import stored_prefixes  # a lazy import, because few artifacts store prefixes

    root, manifest = artifact.root, artifact.manifest
    fit, others = stored_prefixes.usable(manifest, artifact.target, machine.isa)
    if others:
        said = (f"prefix {prefix.name!r} is not used here: {reason}" for prefix, reason in others)
        settings.log(f"{root}: {'; '.join(said)}")
    return [stored_prefixes.open_prefix(root, manifest, p, rehash=settings.rehash) for p in fit]


def _needed(manifest: Manifest, target: Target) -> set[str]:
    """Return the names of the files that are read completely: programs, tokenizer, templates."""
    # TensorFlow reads a SavedModel itself.
    programs = {target.file_of(p) for p in target.programs if target.runtime != "savedmodel"}
    texts = manifest.tokenizer
    names = (*programs, texts.file, texts.chat_template, *texts.named_templates.values())
    return {n for n in names if n is not None}


def _read_weights(
    root: Path, manifest: Manifest, target: Target, settings: LoadSettings
) -> tuple[dict[str, np.ndarray], Callable[[], None]]:
    """Map weights and tables; return the arrays by name, and a function that raises if their file has been written to.

    A SavedModel contains its own weights, so nothing is mapped for it.
    """
    has_own = target.runtime == "savedmodel"
    if has_own and not settings.rehash:
        return {}, lambda: None
    entry = manifest.files[WEIGHTS_FILE]
    on_read = _hash_progress(settings.progress, entry.bytes)
    with files.open_checked(root, WEIGHTS_FILE, entry, rehash=settings.rehash, on_read=on_read) as file:
        return ({}, lambda: None) if has_own else (map_weights(file), files.Watch(file).check)


def _check_weights(artifact: CheckedArtifact) -> None:
    """Compare the weights with the programs' signatures.

    Raises:
        PrecastError: a weight is missing, or has another type or shape; the message names the first.
    """
    for program in artifact.target.programs:
        for value in program.arguments:
            if value.role not in ("table", "weight"):
                continue
            array = artifact.weights.get(value.name)
            if array is None or array.shape != value.shape or array.dtype.name != value.dtype:
                found = "nothing" if array is None else f"{array.dtype.name} {list(array.shape)}"
                raise PrecastError(
                    f"{artifact.root}: program {program.name!r} expects weight {value.name!r} of {value.dtype}"
                    f" {list(value.shape)}, but {WEIGHTS_FILE} contains {found}; export the model again."
                )


# --- build the model ----------------------------------------------------------------------------------------


def _model(
    artifact: CheckedArtifact,
    compiled: "Mapping[str, LocalExecutable]",
    settings: LoadSettings,
    stored: "Sequence[StoredPrefix]" = (),
) -> Model:
    client, load_executables = open_runtime(artifact, compiled, settings)
    # Parse the tokenizer while XLA loads the programs. XLA releases the GIL, and the two tasks take about equally long.
    loading = BackgroundCall(load_executables)
    try:
        tokenizer = _tokenizer(artifact, settings.tokenizers)
    finally:
        loading.join()
    executables = loading.result()
    engine = Engine(
        manifest=artifact.manifest,
        target=artifact.target,
        executables=executables,
        weights=artifact.weights,
        client=client,
        check_unchanged=artifact.check_unchanged,
    )
    prefixes = PrefixTree(engine, settings.prefix_memory) if has_row_invariance(artifact.target) else None
    if prefixes is not None:
        for prefix in stored:
            prefixes.pin(prefix.tokens, prefix.spans, prefix.watch.check)
    return Model(
        engine=engine,
        tokenizer=tokenizer,
        manifest=artifact.manifest,
        target=artifact.target,
        compiles=sum(executable.compiled for executable in executables.values()),
        prefixes=prefixes,
    )


def _tokenizer(artifact: CheckedArtifact, tokenizers: "KnownTokenizers | None") -> Tokenizer:
    spec = artifact.manifest.tokenizer

    def text(file: str) -> str:
        try:
            return artifact.contents[file].decode("utf-8")
        except UnicodeDecodeError:
            raise PrecastError(
                f"{artifact.manifest.name}: {file} is not UTF-8 text; export the model again."
            ) from None

    known = None if tokenizers is None else tokenizers.find(artifact.manifest)
    parse = partial(Tokenizer.from_json, artifact.contents[spec.file])
    create = parse if known is None else known.with_templates
    return create(
        chat_template=None if spec.chat_template is None else text(spec.chat_template),
        named_templates={name: text(file) for name, file in spec.named_templates.items()},
        bos_token=spec.bos_token,
        eos_token=spec.eos_token,
    )


# --- messages -----------------------------------------------------------------------------------------------


def _hash_progress(progress: "Progress | None", total: int) -> Callable[[int], None]:
    """Return a function that accepts the size of each hashed block, and reports the total so far."""
    if progress is None:
        return lambda _: None
    from .progress import byte_counter

    return byte_counter(progress, "hashing", total)


def _ignore(_: str) -> None:
    pass
