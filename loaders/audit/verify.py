"""Verify an artifact: rehash its files, and replay its golden answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artifact import files
from ..artifact.errors import PrecastError
from ..artifact.golden import Answer, Golden
from ..artifact.manifest import Manifest
from ..generation.engine import DecodeRow, Engine
from ..generation.model import Model
from ..generation.sampling_params import SamplingParams
from ..progress import Progress, Step, byte_counter, silent

# The remedy for an answer that differs.
DO_NOT_USE = "this artifact computes other numbers on this machine than at export: do not use it here, and report this."


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """The state of an artifact's files.

    Attributes:
        checked: number of files in the manifest. All of these were hashed.
        bytes: total size of these files.
        problems: a sentence for each missing or damaged file.
        unlisted: names of files that are not in the manifest.
    """

    checked: int
    bytes: int
    problems: tuple[str, ...]
    unlisted: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """The result of replaying golden answers.

    Attributes:
        target: name of the target that answered.
        answers: number of golden answers.
        tokens: number of tokens in these answers.
        logits: number of logits compared.
        difference: largest absolute difference between a logit and its recorded value; None if it is not finite.
        share: largest ratio of an answer's difference to that answer's tolerance; a share of 1 is exactly at the
            tolerance. None if the ratio is not finite, for example for any difference with a tolerance of 0.
        problems: a sentence for each answer that differs.
    """

    target: str
    answers: int
    tokens: int
    logits: int
    difference: float | None
    share: float | None
    problems: tuple[str, ...]


def check_files(root: Path, manifest: Manifest, progress: Progress = silent) -> FileReport:
    """Hash every file of the manifest, and find unlisted files.

    Args:
        root: the artifact's folder.
        manifest: the artifact's manifest.
        progress: receives the number of bytes hashed.

    Raises:
        PrecastError: a folder cannot be read.
    """
    problems, total = [], sum(entry.bytes for entry in manifest.files.values())
    on_read = byte_counter(progress, "hashing", total)
    for name, entry in sorted(manifest.files.items()):
        try:
            files.rehash_file(root, name, entry, on_read)
        except PrecastError as error:
            problems.append(str(error))
    return FileReport(
        checked=len(manifest.files),
        bytes=total,
        problems=tuple(problems),
        unlisted=tuple(files.unlisted_files(root, manifest.files)),
    )


def replay(model: Model, golden: Golden, where: str, progress: Progress = silent) -> ReplayReport:
    """Generate the golden answers again: one by one, in batches, and with the score program; compare tokens and logits.

    Args:
        model: the loaded artifact.
        golden: the artifact's golden answers.
        where: the artifact's name, which begins the sentence of each problem.
        progress: receives the number of answers replayed.

    Raises:
        PrecastError: a program fails.
    """
    problems: list[str] = []
    difference = share = 0.0
    for i, answer in enumerate(golden.greedy):
        progress(Step(text="answering", done=i, total=len(golden.greedy), unit="prompts"))
        problems += _token_problems(model, answer, f"{where}: answer {i}")
        found = _difference(model, answer)
        allowed = answer.first_logits.tolerance
        # NaN is outside every tolerance.
        if not found <= allowed:
            problems.append(
                f"{where}: answer {i}: a logit of its first step differs from the recorded one by {found:.3g},"
                f" but the tolerance is {allowed:.3g}; {DO_NOT_USE}"
            )
        worst = math.inf if math.isnan(found) else found
        difference, share = max(difference, worst), max(share, _share(worst, allowed))
    problems = problems or batch_problems(model, golden, where)
    return ReplayReport(
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


def _token_problems(model: Model, answer: Answer, where: str) -> list[str]:
    expected = answer.token_ids
    if not expected:
        return []
    params = SamplingParams(max_tokens=len(expected), ignore_eos=True)
    return _difference_text(answer, model.generate(answer.prompt_token_ids, params).token_ids, where)


def _difference_text(answer: Answer, found: Sequence[int], where: str) -> list[str]:
    """Return a sentence if the tokens found differ from the recorded ones."""
    expected = answer.token_ids
    place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None)
    if place is None:
        return []
    problem = (
        f"{where}: token {place} is {found[place]}, but {expected[place]} was recorded (prompt of"
        f" {len(answer.prompt_token_ids)} tokens); {DO_NOT_USE}"
    )
    return [problem]


def batch_problems(model: Model, golden: Golden, where: str) -> list[str]:
    """Generate the golden answers in batches that fill the slots, and with the score program if there is one.

    Returns:
        A sentence for each answer whose tokens differ.

    Raises:
        PrecastError: a program fails.
    """
    engine, problems = model.engine, []
    answers = [(i, answer) for i, answer in enumerate(golden.greedy) if answer.token_ids]
    if engine.slots > 1:
        for begin in range(0, len(answers), engine.slots):
            group = answers[begin : begin + engine.slots]
            for (i, answer), found in zip(group, _decoded(engine, [a for _, a in group]), strict=True):
                problems += _difference_text(answer, found, f"{where}: answer {i}, in a batch")
    if engine.score_tokens:
        for i, answer in answers:
            problems += _difference_text(answer, _scored(engine, answer), f"{where}: answer {i}, scored")
    return problems


def _decoded(engine: Engine, answers: Sequence[Answer]) -> list[list[int]]:
    """Generate answers in one batch, using the slots from the last to the first; return the tokens of each answer."""
    cache, slots = engine.new_cache(), range(engine.slots)[::-1][: len(answers)]
    found = [
        [int(engine.prefill(answer.prompt_token_ids, cache, slot=slot).token[0])]
        for answer, slot in zip(answers, slots, strict=True)
    ]
    while busy := [i for i, answer in enumerate(answers) if len(found[i]) < len(answer.token_ids)]:
        lengths = [len(answers[i].prompt_token_ids) + len(found[i]) for i in busy]
        rows = [
            DecodeRow(slots[i], found[i][-1], length - 1) for i, length in zip(busy, lengths, strict=True)
        ]
        for i, token in zip(busy, engine.decode(rows, cache).token, strict=True):
            found[i].append(int(token))
    return found


def _scored(engine: Engine, answer: Answer) -> list[int]:
    """Return the tokens that the score program predicts after the prompt and each answer token except the last."""
    cache, start = engine.new_cache(), len(answer.prompt_token_ids) - 1
    if start:
        engine.prefill(answer.prompt_token_ids[:-1], cache)
    fed = (answer.prompt_token_ids[-1], *answer.token_ids[:-1])
    found: list[int] = []
    for begin in range(0, len(fed), engine.score_tokens):
        chunk = fed[begin : begin + engine.score_tokens]
        found += map(int, engine.score(chunk, cache, start=start + begin, slot=0).token)
    return found


def first_logits(model: Model, prompt: Sequence[int]) -> np.ndarray:
    """Return the logits [V] of the first step of an answer to a prompt, as a view."""
    logits: np.ndarray = model.engine.logits(model.engine.prefill(prompt, model.engine.new_cache()))[0]
    return logits


def _difference(model: Model, answer: Answer) -> float:
    """Return the largest absolute difference between the recorded logits and the model's; NaN if a logit is NaN."""
    logits = first_logits(model, answer.prompt_token_ids)
    found = logits[list(answer.first_logits.token_ids)].astype(np.float64)
    return float(np.abs(found - np.array(answer.first_logits.values)).max())
