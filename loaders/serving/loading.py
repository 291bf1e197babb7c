"""Load and verify models for the server. This module imports none of the server's packages."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..artifact.compat import choose_target
from ..audit.replayed import replay_once
from ..background import BackgroundCall
from ..generation.scheduler import Scheduler
from ..load import load
from ..locate import find_artifact, read_manifest
from ..runtime.installed import this_machine
from ..runtime.limits import need
from ..text.known_tokenizers import KnownTokenizers
from .settings import ServeSettings

if TYPE_CHECKING:
    from ..artifact.manifest import Manifest, Target
    from ..generation.model import Model

Log = Callable[[str], None]
EarlyLoad = BackgroundCall["tuple[Loaded, int]"]


class Loaded(NamedTuple):
    """A loaded model.

    Attributes:
        model: the model.
        is_replayed: True if this load has replayed the golden answers, False if an earlier load has.
    """

    model: "Model"
    is_replayed: bool


def early_load(sources: Mapping[str, Path | str], settings: ServeSettings, log: Log) -> EarlyLoad | None:
    """If the server offers a single folder, begin to load it in a thread.

    Returns:
        The call that returns the model and its estimated memory in bytes; None if the server has several models, a
        URL, or a limit for the memory.
    """
    source = next(iter(sources.values()), "")
    if len(sources) != 1 or isinstance(source, str) or settings.memory is not None:
        return None
    return BackgroundCall(partial(_load, source, settings, log), daemon=False)


def _load(source: Path, settings: ServeSettings, log: Log) -> tuple[Loaded, int]:
    # Without a limit for the memory, the size may come from the loaded model, so that the manifest is parsed only once.
    loaded = load_verified(find_artifact(source), settings, log, None)
    return loaded, _memory(loaded.model.manifest, loaded.model.target)


def measure(source: Path | str, settings: ServeSettings, log: Log) -> tuple[Path, int]:
    """Return an artifact's folder, after pulling it from a URL if needed, and the memory that the model may take."""
    if isinstance(source, str):
        from ..store.pull import fetch

        source = fetch(source, require_signature=settings.signature, log=log)
    root = find_artifact(source)
    manifest = read_manifest(root, require_signature=settings.signature)
    machine = this_machine(cuda=any(t.platform == "cuda" for t in manifest.targets))
    given = settings.loading or {}
    target = choose_target(
        manifest,
        machine,
        str(root),
        name=given.get("target"),
        allow_compile=given.get("allow_compile", False),
    )
    return root, _memory(manifest, target)


def _memory(manifest: "Manifest", target: "Target") -> int:
    needed = need(manifest, target)
    return needed.all + needed.idle


def load_verified(
    root: Path, settings: ServeSettings, log: Log, tokenizers: KnownTokenizers | None
) -> Loaded:
    """Load an artifact, and replay its golden answers if that has not been done on this machine.

    Args:
        root: the artifact's folder.
        settings: the server's settings.
        log: receives messages.
        tokenizers: tokenizers that need not be parsed again. The model's tokenizer is added to them.

    Raises:
        PrecastError: the artifact does not load, or an answer differs.
    """
    given = settings.loading or {}
    model = load(root, **given, log=log, tokenizers=tokenizers)
    if tokenizers is not None:
        tokenizers.keep(model.manifest, model.tokenizer)
    is_replayed = replay_once(model, root, again=given.get("rehash", False))
    # One KV cache: the scheduler queues the answers beyond its slots.
    model.scheduler = Scheduler(model.engine, caches=1, prefixes=model.prefixes)
    return Loaded(model, is_replayed)
