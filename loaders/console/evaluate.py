"""What ``precast eval`` does: measures an artifact on a text, with a reference or without."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError, printable
from ..progress import Step, show_progress

if TYPE_CHECKING:
    from ..audit.evaluate import Comparison, Scorer


MOST_TOKENS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure. `text` None is the shipped one, `window` None the default."""

    text: Path | None
    tokens: int
    window: int | None
    as_json: bool


def names_source(reference: Path) -> bool:
    """Whether a reference is a source to be read by the exporter, and not an artifact.

    Raises:
        PrecastError: when there is nothing of that name.
    """
    # The functions of os.path, unlike pathlib's, also answer for names that no file system takes.
    if not os.path.exists(reference):
        raise PrecastError(
            f"--reference: {reference} does not exist; expected an artifact, a Hugging Face directory or a .gguf file."
        )
    return os.path.isfile(reference) or os.path.isfile(reference / "config.json")


def open_artifact(path: Path, key: Path | None = None, threads: int | None = None) -> "Scorer":
    """Load an artifact to measure or to use as the reference.

    Args:
        path: as for `load`.
        key: file of the public key that it must be signed with.
        threads: number of computing threads; None for the default.

    Raises:
        PrecastError: as `load`.
    """
    from ..audit.evaluate import ArtifactScorer
    from ..load import load

    return ArtifactScorer(model=load(path, require_signature=key, threads=threads))


def run(
    artifact: Path,
    request: Request,
    open_reference: "Callable[[int], Scorer] | None",
    require_signature: Path | None = None,
    threads: int | None = None,
) -> None:
    """Measure the artifact and print the result on standard output.

    Args:
        artifact: as for `load`.
        request: what to measure.
        open_reference: makes the reference, given the artifact's context; None for perplexity alone.
        require_signature: file of the public key that the artifact must be signed with.
        threads: number of computing threads for the artifact; None for the default.

    Raises:
        PrecastError: for anything the user can put right.
    """
    from ..audit import evaluate as e

    if not 1 <= request.tokens <= MOST_TOKENS:
        raise PrecastError(f"--tokens: {request.tokens} is not possible, expected 1 to {MOST_TOKENS}.")
    path = e.SHIPPED_TEXT if request.text is None else request.text
    text = e.read_text(path, request.tokens)
    scorer = open_artifact(artifact, require_signature, threads)
    reference = None
    if open_reference is not None:
        with show_progress() as progress:
            progress(Step(text="reading the reference"))
            reference = open_reference(scorer.context)
    window = e.check_window(request.window, [scorer] if reference is None else [scorer, reference])
    if reference is not None:
        e.check_same_tokens(text, scorer, reference)
    tokens = e.tokenize(scorer.tokenizer, text)
    windows = e.cut(tokens, request.tokens, window)
    if not windows:
        raise PrecastError(
            f"{path}: {min(len(tokens.ids), request.tokens)} tokens are too few for a window, expected at least"
            f" {min(window, e.SHORTEST_LAST)}; give a longer text or a smaller --window."
        )
    with show_progress() as progress:
        scores = e.evaluate(scorer, windows, reference, progress)
    facts = {
        "artifact": scorer.name,
        "text": path.name,
        "window": window,
        "windows": len(windows),
        "tokens": scores.tokens,
        "perplexity": scores.perplexity,
        "reference": None if reference is None else reference.name,
        **_compared(scores.comparison),
    }
    print(json.dumps(facts) if request.as_json else "\n".join(map(printable, _lines(facts))))


def _compared(found: "Comparison | None") -> dict[str, float | None]:
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
    return "more than a float holds" if perplexity is None else f"{perplexity:.4f}"
