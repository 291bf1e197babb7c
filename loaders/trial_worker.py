"""The child process of a trial: load a target, run a few steps, and report each step before it begins."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact.errors import PrecastError
from .compiling import child_process
from .progress import Progress, Step

if TYPE_CHECKING:
    from .generation.engine import KVCache
    from .generation.model import Model

_PROMPT = (1, 2, 3)


def main() -> None:
    """Answer the requests of `precast.loaders.compiling.trial`."""
    child_process.serve(_answer)


def _answer(request: Mapping[str, Any], _: bytes, progress: Progress) -> child_process.Answer:
    """Try the target that a request names."""
    attempt(
        Path(request["root"]),
        request["target"],
        allow_compile=request["allow_compile"],
        threads=request["threads"],
        progress=progress,
    )
    return {}, b""


def attempt(root: Path, name: str, *, allow_compile: bool, threads: int | None, progress: Progress) -> None:
    """Load every program of a target; then prefill, decode and score a few tokens.

    Args:
        root: the artifact's folder.
        name: name of the target.
        allow_compile: allow compiling the target from its StableHLO.
        threads: number of computing threads; None for the default.
        progress: receives each step before it begins.

    Raises:
        PrecastError: the target cannot be loaded (see `load`), or a program fails.
    """
    # Import these after the child has reported that it runs. A crash while jaxlib is imported then fails the trial.
    from .generation.engine import DecodeRow
    from .load import load

    model = load(
        root,
        target=name,
        allow_compile=allow_compile,
        trusted=True,
        threads=threads,
        log=lambda _: None,
        progress=progress,
    )
    engine, target = model.engine, model.target

    def begin(program: str) -> None:
        progress(Step(text=f"running {program}"))

    begin(target.of_kind("cache")[0].name)
    cache = engine.new_cache()
    _check_caches(model, cache, root)
    # Any token ids within the vocabulary will do. Leave room in the context for two more tokens.
    prompt = [token % engine.vocab for token in _PROMPT][: max(1, engine.context - 2)]
    begin(min(target.of_kind("prefill"), key=lambda p: p.tokens).name)
    engine.prefill(prompt, cache)
    decodes = sorted(target.of_kind("decode"), key=lambda p: p.rows)
    for program, fewer in zip(decodes, (0, *(p.rows for p in decodes)), strict=False):
        begin(program.name)
        for position in range(len(prompt), min(len(prompt) + 2, engine.context)):
            engine.decode([DecodeRow(slot, 0, position) for slot in range(fewer + 1)], cache)
    for program in target.of_kind("score"):
        begin(program.name)
        engine.score(prompt[: engine.score_tokens], cache, start=0, slot=0)


def _check_caches(model: "Model", cache: "KVCache", root: Path) -> None:
    """Compare the sizes of the KV cache's arrays with the manifest, which may be self-consistent but wrong.

    Raises:
        PrecastError: an array has another size; the message names the first.
    """
    from .runtime import pjrt

    if model.target.platform != "cpu" or model.target.runtime == "savedmodel":
        return  # other platforms may pad their arrays
    for array in model.manifest.cache:
        if (found := pjrt.size_of(cache.buffers[array.name])) != array.bytes:
            raise PrecastError(
                f"{root}: its programs allocate {found} bytes for {array.name!r}, but the manifest states"
                f" {array.bytes}; export the model again."
            )


if __name__ == "__main__":
    main()
