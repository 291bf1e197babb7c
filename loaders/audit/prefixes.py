"""Find the stored prefixes that this machine uses, and check their keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artifact.errors import PrecastError
from ..artifact.manifest import Manifest, Target
from ..generation.engine import DecodeRow, Engine
from ..generation.model import Model
from ..generation.prefixes import PrefixTree
from ..generation.stored_prefixes import StoredPrefix, obstacle, open_prefix, usable
from ..progress import Progress, Step, silent
from .verify import DO_NOT_USE

# The number of tokens in the answers that are compared.
_ANSWER = 8


@dataclass(frozen=True, kw_only=True)
class PrefixStatus:
    """A stored prefix on this machine.

    Attributes:
        name: the prefix's name.
        tokens: number of tokens.
        bytes: total size of the prefix's files.
        obstacle: the reason why this machine does not use the prefix, without a full stop; None if it does.
    """

    name: str
    tokens: int
    bytes: int
    obstacle: str | None


@dataclass(frozen=True, kw_only=True)
class PrefixReport:
    """The result of recomputing the prefixes.

    Attributes:
        prefixes: all prefixes. Prefixes with an obstacle were not recomputed.
        problems: a sentence for each damaged file and each difference.
    """

    prefixes: tuple[PrefixStatus, ...]
    problems: tuple[str, ...]


def statuses(manifest: Manifest, target: Target | None, isa: str) -> tuple[PrefixStatus, ...]:
    """Return the status of each prefix of an artifact.

    Args:
        manifest: the artifact's manifest.
        target: the target that runs; None if no target runs.
        isa: the instruction set of the machine's kernels.
    """
    return tuple(
        PrefixStatus(
            name=p.name,
            tokens=p.tokens,
            bytes=manifest.files[p.file].bytes + manifest.files[p.arrays].bytes,
            obstacle="no target runs here" if target is None else obstacle(p, manifest, target, isa),
        )
        for p in manifest.prefixes
    )


def replay_prefixes(model: Model, root: Path, isa: str, progress: Progress = silent) -> PrefixReport:
    """Recompute the keys and values of the prefixes that the model uses, and compare them bit for bit.

    Args:
        model: the loaded artifact.
        root: the artifact's folder.
        isa: the instruction set of the machine's kernels.
        progress: receives the number of prefixes recomputed.

    Raises:
        PrecastError: a program fails.
    """
    fit, _ = usable(model.manifest, model.target, isa)
    problems: list[str] = []
    for i, prefix in enumerate(fit):
        progress(Step(text="recomputing prefixes", done=i, total=len(fit), unit="prefixes"))
        where = f"{root}: prefix {prefix.name!r}"
        try:
            stored = open_prefix(root, model.manifest, prefix)
        except PrecastError as error:
            problems.append(str(error))
        else:
            problems += _differences(model.engine, stored, where)
    return PrefixReport(
        prefixes=statuses(model.manifest, model.target, isa),
        problems=tuple(problems),
    )


def _differences(engine: Engine, stored: StoredPrefix, where: str) -> list[str]:
    """Return a sentence for each array that differs from its recomputation, and one if the answer differs."""
    computed = PrefixTree(engine, 0).compute(stored.tokens)
    wrong = []
    for name, span in stored.spans.items():
        count = int(
            np.count_nonzero((span.array != computed[name].array).any(axis=tuple(range(3, span.array.ndim))))
        )
        if count:
            wrong.append(f"{where}: {count} vectors of {name} differ from those recomputed now; {DO_NOT_USE}")
    tree = PrefixTree(engine, 0)
    tree.pin(stored.tokens, stored.spans)
    expected, found = (_answer(engine, t, stored.tokens) for t in (PrefixTree(engine, 0), tree))
    if found != expected:
        wrong.append(
            f"{where}: the answer is {found} with the prefix, but {expected} without it; {DO_NOT_USE}"
        )
    return wrong


def _answer(engine: Engine, tree: PrefixTree, prompt: Sequence[int]) -> list[int]:
    """Return a few greedy tokens after a prompt, computed with the keys and values in the prefix tree."""
    cache = engine.new_cache()
    known = tree.restore(prompt[:-1], cache, 0)
    step = engine.prefill(prompt[known:], cache, start=known)
    answer = [int(step.token[0])]
    for position in range(len(prompt), min(len(prompt) + _ANSWER - 1, engine.context)):
        step = engine.decode([DecodeRow(0, answer[-1], position)], cache)
        answer.append(int(step.token[0]))
    return answer
