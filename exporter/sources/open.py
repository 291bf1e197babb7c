"""Open a model from any kind of source: a Hugging Face directory, a GGUF file, a hub id or the demo model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError

from .base import Source


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of source.

    Attributes:
        name: description of the kind in messages.
        matches: returns True if a spec names such a source.
        open: opens the source that a spec names.
    """

    name: str
    matches: Callable[[str], bool]
    open: Callable[[str], Source]


# Each of these functions imports a reader when it is called, because the readers' libraries are slow to import.


def _open_directory(spec: str) -> Source:
    from .huggingface.source import open_huggingface

    return open_huggingface(Path(spec))


def _open_gguf(spec: str) -> Source:
    from .gguf.source import open_gguf

    return open_gguf(Path(spec))


def _open_hub(spec: str) -> Source:
    from .hub import open_hub

    return open_hub(spec)


def _is_hub_id(spec: str) -> bool:
    from .hub import is_hub_id

    return is_hub_id(spec)


def _is_gguf(spec: str) -> bool:
    """Return True if a file begins with GGUF's magic bytes, or its name ends in .gguf.

    Some stores name files by hash, so the magic bytes suffice. The name suffices too: if the magic bytes are missing,
    the reader refuses the file with a clear message.
    """
    from .files import first_bytes, plain_file
    from .gguf.container import MAGIC

    path = Path(spec)
    return plain_file(path) and (spec.lower().endswith(".gguf") or first_bytes(path, len(MAGIC)) == MAGIC)


# In order of precedence: local sources come before those that must be fetched.
_KINDS = (
    _Kind(name="a Hugging Face directory", matches=lambda spec: Path(spec).is_dir(), open=_open_directory),
    _Kind(name="a GGUF file", matches=_is_gguf, open=_open_gguf),
    _Kind(
        name="a hub id such as org/name or org/name@revision",
        matches=lambda spec: _is_hub_id(spec) and not Path(spec).exists(),
        open=_open_hub,
    ),
)


def open_source(spec: str | None) -> Source:
    """Open the model that `spec` names.

    Args:
        spec: a Hugging Face directory, a GGUF file, a hub id ("name" or "org/name", optionally with "@revision"), or
            None for the demo model.

    Returns:
        The source; tensors are read only on demand.

    Raises:
        PrecastError: `spec` is none of these, the model cannot be read, or a package needed to read it is missing.
    """
    try:
        return _open(spec)
    except ModuleNotFoundError as error:
        raise PrecastError(
            f"exporting needs the package {error.name}, which is not installed; run pip install "
            "'precast[export]'."
        ) from error


def _open(spec: str | None) -> Source:
    if spec is None:
        from .demo import open_demo

        return open_demo()
    for kind in _KINDS:
        if kind.matches(spec):
            return kind.open(spec)
    expected = ", ".join(kind.name for kind in _KINDS[:-1])
    raise PrecastError(f"{spec!r}: expected {expected} or {_KINDS[-1].name}, found {_found(spec)}.")


def _found(spec: str) -> str:
    """Describe the file or folder that `spec` names, if any, and name the remedy."""
    path = Path(spec)
    if not path.is_file():
        return "nothing of that name here; check the spelling"
    if path.suffix in (".safetensors", ".json", ".bin"):
        return f"one file of a directory; name the directory, {path.resolve().parent}"
    return "a file of another kind; check the spelling"
