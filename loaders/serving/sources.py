"""The models that a server offers, by name."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..artifact.errors import PrecastError
from ..artifact.manifest import MANIFEST_FILE
from ..locate import find_artifact


def named_sources(given: Iterable[Path | str]) -> Mapping[str, Path | str]:
    """Return the folder or the URL of each model, by the model's name.

    The name is the last part of the folder or of the URL.

    Args:
        given: folders of artifacts, folders of such folders, and URLs of pushed artifacts.

    Raises:
        PrecastError: a folder has no artifact, or two models have the same name.
    """
    found: dict[str, Path | str] = {}
    for source in (inner for one in given for inner in _expanded(one)):
        name = (
            source.rstrip("/").rpartition("/")[2]
            if isinstance(source, str)
            else Path(os.path.abspath(source)).name
        )
        if name in found:
            raise PrecastError(
                f"{source}: expected models with different names, found {name!r} here and at {found[name]}; rename one"
                " of the folders."
            )
        found[name] = source
    return found


def _expanded(source: Path | str) -> list[Path | str]:
    if isinstance(source, str):
        return [source]
    if os.path.isdir(source) and not os.path.isfile(source / MANIFEST_FILE):
        inside = sorted(
            p.parent for p in source.glob(f"*/{MANIFEST_FILE}") if not p.parent.name.startswith(".")
        )
        if inside:
            return [*inside]
    return [find_artifact(source)]
