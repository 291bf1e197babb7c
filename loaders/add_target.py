"""``precast add-target``: compile an additional target for an existing artifact from its StableHLO.

An additional target lets an artifact run under a jaxlib or on a CPU that it was not exported for. Compilation needs
only jaxlib, because nothing is traced. The weights stay unchanged, because all targets share them. `artifact_changes`
writes the result atomically: at any moment the artifact is either the old or the new one.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from .artifact import compat, files
from .artifact.errors import PrecastError
from .artifact.frozen import Frozen
from .artifact.golden import parse_golden
from .artifact.machine import Machine
from .artifact.manifest import WEIGHTS_FILE, FileEntry, Manifest, Target
from .artifact_changes import (
    TARGETS,
    LockedArtifact,
    changing,
    free_folder,
    record_change,
    replace_manifest,
    write_files,
)
from .audit.verify import replay
from .compiling import isa as isas
from .compiling import trial
from .compiling.compiler import compile_target
from .load import load_new_target
from .locate import find_artifact
from .runtime import installed


@dataclass(frozen=True, kw_only=True)
class Addition:
    """The result of adding a target.

    Attributes:
        target: the new target, as the manifest describes it.
        executable_bytes: total size of the target's executables.
        answers: number of golden answers that the new target reproduced.
        has_replaced: True if the new target replaced a target of the same name.
        signature_removed: True if the change removed the artifact's signature.
    """

    target: Target
    executable_bytes: int
    answers: int
    has_replaced: bool
    signature_removed: bool


class _Request(Frozen):
    """The options of `add_target` that determine the new target."""

    isa: str | None
    source: str | None
    overwrite: bool


class _NewTarget(Frozen):
    """A compiled target.

    Attributes:
        target: the target, as the manifest will describe it.
        executables: contents of the target's executables, by file name in the artifact.
        manifest: the artifact's manifest, including the target.
    """

    target: Target
    executables: Mapping[str, bytes]
    manifest: Manifest


def add_target(
    path: Path,
    *,
    isa: str | None = None,
    source: str | None = None,
    overwrite: bool = False,
    require_signature: Path | None = None,
    log: Callable[[str], None],
) -> Addition:
    """Compile a target for the CPU with the installed jaxlib, and add it to an artifact.

    Args:
        path: the artifact's folder, or a folder with exactly one artifact in it.
        isa: a key of `isa.LEVELS`, or "native" for all of this machine's features. None chooses `isa.default_isa` for
            programs that call kernels, and "native" for other programs. XLA may use instructions beyond the level, for
            example in programs exported before version 0.3. If `isa` is None, the new target then requires the level
            that includes these instructions; otherwise they are an error.
        source: name of the target whose StableHLO is compiled; by default, the target that ``run --compile`` would
            choose.
        overwrite: allow replacing a target of the same name.
        require_signature: file of the public key that must verify the artifact's signature before the change.
        log: receives a message before each stage.

    Raises:
        PrecastError: the artifact is damaged or cannot be written to, this machine lacks the instruction set, this
            jaxlib cannot compile the StableHLO, the name is taken, or the programs do not reproduce the golden answers.
            The artifact is then unchanged.
    """
    if isa is not None:
        isas.check_isa(isa)
    root = find_artifact(path)
    request = _Request(isa=isa, source=source, overwrite=overwrite)
    with changing(root, TARGETS, require_signature, log) as (artifact, manifest):
        return _add(artifact, manifest, request, log)


def _add(
    artifact: LockedArtifact, manifest: Manifest, request: _Request, log: Callable[[str], None]
) -> Addition:
    root, machine = artifact.root, installed.this_machine(cuda=False)
    new = _compile(root, manifest, machine, request, log)
    log("checking its answers against the recorded ones")
    answers = _replay(root, new)
    with record_change(artifact, new.manifest) as folder:
        write_files(artifact, folder, {name: [data] for name, data in new.executables.items()})
        was_signed = replace_manifest(artifact, folder)
    trial.record_success(new.manifest, new.target, machine)
    return Addition(
        target=new.target,
        executable_bytes=sum(map(len, new.executables.values())),
        answers=answers,
        has_replaced=new.target.name in {t.name for t in manifest.targets},
        signature_removed=was_signed,
    )


def _compile(
    root: Path, manifest: Manifest, machine: Machine, request: _Request, log: Callable[[str], None]
) -> _NewTarget:
    """Compile the new target.

    Raises:
        PrecastError: see `add_target`.
    """
    source = _source(manifest, machine, root, request.source)
    _check_names(source, root)
    kind = _kind(source)
    isa = request.isa
    if isa is None:
        isa = isas.default_isa() if source.kernels else isas.NATIVE

    def name_of(features: Sequence[str]) -> str:
        return _free_name(
            manifest, isas.target_name(kind, features), machine, overwrite=request.overwrite, root=root
        )

    if isa != isas.NATIVE:  # before the long compilation, refuse a name that is taken
        name_of(isas.LEVELS[isa].features)
    # Add nothing to a damaged artifact. The weights are hashed when they are mapped.
    for name, entry in manifest.files.items():
        if name != WEIGHTS_FILE:
            files.rehash_file(root, name, entry, record=False)
    contents = {name: files.read_checked(root, name, manifest.files[name]) for name in _stablehlo(source)}
    target, executables, _ = compile_target(
        source,
        contents,
        name_of,
        f"{root}: target {source.name!r}",
        isa=isa,
        exact=request.isa is not None,
        jaxlib=machine.jaxlib,
        log=log,
    )
    target, executables = _in_free_folder(target, executables, manifest, root)
    changed = _with_target(manifest, target, executables)
    return _NewTarget(target=target, executables=executables, manifest=changed)


# --- source and name ----------------------------------------------------------------------------------------


def _source(manifest: Manifest, machine: Machine, root: Path, name: str | None) -> Target:
    """Choose the target whose StableHLO is compiled, by the rule of ``run --compile``.

    Raises:
        PrecastError: the named target, or every target if none is named, lacks StableHLO for a CPU.
    """
    compilable = [
        t
        for t in manifest.targets
        if t.platform in ("cpu", "any") and None not in {p.stablehlo for p in t.programs}
    ]
    known = ", ".join(repr(t.name) for t in compilable)
    if name is not None and name not in {t.name for t in compilable}:
        raise PrecastError(
            f"{root}: target {name!r} is not in the artifact, or has no StableHLO for a CPU; "
            + (f"name a target that has StableHLO: {known}." if known else "export the model again.")
        )
    if not compilable:
        raise PrecastError(f"{root}: no target has StableHLO for a CPU; export the model again.")
    # Only the StableHLO must fit this machine, so drop the requirements of the executables.
    bare = tuple(
        replace(t, runtime="stablehlo", machine="any", jaxlib="any", cpu_features=()) for t in compilable
    )
    chosen = compat.choose_target(
        replace(manifest, targets=bare), machine, str(root), name=name, allow_compile=True
    )
    return next(t for t in compilable if t.name == chosen.name)


def _check_names(source: Target, root: Path) -> None:
    """Check that each program's name can be a file name, because the executable's file is named after the program.

    Raises:
        PrecastError: a program's name cannot be a file name.
    """
    for program in source.programs:
        if len(files.split_name(root, program.name)) != 1:
            raise PrecastError(
                f"{root}: target {source.name!r} has a program {program.name!r}, expected names without '/'; export the"
                " model again."
            )


def _kind(source: Target) -> str:
    """Return the first part of the target's name: "cpu" if it calls precast's kernels, "portable" for pure XLA."""
    return "cpu" if source.kernels else "portable"


def _stablehlo(target: Target) -> list[str]:
    return sorted({p.stablehlo for p in target.programs if p.stablehlo is not None})


def _free_name(manifest: Manifest, name: str, machine: Machine, *, overwrite: bool, root: Path) -> str:
    """Return a name for the new target: `name`, plus this jaxlib's version if a target of another jaxlib has that name.

    Raises:
        PrecastError: a target of this jaxlib has the name, and may not be replaced.
    """
    taken = {t.name: t for t in manifest.targets}
    if name in taken and taken[name].jaxlib != machine.jaxlib:
        name = f"{name}-jaxlib{machine.jaxlib}"
    if name in taken and not overwrite:
        raise PrecastError(
            f"{root}: target {name!r} exists already; replace it with --overwrite, or run it with --target {name}."
        )
    return name


def _in_free_folder(
    target: Target, executables: Mapping[str, bytes], manifest: Manifest, root: Path
) -> tuple[Target, dict[str, bytes]]:
    """Return the target and its executables with file names in a folder that does not exist yet."""
    folder = free_folder(root, TARGETS, target.name, manifest.files)

    def moved(name: str) -> str:
        return f"{folder}/{PurePosixPath(name).name}"

    programs = tuple(replace(p, executable=moved(str(p.executable))) for p in target.programs)
    return replace(target, programs=programs), {moved(name): data for name, data in executables.items()}


def _with_target(manifest: Manifest, target: Target, executables: Mapping[str, bytes]) -> Manifest:
    """Return the manifest with the target appended, or put in place of the target of the same name."""
    targets = [target if t.name == target.name else t for t in manifest.targets]
    if target.name not in {t.name for t in manifest.targets}:
        targets.append(target)
    used = {name for t in targets for p in t.programs for name in (p.executable, p.stablehlo)}
    replaced = next((t for t in manifest.targets if t.name == target.name), None)
    dropped = {p.executable for p in replaced.programs} - used if replaced is not None else set()
    entries = {name: entry for name, entry in manifest.files.items() if name not in dropped}
    for name, data in executables.items():
        entries[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return replace(manifest, targets=tuple(targets), files=dict(sorted(entries.items())))


def _replay(root: Path, new: _NewTarget) -> int:
    """Replay the golden answers with the new target; return their number.

    Raises:
        PrecastError: an answer differs.
    """
    manifest, where = new.manifest, f"{root}: target {new.target.name!r}"
    data = files.read_checked(root, manifest.golden, manifest.files[manifest.golden])
    recorded = parse_golden(data, manifest, manifest.golden)
    found = replay(load_new_target(root, manifest, new.target, new.executables), recorded, where)
    if found.problems:
        raise PrecastError(f"{found.problems[0].rstrip('.')}; the artifact is unchanged.")
    return found.answers
