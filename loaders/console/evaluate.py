"""The command ``precast eval``."""

import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError, printable
from ..artifact.frozen import Frozen
from ..progress import Display, Step, show_progress
from .command import local_folder

if TYPE_CHECKING:
    from ..audit.evaluate import Comparison, Scorer, Scores

MOST_TOKENS = 10_000_000

# A function that opens a reference, given the artifact's context length and a display.
_Opener = Callable[[int, Display], "Scorer"]


class TextOptions(Frozen):
    """The command line's options for the text.

    Attributes:
        path: file of the text; None for the text that precast contains.
        tokens: maximum number of tokens of the text to use.
        window: number of tokens in a window; None for the default.
    """

    path: Path | None
    tokens: int
    window: int | None


def run(
    artifact: Path | str,
    text: TextOptions,
    *,
    reference: Path | None,
    source_opener: "Callable[[], Callable[[str, int], Scorer]]",
    as_json: bool,
    require_signature: Path | None,
    threads: int | None,
) -> int:
    """Measure how well an artifact predicts a text, and print the result.

    Args:
        artifact: as for `load`.
        text: the text to predict, and its limits.
        reference: the model to compare with, which is an artifact or a source that the exporter can read; None to
            measure only the perplexity.
        source_opener: function that returns the exporter's function for opening a source, given the source's name and a
            context length. The command line passes it as an argument, because the loaders must not import the exporter.
        as_json: print one line of JSON.
        require_signature: file of the public key that artifacts must be signed with.
        threads: number of computing threads for artifacts; None for the default.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: a file cannot be read, an option is out of range, or the two models have different tokenizers.
    """
    folder = local_folder(artifact, require_signature)
    open_artifact = partial(_open_artifact, key=require_signature, threads=threads)
    open_reference = None if reference is None else _reference_opener(reference, open_artifact, source_opener)
    facts = _measure(partial(open_artifact, folder), open_reference, text)
    print(json.dumps(facts) if as_json else "\n".join(map(printable, _lines(facts))))
    return 0


def _open_artifact(path: Path, display: Display, *, key: Path | None, threads: int | None) -> "Scorer":
    from ..audit.evaluate import ArtifactScorer
    from ..load import load

    return ArtifactScorer(
        model=load(path, require_signature=key, threads=threads, log=display.log, progress=display)
    )


def _reference_opener(
    reference: Path,
    open_artifact: "Callable[[Path, Display], Scorer]",
    source_opener: "Callable[[], Callable[[str, int], Scorer]]",
) -> _Opener:
    """Return a function that opens the reference.

    Raises:
        PrecastError: the reference does not exist, or the packages for a source are not installed.
    """
    if _is_source(reference):
        open_source = source_opener()
        return lambda context, _: open_source(str(reference), context)
    return lambda _, display: open_artifact(reference, display)


def _is_source(reference: Path) -> bool:
    """Return True if a reference is a source for the exporter, and False if it is an artifact.

    Raises:
        PrecastError: the path does not exist.
    """
    # For names that no file system allows, os.path returns False, whereas pathlib raises an error.
    if not os.path.exists(reference):
        raise PrecastError(
            f"--reference: expected an artifact, a Hugging Face directory or a .gguf file, but {reference} does not"
            " exist; check the path."
        )
    return os.path.isfile(reference) or os.path.isfile(reference / "config.json")


def _measure(
    open_artifact: "Callable[[Display], Scorer]", open_reference: _Opener | None, options: TextOptions
) -> dict[str, Any]:
    """Measure the perplexity, compare with the reference if there is one, and return the results to print."""
    from ..audit import evaluate as e

    if not 1 <= options.tokens <= MOST_TOKENS:
        raise PrecastError(f"--tokens: expected 1 to {MOST_TOKENS}, found {options.tokens}.")
    path = options.path or e.SHIPPED_TEXT
    text = e.read_text(path, options.tokens)
    with show_progress() as display:
        artifact = open_artifact(display)
        reference = None
        if open_reference is not None:
            display(Step(text="reading the reference"))
            reference = open_reference(artifact.context, display)
        window = e.check_window(options.window, [artifact] if reference is None else [artifact, reference])
        if reference is not None:
            e.check_same_tokens(text, artifact, reference)
        tokens = e.tokenize(artifact.tokenizer, text)
        windows = e.cut(tokens, options.tokens, window)
        if not windows:
            raise PrecastError(
                f"{path}: expected at least {min(window, e.SHORTEST_LAST)} tokens (enough for one window), found"
                f" {min(len(tokens.ids), options.tokens)}; give a longer text, a larger --tokens or a smaller --window."
            )
        scores = e.evaluate(artifact, windows, reference, display)
    return {
        "artifact": artifact.name,
        "text": path.name,
        "window": window,
        "windows": len(windows),
        **_scores(scores, reference),
    }


def _scores(scores: "Scores", reference: "Scorer | None") -> dict[str, Any]:
    return {
        "tokens": scores.tokens,
        "perplexity": scores.perplexity,
        "reference": None if reference is None else reference.name,
        **_comparison(scores.comparison),
    }


def _comparison(found: "Comparison | None") -> dict[str, float | None]:
    if found is None:
        return dict.fromkeys(("reference_perplexity", "kl_mean", "kl_p99", "top1"))
    return {
        "reference_perplexity": found.perplexity,
        "kl_mean": found.kl_mean,
        "kl_p99": found.kl_p99,
        "top1": found.top1,
    }


def _lines(facts: dict[str, Any]) -> Iterable[str]:
    windows = f"{facts['windows']} window{'' if facts['windows'] == 1 else 's'} of {facts['window']}"
    yield f"{facts['artifact']} on {facts['text']}: {facts['tokens']:,} predictions in {windows}"
    yield f"  perplexity            {_number(facts['perplexity'])}"
    if facts["reference"] is not None:
        yield f"  reference perplexity  {_number(facts['reference_perplexity'])}  ({facts['reference']})"
        yield f"  KL divergence         {facts['kl_mean']:.3g} nats per token, 99th percentile {facts['kl_p99']:.3g}"
        yield f"  top-1 agreement       {facts['top1']:.2%}"


def _number(perplexity: float | None) -> str:
    return "beyond the range of a float" if perplexity is None else f"{perplexity:.4f}"
