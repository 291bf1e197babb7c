"""Records of models whose golden answers have been replayed on this machine, so that they need not be replayed again.

A replay takes several times as long as loading. Its result depends on the artifact, on the machine, on the installed
packages and on XLA's flags alone, so one replay of each combination is enough.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import filter as matching
from pathlib import Path

import numpy as np

from precast import kernels

from ..artifact.cache_folder import make_private, remove_old, trusted_cache
from ..artifact.errors import PrecastError
from ..artifact.files import read_checked, write_atomically
from ..artifact.golden import parse_golden
from ..artifact.machine import processor_model
from ..artifact.manifest import Manifest, Target
from ..generation.model import Model
from ..runtime.installed import this_machine
from .verify import replay

# The name of the records' folder in the cache folder.
_FOLDER = "replayed"


def replay_once(model: Model, root: Path, *, again: bool = False) -> bool:
    """Replay a model's golden answers, unless an earlier replay on this machine has succeeded.

    If the cache folder cannot be written to, every call replays the answers.

    Args:
        model: the loaded artifact.
        root: its folder.
        again: replay the answers in any case.

    Returns:
        True if the answers were replayed, False if the record of an earlier replay replaced the replay.

    Raises:
        PrecastError: an answer differs.
    """
    manifest = model.manifest
    if not again and _is_recorded(manifest, model.target):
        return False
    data = read_checked(root, manifest.golden, manifest.files[manifest.golden])
    report = replay(model, parse_golden(data, manifest, str(root / manifest.golden)), str(root))
    if report.problems:
        forget(manifest)
        raise PrecastError(report.problems[0])
    with suppress(OSError, PrecastError):
        record = _record(manifest, model.target)
        make_private(record.parent)
        remove_old(record.parent)
        write_atomically(record, _text(manifest, model.target))
    return True


def forget(manifest: Manifest) -> None:
    """Remove the records of an artifact's targets on this machine."""
    for target in manifest.targets:
        with suppress(OSError, PrecastError):
            _record(manifest, target).unlink(missing_ok=True)


def _text(manifest: Manifest, target: Target) -> bytes:
    """Return the contents of a record, which are for people alone."""
    found = {
        "artifact": manifest.name,
        "target": target.name,
        "processor": processor_model(),
        "kernels": kernels.isa(),
    }
    return json.dumps(found).encode() + b"\n"


def _is_recorded(manifest: Manifest, target: Target) -> bool:
    with suppress(OSError, PrecastError):
        return _record(manifest, target).exists()
    return False


def _record(manifest: Manifest, target: Target) -> Path:
    """Return the path of the record of a replay; its name is a hash of everything that affects the result.

    Raises:
        PrecastError: there is no cache folder, or others may write to it.
        OSError: a file of this package disappears.
    """
    # The machine includes the instruction set that the kernels chose, and the features that decided the choice.
    machine = this_machine(cuda=target.platform == "cuda")
    # The manifest is not among the files that it lists, so their hashes alone would ignore a change of the manifest.
    key = (manifest, target.name, machine, processor_model(), os.environ.get("XLA_FLAGS", ""), _packages())
    return trusted_cache(_FOLDER) / hashlib.sha256(repr(key).encode()).hexdigest()


def _packages() -> tuple[object, ...]:
    """Describe the packages that compute, except for those in the description of the machine."""
    code, library = Path(__file__).parents[1], Path(kernels.__file__).parent
    return (
        np.__version__,
        # A model of a SavedModel has imported TensorFlow.
        getattr(sys.modules.get("tensorflow"), "__version__", ""),
        sorted(_states(code, "*.py")),
        sorted(_states(library, "_kernels*")),
    )


def _states(folder: Path, pattern: str) -> Iterator[tuple[str, str, int, int]]:
    """Yield the folder, name, size and modification time of each matching file below a folder.

    Reinstalling a package changes the time.
    """
    # Unlike `Path.rglob`, which takes 10 ms for 180 files, this takes 1 ms.
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        inside = os.path.relpath(place, folder)
        for name in matching(names, pattern):
            status = os.stat(os.path.join(place, name))
            yield inside, name, status.st_size, status.st_mtime_ns
