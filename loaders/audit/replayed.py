"""Records of models whose golden answers have been replayed on this machine, so that they need not be replayed again.

A replay takes several times as long as loading. Its result depends on the artifact's files, on the machine and on the
installed packages alone, so one replay of each combination is enough.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

from precast import kernels

from ..artifact.cache_folder import make_private, remove_old, trusted_cache
from ..artifact.errors import PrecastError
from ..artifact.files import read_checked, write_atomically
from ..artifact.golden import parse_golden
from ..generation.model import Model
from ..runtime.installed import this_machine
from .verify import replay

# The name of the records' folder in the cache folder.
_FOLDER = "replayed"


def replay_once(model: Model, root: Path, *, again: bool = False) -> None:
    """Replay a model's golden answers, unless an earlier replay on this machine has succeeded.

    If the cache folder cannot be written to, every call replays the answers.

    Args:
        model: the loaded artifact.
        root: its folder.
        again: replay the answers in any case.

    Raises:
        PrecastError: an answer differs.
    """
    if not again and _is_recorded(model):
        return
    manifest = model.manifest
    data = read_checked(root, manifest.golden, manifest.files[manifest.golden])
    report = replay(model, parse_golden(data, manifest, str(root / manifest.golden)), str(root))
    if report.problems:
        raise PrecastError(report.problems[0])
    with suppress(OSError, PrecastError):
        record = _record(model)
        make_private(record.parent)
        remove_old(record.parent)
        write_atomically(record, b"")


def _is_recorded(model: Model) -> bool:
    with suppress(OSError, PrecastError):
        return _record(model).exists()
    return False


def _record(model: Model) -> Path:
    """Return the path of the record of a replay; its name is a hash of everything that affects the result.

    Raises:
        PrecastError: there is no cache folder, or others may write to it.
        OSError: the library of kernels cannot be found.
    """
    manifest, target = model.manifest, model.target
    digests = sorted((name, entry.sha256) for name, entry in manifest.files.items())
    library = Path(kernels.__file__).parent.glob("_kernels*")
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in library]
    machine = this_machine(cuda=target.platform == "cuda")
    key = (digests, target, manifest.cache, manifest.context, manifest.slots, machine, sorted(state))
    return trusted_cache(_FOLDER) / hashlib.sha256(repr(key).encode()).hexdigest()
