"""Errors for a path that is not an artifact. Each error states the contents of the path and a remedy."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from .errors import PrecastError
from .manifest import MANIFEST_FILE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A sentence lists at most this many names.
_MOST_NAMES = 8
_EXPECTED = "expected the folder of an artifact, but it"
_REMEDY = "make an artifact with precast export, or check the path"


def refusal(path: Path, inside: Sequence[Path]) -> PrecastError:
    """Return the error for a path that is not an artifact.

    Args:
        path: the path as the user gave it.
        inside: the artifacts among the path's subfolders: none, or more than one.
    """
    if inside:
        return PrecastError(f"{path}: expected one artifact, found {_listed([p.name for p in inside])}")
    if (source := _source_at(path)) is not None:
        what, named = source
        return PrecastError(
            f"{path}: expected an artifact, found {what}; make an artifact of it with: precast export"
            f" {shlex.quote(str(named))}"
        )
    if os.path.isdir(path):
        if deeper := [str(p.parent.relative_to(path)) for p in islice(_below(path), 1000)]:
            return PrecastError(f"{path}: expected an artifact, found {_listed(sorted(deeper))}")
        return PrecastError(
            f"{path}: expected the folder of an artifact, but it contains no {MANIFEST_FILE}; {_REMEDY}."
        )
    if os.path.exists(path):
        return PrecastError(f"{path}: {_EXPECTED} is a file; {_REMEDY}.")
    if _HUB_ID.fullmatch(str(path)) and not os.path.exists(path.parent):
        return PrecastError(
            f"{path}: {_EXPECTED} does not exist; export the model of this name from the Hugging Face hub with:"
            f" precast export {path}"
        )
    return PrecastError(f"{path}: {_EXPECTED} does not exist; {_REMEDY}.")


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"one in a subfolder; name that subfolder: {names[0]}"
    more = f", … {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{len(names)} ({', '.join(names[:_MOST_NAMES])}{more}); name one of them."


def _below(path: Path) -> Iterator[Path]:
    """Yield the paths of manifests two levels below `path`, outside hidden folders."""
    return (p for p in path.glob(f"*/*/{MANIFEST_FILE}") if not p.relative_to(path).parts[0].startswith("."))


def _source_at(path: Path) -> tuple[str, Path] | None:
    """Return a description of the model at a path and the path to export; None if there is no model to export."""
    if os.path.isfile(path):
        if _is_gguf(path):
            return "a GGUF file", path
        if path.suffix == ".safetensors":
            return "weights of a Hugging Face model", path.parent
        return None
    if os.path.isfile(path / "config.json"):
        return "a Hugging Face model", path
    files = sorted(islice(path.glob("*.gguf"), 2)) if os.path.isdir(path) else []
    return ("a GGUF file in it", files[0]) if len(files) == 1 else None


def _is_gguf(path: Path) -> bool:
    """Return True for a GGUF file, by its name or its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False
