"""The one function that does an export, from its source to a verified artifact."""

import dataclasses
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from precast.loaders import load as loading
from precast.loaders.artifact import files, folders
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.golden import Golden, parse_golden
from precast.loaders.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    CacheArray,
    FileEntry,
    Manifest,
    ModelInfo,
    Provenance,
    SamplingDefaults,
    Target,
    TokenizerFiles,
)
from precast.loaders.artifact.record import to_json
from precast.loaders.artifact.weights import map_weights
from precast.loaders.audit.verify import DO_NOT_USE, replay
from precast.loaders.compiling import isa, trial
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.runtime.installed import this_machine

from . import model_card, texts
from .devices import on_cpu
from .models.parameters import Parameter
from .models.registry import ModelSpec, read_model
from .programs import CACHE_TYPES, TABLES, Geometry, StoredModel, build_programs, cache_arrays, stored_model
from .quantize import FORMATS
from .reference import fidelity, golden
from .sources.base import Source
from .targets import DEFAULT_TARGETS, TARGET_KINDS, TargetKind, savedmodel
from .targets.build import build_targets
from .targets.built import Built
from .weights import WeightPlan, plan_weights, stored_bytes, write_model_weights

GOLDEN_FILE = "golden.json"
PACKAGES = ("precast", "jax", "jaxlib", "flax", "numpy", "gguf", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export a source.

    Attributes:
        buckets: prompt lengths to compile a prefill program for, ascending; None for those of `DEFAULT_BUCKETS` that
            the context holds.
        context: S, positions of a slot; None for the model's own limit, but not above `DEFAULT_CONTEXT`.
        slots: B, sequences decoded together.
        weights: how weights are stored: a key of `FORMATS`.
        cache: how keys and values are kept: one of `CACHE_TYPES`; None for what goes with the weights.
        targets: keys of `TARGET_KINDS`.
        cpu_isas: instruction sets of CPU executables: keys of `precast.loaders.compiling.isa.LEVELS`, or
            "native" for all that this machine has; None for `precast.loaders.compiling.isa.default_isa`.
        overwrite: replace an artifact that is there already.
    """

    buckets: tuple[int, ...] | None = None
    context: int | None = None
    slots: int = 1
    weights: str = "int8"
    cache: str | None = None
    targets: tuple[str, ...] = DEFAULT_TARGETS
    cpu_isas: tuple[str, ...] | None = None
    overwrite: bool = False


DEFAULT_CONTEXT = 2048
DEFAULT_BUCKETS = (64, 128, 512)
# Tokens of each golden answer that a SavedModel gives again: TensorFlow takes a second for what kernels do in 50 ms.
_BEGINNING = 4


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What an export tells while it works.

    Attributes:
        stage: called with what begins now, in words.
        weights: called with bytes written and bytes in all.
        built: called with each program that is done.
    """

    stage: Callable[[str], None]
    weights: Callable[[int, int], None]
    built: Callable[[Built], None]


SILENT = Progress(stage=lambda _: None, weights=lambda *_: None, built=lambda _: None)


def export(
    source: Source, output: Path, options: ExportOptions = ExportOptions(), progress: Progress = SILENT
) -> Manifest:
    """Exports a model.

    Everything is written beside `output` and takes its name only when the finished artifact has been loaded and
    has given the reference's answers.

    Raises:
        PrecastError: for a source or options that cannot be exported faithfully, an output that exists, a disk
            that is full, and an artifact that does not answer as the reference does.
    """
    spec = read_model(source.config, source.name)
    geometry = _geometry(options, spec)
    spec = spec.with_context(geometry.context)
    stored = stored_model(spec, options.weights)
    parameters = stored.parameters
    plan = plan_weights(spec.adapt(source), parameters, tied=spec.config.tied_embeddings)
    _check_tokenizer(source, spec)
    sampling = _sampling(source)
    created = _today()
    for remark in (
        *source.remarks,
        *texts.marker_remarks(source),
        texts.bare_tokens(source, spec.config.vocab),
        plan.left_out(),
        _far_rope(spec, geometry.context),
    ):
        if remark is not None:
            progress.stage(remark)
    with folders.new_folder(output, overwrite=options.overwrite) as folder, on_cpu("exporting compiles for"):
        progress.stage("writing weights")
        digest = _write_weights(folder, stored, geometry, plan, progress)
        texts.write_texts(folder, source)
        targets: list[Target] = []
        for kind in (TARGET_KINDS[name] for name in options.targets):
            targets += _build(kind, stored, geometry, folder, created, options.cpu_isas, progress)
        manifest = _manifest(
            source, _model(spec, parameters, options.weights), geometry, spec, sampling, targets, created
        )
        progress.stage("checking answers against the reference")
        with jax.default_matmul_precision("highest"):  # for the reference; the programs are compiled already
            _record_golden(folder, manifest, stored, digest)
        if not _is_exact(manifest):
            progress.stage("measuring fidelity to the float32 model")
            manifest = _with_fidelity(folder, manifest, spec, source)
        finished = _finish(folder, manifest, digest)
        _replay_others(folder, finished, progress)
        return finished


def _far_rope(spec: ModelSpec, context: int) -> str | None:
    """What a user may not expect of RoPE whose frequencies depend on the length; None where there is nothing."""
    near = [
        rope.max_context for rope in spec.ropes if rope.max_context is not None and rope.max_context < context
    ]
    if not near:
        return None
    return (
        f"this model's RoPE has other frequencies beyond {min(near)} positions: the artifact takes them for every"
        f" prompt (transformers decides by the length at hand); --context {min(near)} keeps the nearer ones"
    )


def _geometry(options: ExportOptions, spec: ModelSpec) -> Geometry:
    limit = spec.config.max_positions
    context = min(DEFAULT_CONTEXT, limit) if options.context is None else options.context
    check_options(options)
    if not 2 <= context <= limit:
        raise PrecastError(
            f"--context: {context} is not possible, expected 2 to {limit} (the model's own limit)."
        )
    buckets = options.buckets
    if buckets is None:
        buckets = tuple(b for b in DEFAULT_BUCKETS if b <= context) or (context,)
    for bucket in buckets:
        if bucket > context:
            raise PrecastError(
                f"--buckets: {bucket} is larger than the context of {context}; leave it out or raise --context."
            )
    # Reduced weights err more than a cache of half the bytes does; full ones are for who wants every digit.
    cache = options.cache or ("float32" if options.weights == "float32" else "bfloat16")
    return Geometry(context=context, slots=options.slots, buckets=tuple(sorted(buckets)), cache=cache)


def check_options(options: ExportOptions) -> None:
    """Refuses what no model could be exported with, before one is read.

    Raises:
        PrecastError: naming the option.
    """
    for option, value, known in (
        ("weights", options.weights, tuple(FORMATS)),
        ("cache", options.cache, (None, *CACHE_TYPES)),
    ):
        if value not in known:
            names = ", ".join(name for name in known if name is not None)
            raise PrecastError(f"--{option}: {value!r} is not supported, expected one of {names}.")
    if not 1 <= options.slots <= 256:
        raise PrecastError(f"--slots: {options.slots} is not possible, expected 1 to 256.")
    _check_targets(options.targets)
    if options.cpu_isas is not None:
        _check_isas(options.cpu_isas, options.targets)
    if options.buckets is not None:
        _check_buckets(options.buckets)


def _check_buckets(buckets: Sequence[int]) -> None:
    if not buckets:
        raise PrecastError("--buckets: expected at least one prompt length, found none.")
    for bucket in buckets:
        if bucket < 1:
            raise PrecastError(f"--buckets: {bucket} is not possible, expected prompt lengths of 1 or more.")
        if buckets.count(bucket) > 1:
            raise PrecastError(f"--buckets: {bucket} is named twice; name each length once.")


def _check_targets(targets: Sequence[str]) -> None:
    unknown = [repr(name) for name in targets if name not in TARGET_KINDS]
    if not targets or unknown or len(set(targets)) < len(targets):
        found = ", ".join(unknown) or ("one of them twice" if targets else "none")
        raise PrecastError(
            f"targets: expected one or more of {', '.join(TARGET_KINDS)}, each once, found {found}."
        )
    if any(TARGET_KINDS[name].runtime == "savedmodel" for name in targets):
        savedmodel.check_packages()
    for device in (TARGET_KINDS[name].device for name in targets):
        if device is not None:
            device()


def _check_isas(isas: Sequence[str], targets: Sequence[str]) -> None:
    if not isas or len(set(isas)) < len(isas):
        found = "one of them twice" if isas else "none"
        raise PrecastError(f"--cpu-isa: expected one or more instruction sets, each once, found {found}.")
    for name in isas:
        isa.check_isa(name)
    if "cpu" not in targets:
        raise PrecastError("--cpu-isa: only the target cpu is compiled for it; add --target cpu.")


def _sampling(source: Source) -> SamplingDefaults:
    """The model's own sampling defaults, once the loader has found nothing wrong with them."""
    where = (
        f"{source.name}: the sampling defaults in its generation_config.json or GGUF metadata cannot be used"
    )
    known = [field.name for field in dataclasses.fields(SamplingDefaults)]
    if unknown := sorted(set(source.sampling) - set(known)):
        raise PrecastError(f"{where}: {unknown[0]!r} is unknown, expected one of {', '.join(known)}.")
    try:
        params = SamplingParams(**source.sampling)  # type: ignore[arg-type]  # which is what it checks
        return SamplingDefaults(**{key: getattr(params, key) for key in source.sampling})
    except PrecastError as error:
        wrong = str(error).removeprefix("Sampling parameters: ").rstrip(".")
        raise PrecastError(f"{where}: {wrong}; correct or remove it there.") from None


def _check_tokenizer(source: Source, spec: ModelSpec) -> None:
    """Refuse token ids without an embedding, and chat templates that do not compile."""
    texts.check_templates(source)
    tokenizer = texts.read_tokenizer(source)
    vocab = spec.config.vocab
    if tokenizer.largest_own_id >= vocab:
        raise PrecastError(
            f"{source.name}: the tokenizer has ids up to {tokenizer.largest_own_id}, not counting added tokens, and the"
            f" model embeds {vocab} tokens; they do not belong together, so fetch both from one place."
        )
    for token in source.eos_token_ids:
        if not 0 <= token < vocab:
            raise PrecastError(
                f"{source.name}: end token {token} is outside the model's {vocab} tokens; correct eos_token_id in its"
                " configuration."
            )


def _write_weights(
    folder: Path, stored: StoredModel, geometry: Geometry, plan: WeightPlan, progress: Progress
) -> str:
    tables = dict(zip(TABLES, stored.spec.tables(geometry.context), strict=True))
    total, written = stored_bytes(plan.parameters, stored.formats), 0

    def report(count: int) -> None:
        nonlocal written
        written += count
        progress.weights(written, total)

    return write_model_weights(folder / WEIGHTS_FILE, plan, stored.formats, tables, report)


def _build(
    kind: TargetKind,
    stored: StoredModel,
    geometry: Geometry,
    folder: Path,
    created: date,
    isas: Sequence[str] | None,
    progress: Progress,
) -> list[Target]:
    programs = build_programs(stored, geometry, kind.ops)
    return build_targets(kind, programs, folder, created, isas, progress.stage, progress.built)


def _manifest(
    source: Source,
    model: ModelInfo,
    geometry: Geometry,
    spec: ModelSpec,
    sampling: SamplingDefaults,
    targets: Sequence[Target],
    created: date,
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        name=source.name,
        model=model,
        capacity=geometry.context,
        slots=geometry.slots,
        buckets=geometry.buckets,
        cache=_cache(cache_arrays(spec.config, geometry), targets[0]),
        targets=tuple(targets),
        tokenizer=TokenizerFiles(
            file=texts.TOKENIZER_FILE,
            chat_template=texts.TEMPLATE_FILE if source.chat_template is not None else None,
            named_templates=texts.named_files(source),
            bos_token=source.bos_token,
            eos_token=source.eos_token,
            eos_token_ids=source.eos_token_ids,
        ),
        sampling=sampling,
        golden=GOLDEN_FILE,
        provenance=Provenance(
            source=source.name,
            source_files={f.name: FileEntry(bytes=f.bytes, sha256=f.sha256) for f in source.files},
            licence=source.licence,
            created=created.isoformat(),
            versions=_versions(),
        ),
        fidelity=None,
        files={},
    )


def _cache(arrays: Sequence[CacheArray], target: Target) -> tuple[CacheArray, ...]:
    """The cache's arrays as a target lays them out."""
    layouts = {value.name: value.layout for value in target.of_kind("decode")[0].arguments}
    return tuple(dataclasses.replace(array, layout=layouts[array.name]) for array in arrays)


def _model(spec: ModelSpec, parameters: Sequence[Parameter], weights: str) -> ModelInfo:
    c = spec.config
    return ModelInfo(
        architecture=spec.model_type,
        layers=c.layers,
        width=c.width,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        ff_width=c.ff_width,
        vocab=c.vocab,
        parameters=sum(p.size for p in parameters),
        weights=weights,
        max_positions=c.max_positions,
    )


def _record_golden(folder: Path, manifest: Manifest, stored: StoredModel, digest: str) -> None:
    """Loads the artifact as a user would, and keeps its answers when they are the reference's."""
    (folder / GOLDEN_FILE).write_bytes(golden.to_json(()))
    # The loaded model is gone before the reference maps the weights again: they are in memory once at a time.
    given = _answers(folder, _finish(folder, manifest, digest))
    cases = golden.check(
        given,
        stored,
        manifest.cache[0].dtype,
        _tie(manifest),
        map_weights(folder / WEIGHTS_FILE),
        manifest.name,
    )
    (folder / GOLDEN_FILE).write_bytes(golden.to_json(cases))


def _answers(folder: Path, manifest: Manifest) -> tuple[golden.Case, ...]:
    """Lets the first target answer, and notes that it runs here: the first load will not have to try it."""
    model = _load_first(folder, manifest)
    given = golden.answers(model, _tie(manifest))
    trial.record_success(manifest, model.target, this_machine())
    return given


def _replay_others(folder: Path, manifest: Manifest, progress: Progress) -> None:
    """Lets every other target that runs as it is give the recorded answers; a SavedModel, which is slow, begin them."""
    recorded = parse_golden((folder / GOLDEN_FILE).read_bytes(), manifest, GOLDEN_FILE)
    for target in manifest.targets[1:]:
        if target.runtime == "stablehlo":
            continue
        progress.stage(f"checking answers of target {target.name}")
        model = loading.load_export(folder, target=target.name)
        asked = _beginnings(recorded) if target.runtime == "savedmodel" else recorded
        found = replay(model, asked, f"target {target.name!r}")
        if found.problems:
            problem = found.problems[0].removesuffix(DO_NOT_USE)
            raise PrecastError(f"{problem}nothing was written: please report this.")
        trial.record_success(manifest, target, this_machine())


def _beginnings(recorded: Golden) -> Golden:
    answers = (dataclasses.replace(a, token_ids=a.token_ids[:_BEGINNING]) for a in recorded.greedy)
    return dataclasses.replace(recorded, greedy=tuple(answers))


def _load_first(folder: Path, manifest: Manifest) -> Model:
    """The first target, loaded; compiled where it is StableHLO alone."""
    name = manifest.targets[0].name
    return loading.load_export(folder, target=name, allow_compile=True)


def _tie(manifest: Manifest) -> float:
    if _is_exact(manifest):
        return golden.TIE
    tie = golden.INT4_TIE if manifest.model.weights == "int4" else golden.REDUCED_TIE
    return max(tie, golden.BFLOAT16_TIE) if _computes_bfloat16(manifest) else tie


def _is_exact(manifest: Manifest) -> bool:
    """Whether nothing is rounded to fewer bits than float32 has: then the golden answers say all there is to say."""
    stored = manifest.model.weights == "float32" and manifest.cache[0].dtype == "float32"
    return stored and not _computes_bfloat16(manifest)


def _computes_bfloat16(manifest: Manifest) -> bool:
    """Whether any target does: all of them are held against the same answers."""
    return any(target.platform == "cuda" for target in manifest.targets)


def _with_fidelity(folder: Path, manifest: Manifest, spec: ModelSpec, source: Source) -> Manifest:
    model = _load_first(folder, manifest)
    return dataclasses.replace(manifest, fidelity=fidelity.measure(model, spec, source))


def _finish(folder: Path, manifest: Manifest, digest: str) -> Manifest:
    """Writes the model card, and the manifest with every file's hash; returns the latter."""
    (folder / "README.md").write_text(model_card.render(manifest), encoding="utf-8")
    finished = dataclasses.replace(manifest, files=files.hash_files(folder, {WEIGHTS_FILE: digest}))
    (folder / MANIFEST_FILE).write_text(to_json(finished), encoding="utf-8")
    files.record_hash(folder / WEIGHTS_FILE, digest)
    return finished


def _today() -> date:
    """The day of the export; SOURCE_DATE_EPOCH (reproducible-builds.org) sets it."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return (datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)).date()
    except (ValueError, OverflowError, OSError):
        raise PrecastError(
            f"SOURCE_DATE_EPOCH: expected seconds since 1970, found {epoch!r:.40}; correct or unset it."
        ) from None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
