"""An export as a pipeline: from a source to a verified artifact."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from precast.loaders.artifact import folders
from precast.loaders.artifact.manifest import WEIGHTS_FILE, Manifest, Target
from precast.loaders.progress import Progress, byte_counter, silent

from . import texts
from .budget import check_budget, with_budget
from .calibration import (
    CalibrationText,
    calibrated_parameters,
    quantised_matrices,
    read_calibration_text,
)
from .devices import on_cpu
from .equalise import equalised
from .manifest import make_manifest, write_manifest
from .options import DEFAULT_OPTIONS, ExportOptions
from .plan import ExportPlan, make_plan
from .programs import TABLES, build_programs
from .reference import fidelity, golden
from .reference.recording import load_first, record_golden, replay_answers
from .sources.base import Source
from .targets.build import build_targets
from .targets.kinds import TARGET_KINDS
from .weights import Calibrated, stored_bytes, write_model_weights

Log = Callable[[str], None]


def export(
    source: Source,
    output: Path,
    options: ExportOptions = DEFAULT_OPTIONS,
    *,
    log: Log = lambda _: None,
    progress: Progress = silent,
) -> Manifest:
    """Export a model into an artifact.

    The artifact is first written to a temporary folder beside `output`. The folder gets its final name only after the
    artifact has been loaded and its answers match the reference.

    Args:
        source: the model.
        output: folder to write.
        options: the options of the export.
        log: called with each remark on the source, and with the name of each step.
        progress: called during long steps, and with a `BuiltProgram` for each program that has been built.

    Returns:
        The artifact's manifest.

    Raises:
        PrecastError: the source cannot be exported faithfully with these options, `output` exists, a file cannot be
            written, or the artifact's answers differ from the reference's.
    """
    # 1. Check everything that can be checked before writing.
    plan = make_plan(source, options)
    if options.bits is not None:
        check_budget(plan, options.bits)
    for remark in plan.remarks:
        log(remark)
    with folders.new_folder(output, overwrite=options.overwrite) as folder, on_cpu("the export"):
        # 2. If there is a budget of bits, choose the formats. Write the weights, the tokenizer and the chat templates.
        triangles: Mapping[str, np.ndarray] = {}
        calibrates = options.bits is not None or options.calibrate is not None
        text = read_calibration_text(options.calibrate) if calibrates else None
        if text is not None:
            log("equalising inputs")
            plan = equalised(plan, text, progress)
        if options.bits is not None and text is not None:
            log("measuring sensitivity")
            plan, triangles = with_budget(plan, options.bits, text, progress)
        log("writing weights")
        weights_sha256 = _write_weights(folder, plan, text, triangles, progress)
        texts.write_texts(folder, source)

        # 3. Lower, compile and write the programs of every target.
        targets = _build(folder, plan, options, log, progress)
        manifest = make_manifest(plan, targets)

        # 4. Check the golden answers against the reference, and record them.
        log("checking answers against the reference")
        record_golden(folder, manifest, plan.stored, weights_sha256)

        # 5. If the artifact is less precise than the source in float32, measure the difference.
        if not golden.is_exact(manifest):
            log("measuring fidelity to the float32 model")
            manifest = _with_fidelity(folder, manifest, plan, progress)

        # 6. Write the manifest, then replay the golden answers in batches and on the other targets.
        manifest = write_manifest(folder, manifest, weights_sha256)
        replay_answers(folder, manifest, log, progress)
        return manifest


def _write_weights(
    folder: Path,
    plan: ExportPlan,
    text: CalibrationText | None,
    triangles: Mapping[str, np.ndarray],
    progress: Progress,
) -> str:
    """Write the weights and the RoPE tables into the weight file; return the file's sha256."""
    tables = dict(zip(TABLES, plan.spec.tables(plan.geometry.context), strict=True))
    total = stored_bytes(plan.weight_plan.parameters, plan.stored.formats)
    count = byte_counter(progress, "writing weights", total)
    calibrated = None
    if text is not None:
        chosen = calibrated_parameters(plan.stored.parameters, plan.stored.formats)
        names = frozenset(p.name for p in chosen) | triangles.keys()
        arrays = quantised_matrices(plan, text, triangles, progress)
        calibrated = Calibrated(names=names, arrays=arrays)
    return write_model_weights(
        folder / WEIGHTS_FILE, plan.weight_plan, plan.stored.formats, tables, count, calibrated
    )


def _build(
    folder: Path, plan: ExportPlan, options: ExportOptions, log: Log, progress: Progress
) -> list[Target]:
    targets: list[Target] = []
    for kind in (TARGET_KINDS[name] for name in options.targets):
        programs = build_programs(plan.stored, plan.geometry, kind.ops)
        targets += build_targets(kind, programs, folder, plan.created, options.cpu_isas, log, progress)
    return targets


def _with_fidelity(folder: Path, manifest: Manifest, plan: ExportPlan, progress: Progress) -> Manifest:
    model = load_first(folder, manifest)
    found = fidelity.measure(model, plan.spec, plan.source, progress=progress)
    return dataclasses.replace(manifest, fidelity=found)
