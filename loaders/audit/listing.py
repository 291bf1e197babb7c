"""Find the artifacts below a folder, and check whether each artifact runs on this machine."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact import compat
from ..artifact.errors import PrecastError
from ..artifact.machine import Machine
from ..artifact.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest, Target
from ..locate import read_manifest
from ..runtime.installed import this_machine

if TYPE_CHECKING:
    from .prefixes import PrefixStatus

# The number of bytes at the start of a manifest that are searched for its version.
_HEAD = 4096


@dataclass(frozen=True, kw_only=True)
class ListEntry:
    """An artifact, or a folder that cannot be read.

    Attributes:
        path: the artifact's folder.
        problem: the reason why the folder cannot be read, or None. If there is a problem, all fields below are None.
        name: the model's name.
        architecture: the model's architecture.
        parameters: the model's number of parameters.
        weights: storage format of the weights.
        context: context length, in positions.
        bytes: total size of the artifact's files.
        targets: names of the targets.
        target: name of the target that runs here without compiling; None if no target does.
        compiles: True if a target runs here, even if only after compiling.
        reason: the reason why no target runs here without compiling; None if a target does.
        prefixes: the stored prefixes.
    """

    path: Path
    problem: str | None = None
    name: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    weights: str | None = None
    context: int | None = None
    bytes: int | None = None
    targets: tuple[str, ...] | None = None
    target: str | None = None
    compiles: bool | None = None
    reason: str | None = None
    prefixes: "tuple[PrefixStatus, ...] | None" = None


def artifacts_below(folder: Path, *, require_signature: Path | None = None) -> Iterator[ListEntry]:
    """Yield every artifact in and below a folder, ordered by path; skip hidden folders.

    Args:
        folder: folder to search. It may be an artifact.
        require_signature: file of a public key. An artifact whose signature does not match this key is listed as
            unreadable.

    Raises:
        PrecastError: the folder does not exist.
    """
    # For names that no file system allows, os.path returns False, whereas pathlib raises an error.
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise PrecastError(
            f"{folder}: expected a folder, but it {what}; name a folder of artifacts, or make an artifact with precast"
            " export."
        )
    for path in _folders(folder):
        if isinstance(path, ListEntry):
            yield path
        elif (found := _listed(path, require_signature)) is not None:
            yield found


def _folders(folder: Path) -> Iterator[Path | ListEntry]:
    """Yield each folder that contains a manifest.json, and an entry for each folder that cannot be read."""
    if os.path.isfile(folder / MANIFEST_FILE):
        yield folder
        if _is_artifact(folder):
            return
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        yield ListEntry(path=folder, problem=f"{folder}: {error.strerror or error}.")
        return
    for name in names:
        path = folder / name
        # Follow a symlink only if it leads to an artifact. Any other symlink could lead back up and cause a loop.
        if not path.is_symlink() or os.path.isfile(path / MANIFEST_FILE):
            yield from _folders(path)


def _is_artifact(folder: Path) -> bool:
    """Return True for an artifact, even a damaged one, and False for another program's folder with a manifest.json."""
    if os.path.exists(folder / WEIGHTS_FILE) or os.path.isdir(folder / "programs"):
        return True
    try:
        with open(folder / MANIFEST_FILE, "rb") as file:
            return b'"format_version"' in file.read(_HEAD)
    except OSError:
        return False


def _listed(folder: Path, key: Path | None) -> ListEntry | None:
    if not _is_artifact(folder):
        return None
    try:
        manifest = read_manifest(folder, require_signature=key)
    except PrecastError as error:
        return ListEntry(path=folder, problem=str(error))
    machine = this_machine(cuda=any(t.platform == "cuda" for t in manifest.targets))
    target, compiles, reason = _runs(folder, manifest, machine)
    return ListEntry(
        path=folder,
        name=manifest.name,
        architecture=manifest.model.architecture,
        parameters=manifest.model.parameters,
        weights=manifest.model.weights,
        context=manifest.context,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        targets=tuple(t.name for t in manifest.targets),
        target=target.name if target else None,
        compiles=compiles,
        reason=reason,
        prefixes=_prefixes(manifest, target, machine.isa),
    )


def _prefixes(manifest: Manifest, target: Target | None, isa: str) -> "tuple[PrefixStatus, ...]":
    if not manifest.prefixes:
        return ()
    # A lazy import, because the module's own imports take 0.1 s.
    from .prefixes import statuses

    return statuses(manifest, target, isa)


def _runs(folder: Path, manifest: Manifest, machine: Machine) -> tuple[Target | None, bool, str | None]:
    """Choose the best target that runs here without compiling.

    Returns:
        The target, or None; True if any target runs here, even if only after compiling; the reason why no target runs
        here without compiling, or None.
    """
    try:
        chosen = compat.choose_target(manifest, machine, str(folder), name=None, allow_compile=False)
        return chosen, True, None
    except PrecastError as error:
        reason = str(error)
    try:
        compat.choose_target(manifest, machine, str(folder), name=None, allow_compile=True)
    except PrecastError:
        return None, False, reason
    return None, True, reason
