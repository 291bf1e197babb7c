"""Find an artifact and read its manifest."""

import os
from pathlib import Path

from .artifact import files
from .artifact.json_records import MAX_JSON_BYTES
from .artifact.manifest import MANIFEST_FILE, Manifest
from .artifact.manifest_parser import parse_manifest


def find_artifact(path: Path) -> Path:
    """Return the folder of the artifact at `path`, or of the only artifact among its subfolders.

    Raises:
        PrecastError: there is no artifact, or more than one.
    """
    # For names that no file system allows, os.path returns False, whereas pathlib raises an error.
    if os.path.isfile(path / MANIFEST_FILE):
        return path
    candidates = path.glob(f"*/{MANIFEST_FILE}") if os.path.isdir(path) else ()
    inside = sorted(p.parent for p in candidates if not p.parent.name.startswith("."))
    if len(inside) == 1:
        return inside[0]
    from .artifact.no_artifact import refusal  # a lazy import, because only an error needs it

    raise refusal(path, inside)


def read_manifest(root: Path, *, require_signature: Path | None = None) -> Manifest:
    """Read and check the manifest of the artifact at `root`.

    Args:
        root: the artifact's folder.
        require_signature: file of the public key that must verify the manifest's signature before the manifest is
            parsed. None skips the verification.

    Raises:
        PrecastError: the manifest is missing or invalid, or its signature is missing or does not match the key.
    """
    data = files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
    if require_signature is not None:
        from .signing import check_signature

        check_signature(root, data, require_signature)
    return parse_manifest(data, str(root / MANIFEST_FILE))
