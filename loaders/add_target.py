"""``precast add-target``: compile a further target of an existing artifact from its StableHLO.

jaxlib compiles it; nothing is traced, and jax is not needed. All targets share the weights, which stay untouched. A
further target makes an artifact run under another jaxlib, or on an older CPU, than it was exported for. `target_files`
writes the result in an order that keeps the artifact whole, old or new, at any moment.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from .artifact import compat, files
from .artifact.errors import PrecastError
from .artifact.golden import parse_golden
from .artifact.machine import Machine
from .artifact.manifest import MANIFEST_FILE, SIGNATURE_FILE, WEIGHTS_FILE, FileEntry, Manifest, Target
from .artifact.manifest_parser import parse_manifest
from .artifact.record import MAX_JSON_BYTES
from .audit.verify import replay
from .compiling import isa as isas
from .compiling import trial
from .compiling.compiler import compile_target
from .load import load_new_target
from .locate import find_artifact
from .runtime import installed
from .signing import check_signature
from .target_files import (
    PROGRAMS,
    Held,
    adding,
    locked,
    remove_leftovers,
    replace_manifest,
    write_programs,
    writing,
)


@dataclass(frozen=True, kw_only=True)
class Added:
    """What was done.

    Attributes:
        target: the new one, as it stands in the manifest.
        bytes: of its executables.
        answers: golden answers that it gave.
        replaced: whether a target of the same name was.
        signature_removed: whether the artifact was signed, and is no more.
    """

    target: Target
    bytes: int
    answers: int
    replaced: bool
    signature_removed: bool


def add_target(
    path: Path,
    *,
    isa: str | None = None,
    source: str | None = None,
    overwrite: bool = False,
    require_signature: Path | None = None,
    log: Callable[[str], None],
) -> Added:
    """Add a target of executables for the CPU, compiled by the installed jaxlib.

    Args:
        path: the artifact, or a folder with exactly one in it.
        isa: a key of `isa.LEVELS`, or "native" for all of this machine's features. None chooses `isa.default_isa` if
            the programs call kernels, else "native". With None the target may need more than the default level if XLA
            uses more, as for programs exported before 0.3.
        source: name of the target whose StableHLO is compiled; the quickest that runs here by default.
        overwrite: replace a target of the same name.
        require_signature: file of the public key that the artifact must be signed with before the change.
        log: receives progress messages.

    Raises:
        PrecastError: for an artifact that is not whole or cannot be written to, an instruction set that this machine
            lacks, StableHLO that cannot be compiled here, a name that is taken, and programs that do not give the
            golden answers. The artifact is then as it was.
    """
    if isa is not None:
        isas.check_isa(isa)
    root = find_artifact(path)
    with writing(root), locked(root, log) as handle:
        held = Held(root=root, handle=handle, data=files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES))
        if require_signature is not None:
            check_signature(root, held.data, require_signature)
        manifest = parse_manifest(held.data, str(root / MANIFEST_FILE))
        held.check()
        remove_leftovers(held)
        return _add(held, manifest, isa, source, overwrite, log)


def _add(
    held: Held,
    manifest: Manifest,
    isa: str | None,
    source: str | None,
    overwrite: bool,
    log: Callable[[str], None],
) -> Added:
    root, machine = held.root, installed.this_machine(cuda=False)
    chosen = _source(manifest, machine, root, source)
    _check_names(chosen, root)
    kind = _kind(chosen)
    exact = isa is not None
    if isa is None:
        isa = isas.default_isa() if chosen.kernels else isas.NATIVE
    if isa != isas.NATIVE:  # refuse before compiling anything
        _free_name(manifest, isas.target_name(kind, isas.LEVELS[isa].features), machine, overwrite, root)
    for (
        name,
        entry,
    ) in manifest.files.items():  # nothing is added to what is damaged; weights are hashed when mapped
        if name != WEIGHTS_FILE:
            files.rehash_file(root, name, entry, record=False)
    contents = {name: files.read_checked(root, name, manifest.files[name]) for name in _stablehlo(chosen)}
    target, executables, _ = compile_target(
        chosen,
        contents,
        lambda f: _free_name(manifest, isas.target_name(kind, f), machine, overwrite, root),
        f"{root}: target {chosen.name!r}",
        isa=isa,
        exact=exact,
        jaxlib=machine.jaxlib,
        log=log,
    )
    target, executables = _in_free_folder(target, executables, manifest, root)
    changed = _with_target(manifest, target, executables)
    log("checking its answers against the recorded ones")
    answers = _replay(root, changed, target, executables)
    with adding(held, changed) as work:
        write_programs(held, work, executables)
        signed = replace_manifest(held, work)
    trial.record_success(changed, target, machine)
    return Added(
        target=target,
        bytes=sum(map(len, executables.values())),
        answers=answers,
        replaced=target.name in {t.name for t in manifest.targets},
        signature_removed=signed,
    )


# --- what to compile, and what to call it -------------------------------------------------------------------


def _source(manifest: Manifest, machine: Machine, root: Path, name: str | None) -> Target:
    """The target to compile, by the loader's own rule for what it compiles on request."""
    compilable = [
        t
        for t in manifest.targets
        if t.platform in ("cpu", "any") and None not in {p.stablehlo for p in t.programs}
    ]
    known = ", ".join(repr(t.name) for t in compilable)
    if name is not None and name not in {t.name for t in compilable}:
        raise PrecastError(
            f"{root}: target {name!r} is not in the artifact, or holds no StableHLO for a CPU; those that do are"
            f" {known or 'none'}."
        )
    if not compilable:
        raise PrecastError(f"{root}: no target holds StableHLO for a CPU; export the model again.")
    # With the executables out of the way: it is the StableHLO that must suit the machine.
    bare = tuple(
        replace(t, runtime="stablehlo", machine="any", jaxlib="any", cpu_features=()) for t in compilable
    )
    chosen = compat.choose_target(
        replace(manifest, targets=bare), machine, str(root), name=name, allow_compile=True
    )
    return next(t for t in compilable if t.name == chosen.name)


def _check_names(source: Target, root: Path) -> None:
    """Executables are named after their programs.

    Raises:
        PrecastError: for a program whose name is not one of a file.
    """
    for program in source.programs:
        if len(files.split_name(root, program.name)) != 1:
            raise PrecastError(
                f"{root}: target {source.name!r} has a program {program.name!r}, expected names without '/'; export the"
                " model again."
            )


def _kind(source: Target) -> str:
    """Targets whose programs call precast's kernels are called cpu-…, those of pure XLA portable-…"""
    return "cpu" if source.kernels else "portable"


def _stablehlo(target: Target) -> list[str]:
    return sorted({p.stablehlo for p in target.programs if p.stablehlo is not None})


def _free_name(manifest: Manifest, name: str, machine: Machine, overwrite: bool, root: Path) -> str:
    """`name`, or where another jaxlib's target has that, the same with this jaxlib's version.

    Raises:
        PrecastError: when this jaxlib's target is there, unless it may be replaced.
    """
    taken = {t.name: t for t in manifest.targets}
    if name in taken and taken[name].jaxlib != machine.jaxlib:
        name = f"{name}-jaxlib{machine.jaxlib}"
    if name in taken and not overwrite:
        raise PrecastError(
            f"{root}: target {name!r} is there already; replace it with --overwrite, or run it with --target {name}."
        )
    return name


def _in_free_folder(
    target: Target, executables: Mapping[str, bytes], manifest: Manifest, root: Path
) -> tuple[Target, dict[str, bytes]]:
    """Return the target with its executables in a folder that is free on disk and in the manifest."""
    used = {PurePosixPath(name).parts[1] for name in manifest.files if name.startswith(f"{PROGRAMS}/")}
    used |= {path.name for path in (root / PROGRAMS).glob("*")}
    names = (target.name, *(f"{target.name}.{n}" for n in range(2, len(used) + 3)))
    folder = next(name for name in names if name not in used)

    def moved(name: str) -> str:
        return f"{PROGRAMS}/{folder}/{PurePosixPath(name).name}"

    programs = tuple(replace(p, executable=moved(str(p.executable))) for p in target.programs)
    return replace(target, programs=programs), {moved(name): data for name, data in executables.items()}


def _with_target(manifest: Manifest, target: Target, executables: Mapping[str, bytes]) -> Manifest:
    """The manifest with the target in the place of the one of its name, or behind the others."""
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


def _replay(root: Path, manifest: Manifest, target: Target, executables: Mapping[str, bytes]) -> int:
    """Lets the target give the golden answers; how many there are.

    Raises:
        PrecastError: when an answer differs.
    """
    recorded = parse_golden(
        files.read_checked(root, manifest.golden, manifest.files[manifest.golden]), manifest, manifest.golden
    )
    model = load_new_target(root, manifest, target, executables)
    found = replay(model, recorded, f"{root}: target {target.name!r}")
    if found.problems:
        raise PrecastError(f"{found.problems[0].rstrip('.')}; the artifact is as it was.")
    return found.answers


def summary(added: Added, path: Path) -> Sequence[str]:
    """What a person is told."""
    target = added.target
    done = "replaced" if added.replaced else "added"
    facts = f"{len(target.programs)} programs, {added.bytes:,} bytes, jaxlib {target.jaxlib}"
    lines = [f"{path}: target {target.name} {done}: {facts}, {added.answers} answers as recorded"]
    lines.append(f"  runs on {isas.audience(target.machine, target.cpu_features)}")
    if added.signature_removed:
        lines.append(
            f"  {SIGNATURE_FILE} was removed: it was for the manifest as it was; sign the artifact again"
        )
    lines.append(f"  run it with: precast run {path} --target {target.name}")
    return lines
