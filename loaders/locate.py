"""Find an artifact, and read its manifest."""

import os
from pathlib import Path

from .artifact import files
from .artifact.manifest import MANIFEST_FILE, Manifest
from .artifact.manifest_parser import parse_manifest
from .artifact.record import MAX_JSON_BYTES


def find_artifact(path: Path) -> Path:
    """The artifact at `path`, or the only one in it.

    Raises:
        PrecastError: when there is none, or more than one.
    """
    # The functions of os.path, unlike pathlib's, also answer for names that no file system takes.
    if os.path.isfile(path / MANIFEST_FILE):
        return path
    candidates = path.glob(f"*/{MANIFEST_FILE}") if os.path.isdir(path) else ()
    inside = sorted(p.parent for p in candidates if not p.parent.name.startswith("."))
    if len(inside) == 1:
        return inside[0]
    from .artifact.no_artifact import refusal  # a successful start does not need it

    raise refusal(path, inside)


def read_manifest(root: Path, *, require_signature: Path | None = None) -> Manifest:
    """Reads and checks the manifest of the artifact at `root`.

    Args:
        root: the artifact's folder.
        require_signature: file of a public key; the bytes that are parsed must have been signed with its private one.

    Raises:
        PrecastError: when it is missing, not signed as required, or not understood.
    """
    data = files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
    if require_signature is not None:
        from .signing import check_signature

        check_signature(root, data, require_signature)
    return parse_manifest(data, str(root / MANIFEST_FILE))
