"""The child process of a trial: load a target, take a few steps, and say where it is."""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .artifact.errors import PrecastError, printable
from .compiling import child
from .compiling.trial import MARK, REFUSED, SENTENCE
from .generation.engine import KVCache
from .generation.model import Model
from .load import load
from .runtime import pjrt

_PROMPT = (1, 2, 3)


def main(arguments: list[str]) -> int:
    """Loads a target and takes a few steps, saying on standard output where it is.

    Args:
        arguments: the artifact, the name of the target, seconds that it may take, threads that compute; then
            "--compile" or nothing.
    """
    root, name, limit_s, threads, *options = arguments
    _restrict(int(limit_s))
    told = child.answers()

    def say(line: str) -> None:
        told.write(f"{line}\n".encode(errors="replace"))
        told.flush()

    try:
        attempt(
            Path(root),
            name,
            compile="--compile" in options,
            threads=int(threads),
            at=lambda place: say(MARK + printable(place)),
        )
    except PrecastError as error:
        say(SENTENCE + " ".join(str(error).split()))
        return REFUSED
    return 0


def attempt(root: Path, name: str, *, compile: bool, threads: int, at: Callable[[str], None]) -> None:
    """Loads every program of a target, prefills a few tokens and decodes twice.

    Args:
        root: the artifact.
        name: of the target.
        compile: whether it may be compiled first.
        threads: that compute.
        at: told what begins now.

    Raises:
        PrecastError: as `load`, and when a program fails.
    """
    model = load(
        root,
        target=name,
        compile=compile,
        trusted=True,
        threads=threads,
        log=lambda _: None,
        at=lambda p: at(f"loading {p}"),
    )
    engine, target = model.engine, model.target
    at(f"running {target.of_kind('cache')[0].name}")
    cache = engine.new_cache()
    _check_caches(model, cache, root)
    # As many as leave room for two more; any ids will do, but they must be in the vocabulary.
    prompt = [token % engine.vocab for token in _PROMPT][: max(1, engine.context - 2)]
    at(f"running {min(target.of_kind('prefill'), key=lambda p: p.tokens).name}")
    engine.prefill(prompt, cache)
    at(f"running {target.of_kind('decode')[0].name}")
    idle = engine.slots - 1
    for position in range(len(prompt), min(len(prompt) + 2, engine.context)):
        engine.decode([0, *[0] * idle], [position, *[-1] * idle], cache)


def _check_caches(model: Model, cache: KVCache, root: Path) -> None:
    """A manifest may be wrong about its programs in a way that agrees with itself; what they return tells."""
    if model.target.platform != "cpu" or model.target.runtime == "savedmodel":
        return  # others may pad what they keep
    for array in model.manifest.cache:
        if (found := pjrt.size_of(cache.buffers[array.name])) != array.bytes:
            raise PrecastError(
                f"{root}: its programs make a cache {array.name!r} of {found} bytes, expected {array.bytes} by the"
                " manifest; export the model again."
            )


def _restrict(limit_s: int) -> None:
    """No file with the memory of a crash, and an end also where the parent is gone."""
    with suppress(ImportError, OSError, ValueError, AttributeError):
        import resource
        import signal

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit_s + 5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
