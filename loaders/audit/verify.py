"""What ``precast verify`` finds: whether an artifact is what was exported, and still answers as it did."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artifact import files
from ..artifact.errors import PrecastError
from ..artifact.golden import Answer, Golden
from ..artifact.manifest import Manifest
from ..generation.model import Model
from ..generation.sampling_params import SamplingParams
from ..progress import Progress, Step, silent

OTHERWISE = (
    "this artifact on this machine does not compute what was exported: do not use it here, and report this."
)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Attributes:
    checked: files of the manifest that were read from their first byte to their last.
    bytes: of all of them.
    problems: a sentence for each that is not what the manifest says.
    unlisted: names of what lies beside them.
    """

    checked: int
    bytes: int
    problems: tuple[str, ...]
    unlisted: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Attributes:
    target: which answered.
    answers: golden answers asked for.
    tokens: of all of them.
    logits: compared.
    difference: the largest, in logits; None where it is no finite number.
    share: the largest of an answer's difference as a share of what is allowed of that answer; 1 is the limit, None
        as above, also where none is allowed.
    problems: a sentence for each answer that differs.
    """

    target: str
    answers: int
    tokens: int
    logits: int
    difference: float | None
    share: float | None
    problems: tuple[str, ...]


def check_files(root: Path, manifest: Manifest, progress: Progress = silent) -> Files:
    """Hashes every file of the manifest, and looks for others.

    Raises:
        PrecastError: for a folder that cannot be read.
    """
    problems, total, done = [], sum(entry.bytes for entry in manifest.files.values()), 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        progress(Step(text="hashing", done=done, total=total, unit="bytes"))

    for name, entry in sorted(manifest.files.items()):
        try:
            files.rehash_file(root, name, entry, read)
        except PrecastError as error:
            problems.append(str(error))
    return Files(
        checked=len(manifest.files),
        bytes=total,
        problems=tuple(problems),
        unlisted=tuple(files.unlisted_files(root, manifest.files)),
    )


def replay(model: Model, golden: Golden, where: str, progress: Progress = silent) -> Replay:
    """Lets a loaded artifact give its golden answers again, and compares tokens and logits.

    Raises:
        PrecastError: when a program fails.
    """
    problems: list[str] = []
    difference = share = 0.0
    for i, answer in enumerate(golden.greedy):
        progress(Step(text="answering", done=i, total=len(golden.greedy), unit="prompts"))
        problems += _tokens(model, answer, f"{where}: answer {i}")
        found = _difference(model, answer)
        allowed = answer.first_logits.tolerance
        # Whatever is no number is not within any tolerance.
        if not found <= allowed:
            problems.append(
                f"{where}: answer {i}: a logit of its first step differs by {found:.3g} from the one recorded,"
                f" {allowed:.3g} are allowed; {OTHERWISE}"
            )
        worst = math.inf if math.isnan(found) else found
        difference, share = max(difference, worst), max(share, _share(worst, allowed))
    return Replay(
        target=model.target.name,
        answers=len(golden.greedy),
        tokens=sum(len(a.token_ids) for a in golden.greedy),
        logits=sum(len(a.first_logits.token_ids) for a in golden.greedy),
        difference=_finite(difference),
        share=_finite(share),
        problems=tuple(problems),
    )


def _share(found: float, allowed: float) -> float:
    if allowed > 0:
        return found / allowed
    return math.inf if found else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tokens(model: Model, answer: Answer, where: str) -> list[str]:
    expected = answer.token_ids
    if not expected:
        return []
    params = SamplingParams(max_tokens=len(expected), ignore_eos=True)
    found = model.generate(answer.prompt_token_ids, params).token_ids
    if found == expected:
        return []
    place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    problem = (
        f"{where}: token {place} is {found[place]}, recorded is {expected[place]} (prompt of"
        f" {len(answer.prompt_token_ids)} tokens); {OTHERWISE}"
    )
    return [problem]


def first_logits(model: Model, prompt: Sequence[int]) -> np.ndarray:
    """Logits ``[V]`` of the first step of an answer to a prompt, as a view."""
    return model.engine.logits(model.engine.prefill(prompt, model.engine.new_cache()))[0]


def _difference(model: Model, answer: Answer) -> float:
    """The largest difference of a recorded logit from this machine's; not a number where that is none."""
    logits = first_logits(model, answer.prompt_token_ids)
    found = logits[list(answer.first_logits.token_ids)].astype(np.float64)
    return float(np.abs(found - np.array(answer.first_logits.values)).max())
