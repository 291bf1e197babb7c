"""The artifacts below a folder: what each is, and whether it runs here."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .artifact import compat
from .artifact.errors import PrecastError
from .artifact.machine import Machine
from .artifact.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest
from .load import read_manifest
from .runtime.pjrt import this_machine

# Bytes of a manifest in which its version is looked for.
_HEAD = 4096


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An artifact.

    Attributes:
        path: of its folder.
        problem: why it cannot be read; None where it can. Then the rest is None.
        name: of the model.
        architecture: of the model.
        parameters: of the model.
        weights: how they are stored.
        context: positions of a sequence.
        bytes: of all files.
        targets: their names.
        target: the one that runs here; None where none does.
        compiles: whether one runs here once it is compiled.
        reason: why none runs here as it is; None where one does.
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


def artifacts_below(folder: Path, *, require_signature: Path | None = None) -> Iterator[Listed]:
    """Yield every artifact in a folder and the folders below it, by path; hidden folders are left out.

    Args:
        folder: to look in. It may be an artifact.
        require_signature: file of a public key; what is not signed with its private one cannot be read.

    Raises:
        PrecastError: when there is no such folder.
    """
    # The functions of os.path, unlike pathlib's, also answer for names that no file system takes.
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise PrecastError(f"{folder}: expected a folder, but it {what}; precast export writes to artifacts.")
    for path in _folders(folder):
        if isinstance(path, Listed):
            yield path
        elif (found := _listed(path, require_signature)) is not None:
            yield found


def _folders(folder: Path) -> Iterator[Path | Listed]:
    """Yield the folders that have a manifest, and those that cannot be looked into."""
    if os.path.isfile(folder / MANIFEST_FILE):
        yield folder
        if _is_artifact(folder):
            return
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        yield Listed(path=folder, problem=f"{folder}: {error.strerror or error}.")
        return
    for name in names:
        path = folder / name
        # A link may be an artifact, but leads to no further folders: it could lead back.
        if not path.is_symlink() or os.path.isfile(path / MANIFEST_FILE):
            yield from _folders(path)


def _is_artifact(folder: Path) -> bool:
    """Tell an artifact, however broken, from another program's folder with a file of the same name."""
    if os.path.exists(folder / WEIGHTS_FILE) or os.path.isdir(folder / "programs"):
        return True
    try:
        with open(folder / MANIFEST_FILE, "rb") as file:
            return b'"format_version"' in file.read(_HEAD)
    except OSError:
        return False


def _listed(folder: Path, key: Path | None) -> Listed | None:
    if not _is_artifact(folder):
        return None
    try:
        manifest = read_manifest(folder, require_signature=key)
    except PrecastError as error:
        return Listed(path=folder, problem=str(error))
    machine = this_machine(cuda=any(t.platform == "cuda" for t in manifest.targets))
    target, compiles, reason = _runs(folder, manifest, machine)
    return Listed(
        path=folder,
        name=manifest.name,
        architecture=manifest.model.architecture,
        parameters=manifest.model.parameters,
        weights=manifest.model.weights,
        context=manifest.capacity,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        targets=tuple(t.name for t in manifest.targets),
        target=target,
        compiles=compiles,
        reason=reason,
    )


def _runs(folder: Path, manifest: Manifest, machine: Machine) -> tuple[str | None, bool, str | None]:
    """The target that runs here, whether one does once it is compiled, and why none does as it is."""
    try:
        chosen = compat.choose_target(manifest, machine, str(folder), name=None, may_compile=False)
        return chosen.name, True, None
    except PrecastError as error:
        reason = str(error)
    try:
        compat.choose_target(manifest, machine, str(folder), name=None, may_compile=True)
    except PrecastError:
        return None, False, reason
    return None, True, reason
