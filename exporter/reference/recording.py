"""Record the golden answers of a new artifact, and replay them on its other targets."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.golden import Golden, parse_golden
from precast.loaders.artifact.manifest import WEIGHTS_FILE, Manifest
from precast.loaders.artifact.weights import map_weights
from precast.loaders.audit.verify import DO_NOT_USE, batch_problems, replay
from precast.loaders.compiling import trial
from precast.loaders.generation.model import Model
from precast.loaders.load import load_export
from precast.loaders.progress import Progress
from precast.loaders.runtime.installed import this_machine

from ..manifest import write_manifest
from ..programs import StoredModel
from . import golden

# A SavedModel repeats only this many tokens of each answer, because TensorFlow takes 1 s where the kernels take 50 ms.
_SAVEDMODEL_TOKENS = 4


def record_golden(folder: Path, manifest: Manifest, stored: StoredModel, weights_sha256: str) -> None:
    """Generate answers with the first target, check the answers against the reference, and write them.

    Raises:
        PrecastError: an answer differs from the reference's.
    """
    path = folder / manifest.golden
    path.write_bytes(golden.to_json(()))
    # `_answer` frees its model before the reference maps the weights, so the weights are never in memory twice.
    cases = _answer(folder, write_manifest(folder, manifest, weights_sha256))
    weights = map_weights(folder / WEIGHTS_FILE)
    # This setting affects only the reference, because the programs are already compiled.
    with jax.default_matmul_precision("highest"):
        checked = golden.check(
            cases, stored, manifest.cache[0].dtype, golden.tie_of(manifest), weights, manifest.name
        )
    path.write_bytes(golden.to_json(checked))


def load_first(folder: Path, manifest: Manifest) -> Model:
    """Load the first target; compile it if it consists of StableHLO alone."""
    return load_export(folder, target=manifest.targets[0].name, allow_compile=True)


def _answer(folder: Path, manifest: Manifest) -> tuple[golden.Case, ...]:
    """Return the first target's answers; record that the target runs on this machine, so that loads need no trial."""
    model = load_first(folder, manifest)
    cases = golden.answers(model, golden.tie_of(manifest))
    trial.record_success(manifest, model.target, this_machine())
    return cases


def replay_answers(folder: Path, manifest: Manifest, log: Callable[[str], None], progress: Progress) -> None:
    """Replay the golden answers on every target, except those that need compiling.

    The golden answers were recorded from the first target, one at a time. Here the first target repeats them in batches
    and with the score program.

    Args:
        folder: the finished artifact.
        manifest: its manifest.
        log: called before each target but the first, with a sentence that names the target.
        progress: called before each answer of a target other than the first.

    Raises:
        PrecastError: a target's answer differs from the recorded one.
    """
    recorded = parse_golden((folder / manifest.golden).read_bytes(), manifest, manifest.golden)
    for target in manifest.targets:
        if target.runtime == "stablehlo":
            continue
        is_first = target is manifest.targets[0]
        if not is_first:
            log(f"checking answers of target {target.name}")
        model = load_export(folder, target=target.name)
        expected = _shortened(recorded) if target.runtime == "savedmodel" else recorded
        where = f"target {target.name!r}"
        problems = (
            batch_problems(model, expected, where)
            if is_first
            else replay(model, expected, where, progress).problems
        )
        if problems:
            raise PrecastError(
                f"{problems[0].removesuffix(DO_NOT_USE)}nothing was written: please report this."
            )
        trial.record_success(manifest, target, this_machine())


def _shortened(recorded: Golden) -> Golden:
    answers = (dataclasses.replace(a, token_ids=a.token_ids[:_SAVEDMODEL_TOKENS]) for a in recorded.greedy)
    return dataclasses.replace(recorded, greedy=tuple(answers))
