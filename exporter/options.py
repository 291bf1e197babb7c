"""The options of an export, and their checks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.compiling import isa

from .models.registry import ModelSpec
from .programs import CACHE_TYPES, Geometry, cache_arrays
from .quantize import MIXED, WEIGHTS
from .targets import savedmodel
from .targets.kinds import DEFAULT_TARGETS, TARGET_KINDS

DEFAULT_CONTEXT = 2048
DEFAULT_BUCKETS = (64, 128, 512)
DEFAULT_SLOTS = 8
DEFAULT_WEIGHTS = "int8"
_MOST_SLOTS = 256
# A prompt of one token, and one generated token.
_LEAST_CONTEXT = 2
# The limits of a budget, in bits per weight. The smallest format takes 4.25 bits; the largest takes 8.5 bits, to which
# the float32 norms add less than 0.5.
_BITS = (4.25, 9.0)
# The targets that have several slots by default. On cpu, idle slots take neither time nor memory. On portable, they
# take memory, but a default export has both targets, and all targets of an artifact have the same number of slots.
_CHEAP_SLOTS = ("cpu", "portable")
# The default number of slots is lowered, if need be to 1, until the KV cache takes at most this many bytes. A system
# may refuse to reserve more address space than it has memory, even for pages that are never touched.
_MOST_DEFAULT_CACHE_BYTES = 16 << 30


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of an export.

    Attributes:
        buckets: prompt lengths to compile a prefill program for; None for those of `DEFAULT_BUCKETS` that fit the
            context.
        context: S, positions of a slot; None for the model's own limit, but at most `DEFAULT_CONTEXT`.
        slots: B, sequences decoded together. If there is a target other than cpu and portable, None means 1, because
            idle slots of such a target take memory or time. Otherwise, None means `DEFAULT_SLOTS`, or fewer if the KV
            cache would be large.
        weights: storage format of the weights, one of `WEIGHTS`. None means `MIXED` if `bits` is set, and otherwise
            `DEFAULT_WEIGHTS`.
        kv_cache: type of the KV cache, one of `CACHE_TYPES`. None means float32 if the weights are float32, and
            otherwise bfloat16.
        targets: keys of `TARGET_KINDS`.
        cpu_isas: instruction sets of CPU executables: keys of `precast.loaders.compiling.isa.LEVELS`, or "native" for
            all features of this machine; None for `precast.loaders.compiling.isa.default_isa`.
        bits: maximum number of bits per weight, on average (`exporter.budget`); the export then chooses the format of
            each matrix. None means one format for all matrices.
        calibrate: text file for the calibration (`exporter.calibration`) of int4 weights or of a budget of bits. None
            means Python's own documentation if `bits` is set, and otherwise no calibration.
        overwrite: permission to replace an existing artifact.
    """

    buckets: tuple[int, ...] | None = None
    context: int | None = None
    slots: int | None = None
    weights: str | None = None
    kv_cache: str | None = None
    targets: tuple[str, ...] = DEFAULT_TARGETS
    cpu_isas: tuple[str, ...] | None = None
    bits: float | None = None
    calibrate: Path | None = None
    overwrite: bool = False

    @property
    def weight_format(self) -> str:
        """The storage format of the weights: one of `WEIGHTS`, or `MIXED` for a budget of bits."""
        if self.bits is not None:
            return MIXED
        return DEFAULT_WEIGHTS if self.weights is None else self.weights


DEFAULT_OPTIONS = ExportOptions()


def check_options(options: ExportOptions) -> None:
    """Check the options as far as possible before a model is read.

    Raises:
        PrecastError: an option has an invalid value; the message names the option.
    """
    if options.weights is not None:
        _check_choice("weights", options.weights, WEIGHTS)
    if options.kv_cache is not None:
        _check_choice("kv-cache", options.kv_cache, CACHE_TYPES)
    if options.context is not None and options.context < _LEAST_CONTEXT:
        raise PrecastError(f"--context: expected {_LEAST_CONTEXT} or more, found {options.context}.")
    if options.slots is not None and not 1 <= options.slots <= _MOST_SLOTS:
        raise PrecastError(f"--slots: expected 1 to {_MOST_SLOTS}, found {options.slots}.")
    if options.bits is not None:
        _check_bits(options)
    elif options.calibrate is not None and options.weights != "int4":
        found = "neither" if options.weights is None else f"--weights {options.weights}"
        raise PrecastError(
            f"--calibrate: expected --weights int4 or --bits, found {found}; use one of them, or leave out --calibrate."
        )
    _check_targets(options.targets)
    if options.cpu_isas is not None:
        _check_isas(options.cpu_isas, options.targets)
    if options.buckets is not None:
        _check_buckets(options.buckets)
        if options.context is not None:
            _check_reach(options.buckets, options.context)


def choose_geometry(options: ExportOptions, spec: ModelSpec) -> Geometry:
    """Choose the context, the buckets, the type of the KV cache and the number of slots for a model.

    Raises:
        PrecastError: an option has an invalid value, or a value that does not fit the model.
    """
    check_options(options)
    limit = spec.config.max_positions
    context = min(DEFAULT_CONTEXT, limit) if options.context is None else options.context
    if not _LEAST_CONTEXT <= context <= limit:
        raise PrecastError(
            f"--context: expected {_LEAST_CONTEXT} to {limit} (the model's own limit), found {context}."
        )
    buckets = options.buckets
    if buckets is None:
        buckets = tuple(b for b in DEFAULT_BUCKETS if b <= context) or (context,)
    _check_reach(buckets, context)
    # Weights of fewer bits than float32 lose more precision than a bfloat16 cache does. float32 weights mean that the
    # user wants full precision.
    kv_cache = options.kv_cache or ("float32" if options.weight_format == "float32" else "bfloat16")
    one = Geometry(context=context, slots=1, buckets=tuple(sorted(buckets)), kv_cache=kv_cache)
    return replace(one, slots=options.slots or _default_slots(options, spec, one))


def _default_slots(options: ExportOptions, spec: ModelSpec, one: Geometry) -> int:
    """Return the number of slots for a model, given the geometry of one slot."""
    if not set(options.targets) <= set(_CHEAP_SLOTS):
        return 1
    slot_bytes = sum(array.bytes for array in cache_arrays(spec.config, one))
    slots = DEFAULT_SLOTS
    while slots > 1 and slots * slot_bytes > _MOST_DEFAULT_CACHE_BYTES:
        slots //= 2
    return slots


def _check_bits(options: ExportOptions) -> None:
    least, most = _BITS
    assert options.bits is not None
    if not least <= options.bits <= most:  # also for NaN
        raise PrecastError(f"--bits: expected {least:g} to {most:g}, found {options.bits:g}.")
    if options.weights is not None:
        raise PrecastError(
            f"--bits: chooses the formats of all weights, but --weights is {options.weights}; leave out one of them."
        )


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise PrecastError(f"--{option}: expected one of {', '.join(known)}, found {value!r}.")


def _check_buckets(buckets: Sequence[int]) -> None:
    if not buckets:
        raise PrecastError("--buckets: expected at least one prompt length, found none.")
    for bucket in buckets:
        if bucket < 1:
            raise PrecastError(f"--buckets: expected prompt lengths of 1 or more, found {bucket}.")
        if buckets.count(bucket) > 1:
            raise PrecastError(f"--buckets: {bucket} is given twice; give each length once.")


def _check_reach(buckets: Sequence[int], context: int) -> None:
    """Refuse buckets that are longer than the context."""
    for bucket in buckets:
        if bucket > context:
            raise PrecastError(
                f"--buckets: {bucket} is larger than the context of {context}; leave it out or raise --context."
            )


def _check_targets(targets: Sequence[str]) -> None:
    unknown = [repr(name) for name in targets if name not in TARGET_KINDS]
    if not targets or unknown or len(set(targets)) < len(targets):
        found = ", ".join(unknown) or ("one of them twice" if targets else "none")
        raise PrecastError(
            f"--target: expected one or more of {', '.join(TARGET_KINDS)} without repeats, found {found}."
        )
    kinds = [TARGET_KINDS[name] for name in targets]
    if any(kind.runtime == "savedmodel" for kind in kinds):
        savedmodel.check_packages()
    for kind in kinds:
        if kind.device is not None:
            kind.device()


def _check_isas(isas: Sequence[str], targets: Sequence[str]) -> None:
    if not isas or len(set(isas)) < len(isas):
        found = "one of them twice" if isas else "none"
        raise PrecastError(
            f"--cpu-isa: expected one or more instruction sets without repeats, found {found}."
        )
    for name in isas:
        isa.check_isa(name)
    if "cpu" not in targets:
        raise PrecastError("--cpu-isa: applies only to the target cpu; add --target cpu.")
