"""The command ``precast chat``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import run as run_command
from .run import LoadOptions, Prompt, SamplingOptions


def run(
    artifact: Path | str,
    *,
    system: str | None,
    literal: bool,
    template_variables: Mapping[str, Any],
    state: Path | None,
    sampling: SamplingOptions,
    loading: LoadOptions,
    stats: bool,
) -> int:
    """Chat on a terminal. If standard input is not a terminal, answer its text as the only message.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: see `run`.
    """
    prompt = Prompt(
        text=None,
        ids=None,
        chat=True,
        system=system,
        literal=literal,
        state=state,
        template_variables=template_variables,
    )
    return run_command.run(artifact, prompt, sampling=sampling, loading=loading, as_json=False, stats=stats)
