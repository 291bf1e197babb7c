"""The command ``precast batch``."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..artifact.errors import PrecastError, printable
from ..artifact.interrupt import raise_on_interrupt
from ..progress import show_progress
from .run import LoadOptions, SamplingOptions


def run(
    artifact: Path | str,
    source: Path,
    target: Path,
    *,
    template_variables: Mapping[str, Any],
    sampling: SamplingOptions,
    loading: LoadOptions,
) -> int:
    """Answer every request in a file, and print the numbers of answers and errors on standard error.

    Args:
        artifact: a path or a URL.
        source: the file of requests.
        target: the file of answers.
        template_variables: variables of the chat template; those of a request take precedence.
        sampling: sampling parameters; those of a request take precedence.
        loading: options for loading.

    Returns:
        The exit code: 0 if all requests were answered, 1 if some requests failed.

    Raises:
        PrecastError: the artifact does not load, or a file cannot be read or written.
    """
    from .. import batch
    from ..load import load

    if source.exists() and target.exists() and source.samefile(target):
        raise PrecastError(f"{target}: is both the input and the output; choose another output.")
    with show_progress() as display:
        model = load(artifact, **loading.given(), log=display.log, progress=display)
        params = replace(model.default_sampling(), **sampling.given())
        try:
            with raise_on_interrupt():
                found = batch.run(
                    model, source, target, params, template_variables=template_variables, progress=display
                )
        except KeyboardInterrupt:
            display.log("Interrupted; run the same command again to answer the remaining requests.")
            raise
    kept = f", {found.kept:,} of them from an earlier run" if found.kept else ""
    print(
        printable(f"{target}: {found.answers:,} answers and {found.errors:,} errors{kept}"), file=sys.stderr
    )
    return 1 if found.errors else 0
