"""The plan of an export: every decision and check before the first file is written."""

import dataclasses
import os
from dataclasses import dataclass
from datetime import UTC, date, datetime

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import SamplingDefaults
from precast.loaders.artifact.units import size_text
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.runtime import limits, resources

from . import texts
from .models.registry import ModelSpec, read_model
from .options import ExportOptions, choose_geometry
from .programs import Geometry, StoredModel, cache_arrays, stored_model
from .quantize import SOURCE
from .sources.base import Source
from .targets.kinds import TARGET_KINDS
from .weights import WeightPlan, plan_weights, widened_remark, with_source_formats


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """A checked source, and the decisions about its artifact.

    Attributes:
        source: the model to export.
        weights: storage format of the weights, see `ExportOptions.weight_format`.
        geometry: context, slots, buckets and type of the KV cache.
        stored: the model, adapted to the context, and the storage format of each of its parameters.
        weight_plan: the source tensors of each parameter.
        sampling: the model's own sampling defaults.
        created: day of the export.
        remarks: sentences for the user about the source and its artifact.
    """

    source: Source
    weights: str
    geometry: Geometry
    stored: StoredModel
    weight_plan: WeightPlan
    sampling: SamplingDefaults
    created: date
    remarks: tuple[str, ...]

    @property
    def spec(self) -> ModelSpec:
        return self.stored.spec


def make_plan(source: Source, options: ExportOptions) -> ExportPlan:
    """Check a source and the options, and decide everything about the artifact.

    Raises:
        PrecastError: the source cannot be exported faithfully with these options.
    """
    spec = read_model(source.config, source.name)
    geometry = choose_geometry(options, spec)
    spec = spec.with_context(geometry.context)
    _check_memory(source.name, spec, geometry, options)
    stored = stored_model(spec, options.weight_format)
    weight_plan = plan_weights(spec.adapt(source), stored.parameters, tied=spec.config.tied_embeddings)
    stored = dataclasses.replace(stored, formats=with_source_formats(stored.formats, weight_plan))
    _check_tokenizer(source, spec.config.vocab)
    remarks = (
        *source.remarks,
        *texts.marker_remarks(source),
        texts.bare_tokens(source, spec.config.vocab),
        weight_plan.remark(),
        widened_remark(stored.formats, weight_plan) if options.weights == SOURCE else None,
        _rope_remark(spec, geometry.context),
    )
    return ExportPlan(
        source=source,
        weights=options.weight_format,
        geometry=geometry,
        stored=stored,
        weight_plan=weight_plan,
        sampling=_sampling_defaults(source),
        created=_today(),
        remarks=tuple(remark for remark in remarks if remark is not None),
    )


def _check_tokenizer(source: Source, vocab: int) -> None:
    """Refuse chat templates that do not compile, and token ids beyond the model's `vocab` embeddings."""
    texts.check_templates(source)
    tokenizer = texts.read_tokenizer(source)
    if tokenizer.largest_own_id >= vocab:
        raise PrecastError(
            f"{source.name}: the tokenizer has ids up to {tokenizer.largest_own_id}, not counting"
            f" added tokens, but the model embeds only {vocab} tokens; use the tokenizer and the"
            " weights of the same model."
        )
    for token in source.eos_token_ids:
        if not 0 <= token < vocab:
            raise PrecastError(
                f"{source.name}: the end token has the id {token}, but the model embeds only {vocab} tokens; correct"
                " eos_token_id in its configuration."
            )


def _check_memory(name: str, spec: ModelSpec, geometry: Geometry, options: ExportOptions) -> None:
    """Refuse a context whose RoPE tables or KV cache this machine cannot allocate.

    The export needs the KV cache on this machine to check the artifact's answers. Only filled positions take memory, so
    the cache may be larger than the machine's memory if the system grants the address space.
    """
    frequencies = sum(len(rope.at_context(geometry.context)) for rope in spec.ropes)
    # Angles, cosines, sines and the result of a multiplication exist at the same time.
    tables, limit = 4 * 4 * geometry.context * frequencies, resources.memory().limit
    if limit is not None and tables > limit:
        raise PrecastError(
            f"--context: the RoPE tables of {geometry.context} positions need {size_text(tables)} of memory, but this"
            f" machine or container has {size_text(limit)}; choose a shorter context."
        )
    if all(TARGET_KINDS[target].device is not None for target in options.targets):
        return  # the KV cache is in the memory of another device
    arrays = cache_arrays(spec.config, geometry)
    total = sum(array.bytes for array in arrays)
    need = limits.Need(
        weights=0,
        cache=total // geometry.slots,
        temporary=0,
        idle=total - total // geometry.slots,
        largest=max(array.bytes for array in arrays),
    )
    for problem, remedy in limits.problems(need, 1, resources.limits(0), has_client=True):
        raise PrecastError(f"{name}: with a context of {geometry.context}, {problem}; {remedy}.")


def _rope_remark(spec: ModelSpec, context: int) -> str | None:
    """Return a remark if the context is so long that it changes the model's RoPE frequencies; None otherwise."""
    reaches = [
        rope.max_context for rope in spec.ropes if rope.max_context is not None and rope.max_context < context
    ]
    if not reaches:
        return None
    return (
        f"this model's RoPE has other frequencies for contexts above {min(reaches)} positions, and the artifact uses"
        " them for every prompt (transformers uses them for long prompts only);"
        f" --context {min(reaches)} keeps the original frequencies"
    )


def _sampling_defaults(source: Source) -> SamplingDefaults:
    """Return the model's own sampling defaults, checked by the loader's rules."""
    where = (
        f"{source.name}: the sampling defaults in its generation_config.json or GGUF metadata cannot be used"
    )
    known = [field.name for field in dataclasses.fields(SamplingDefaults)]
    if unknown := sorted(set(source.sampling) - set(known)):
        raise PrecastError(f"{where}: expected one of {', '.join(known)}, found {unknown[0]!r}.")
    try:
        params = SamplingParams(**source.sampling)  # type: ignore[arg-type]  # it checks the types itself
        return SamplingDefaults(**{key: getattr(params, key) for key in source.sampling})
    except PrecastError as error:
        reason = str(error).removeprefix("Sampling parameters: ").rstrip(".")
        raise PrecastError(f"{where}: {reason}; correct or remove that key.") from None


def _today() -> date:
    """Return the day of the export; SOURCE_DATE_EPOCH (reproducible-builds.org) overrides the clock."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return (datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)).date()
    except (ValueError, OverflowError, OSError):
        raise PrecastError(
            f"SOURCE_DATE_EPOCH: expected seconds since 1970, found {epoch!r:.40}; correct or unset it."
        ) from None
