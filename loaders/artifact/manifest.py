"""``manifest.json``: what an artifact holds. `artifacts/README.md` is the specification in prose."""

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

from .errors import PrecastError
from .frozen import Frozen
from .record import from_json, parse_json
from .upgrade import UPGRADES, upgrade

FORMAT_VERSION = 5
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = (
    "manifest.json.sig"  # over the manifest; it and the manifest are the files that no manifest lists
)
WEIGHTS_FILE = "weights.safetensors"

# Bytes of an element, by the name a manifest uses.
DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
}
_MAX_SLOTS = 1 << 16
# How a target is executed: deserialised, compiled on request, or by TensorFlow.
RUNTIMES = ("pjrt", "stablehlo", "savedmodel")

_Shape = tuple[int, ...]


class Value(Frozen):
    """An argument or a result of a program.

    Attributes:
        name: unique among the program's arguments, or among its results.
        role: "tokens", "positions", "start", "length", "slot", "cache", "table", "weight", "logits" or "token".
        shape: axes in order.
        dtype: a key of `DTYPE_BYTES`.
        layout: axes from the slowest to the fastest in memory, as the compiler chose. Programs take and return their
            arrays with the axes in this order.
        alias: of a result: the name of the argument whose memory it takes over, which is then used up.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    layout: tuple[int, ...]
    alias: str | None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def physical(self) -> tuple[int, ...]:
        """The shape as it lies in memory, the slowest axis first: what the program itself calls its shape."""
        return tuple(self.shape[axis] for axis in self.layout)


class ProgramMemory(Frozen):
    """What the compiler says a call needs, in bytes."""

    arguments: int
    results: int
    aliased: int
    temporary: int


class Program(Frozen):
    """A compiled function: flat arguments in, flat results out.

    Attributes:
        name: "cache", "prefill_64", …, "decode".
        kind: "cache" (makes an empty cache), "prefill" or "decode".
        tokens: T of a prefill bucket; 1 for decode; 0 for cache.
        executable: file of the serialised executable; None where the target has none.
        stablehlo: file of the StableHLO portable artifact; None where the target has none. Targets may share it.
        arguments: in the order the executable takes them.
        results: in the order it returns them.
        flops: multiplications and additions of the matrix products and of attention over the whole capacity.
        memory: None where nothing was compiled.
    """

    name: str
    kind: str
    tokens: int
    executable: str | None
    stablehlo: str | None
    arguments: tuple[Value, ...]
    results: tuple[Value, ...]
    flops: int
    memory: ProgramMemory | None


class Target(Frozen):
    """A platform that programs were compiled for. A machine must match all fields.

    Attributes:
        name: unique in the artifact ("cpu-x86-64-v2", "portable").
        runtime: how it is executed: "pjrt" (deserialised), "stablehlo" (compiled on request) or "savedmodel" (by
            TensorFlow).
        platform: XLA's name ("cpu", "cuda"); "any" where the program does not depend on it.
        device: kind of device, as its driver names it; "any" where every device of the platform will do.
        machine: processor family ("x86_64", "aarch64"); "any" for StableHLO.
        jaxlib: the version that compiled it, and the only one that loads it; "any" for StableHLO.
        cpu_features: every feature that the build machine had and compiled code may use, in LLVM's names.
        kernel_abi: ABI version of precast's kernels; 0 where none are called.
        kernels: custom-call targets that the programs call.
        xla_flags: XLA_FLAGS at compile time.
        stablehlo_expires: ISO date until which the StableHLO is promised to compile with newer jaxlibs.
        programs: all of the artifact's programs.
    """

    name: str
    runtime: str
    platform: str
    device: str
    machine: str
    jaxlib: str
    cpu_features: tuple[str, ...]
    kernel_abi: int
    kernels: tuple[str, ...]
    xla_flags: str
    stablehlo_expires: str
    programs: tuple[Program, ...]

    def of_kind(self, kind: str) -> tuple[Program, ...]:
        return tuple(p for p in self.programs if p.kind == kind)

    def file_of(self, program: Program) -> str | None:
        """The file that this target's runtime reads of a program of its own."""
        return program.stablehlo if self.runtime == "stablehlo" else program.executable


class ModelInfo(Frozen):
    """The model's shape; letters are the design's.

    Attributes:
        architecture: Hugging Face ``model_type``.
        layers: L.
        width: D.
        heads: N.
        kv_heads: K.
        head_dim: H.
        ff_width: F.
        vocab: V.
        parameters: how many, counted once where they are shared.
        weights: how they are stored: "float32", "bfloat16", "int8" or "int4".
        max_positions: what the model was trained for.
    """

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ff_width: int
    vocab: int
    parameters: int
    weights: str
    max_positions: int


class CacheArray(Frozen):
    """One array of the cache, as every program of every target takes and returns it.

    Attributes:
        axes: the letters of its shape's axes, one each ("LBKSH").
        layout: that of the first target; another target may lay it out otherwise, as its own programs say.
        window: positions that a token of these layers sees; 0 where it sees all. Then position p stands at place
            p mod S of the array's own S.
        layers: the model's layers that it holds, in the order of its first axis.
    """

    name: str
    shape: tuple[int, ...]
    axes: str
    dtype: str
    layout: tuple[int, ...]
    window: int
    layers: tuple[int, ...]
    bytes: int


class TokenizerFiles(Frozen):
    """The tokenizer's files, and its tokens that generation needs.

    Attributes:
        file: the tokenizer's file.
        chat_template: file of the default chat template; None where there is none.
        named_templates: files of further chat templates, by name ("tool_use").
        eos_token_ids: tokens that end a generation.
    """

    file: str
    chat_template: str | None
    named_templates: Mapping[str, str]
    bos_token: str | None
    eos_token: str | None
    eos_token_ids: tuple[int, ...]


class SamplingDefaults(Frozen):
    """The model's own sampling defaults, in the fields of `precast.loaders.generation.sampling.SamplingParams`.

    None or an empty list means that the model has no default.
    """

    max_tokens: int | None = None
    max_length: int | None = None
    min_tokens: int | None = None
    min_length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()

    def given(self) -> dict[str, Any]:
        """Return the defaults that the model has, by field."""
        return {name: value for name, value in vars(self).items() if value not in (None, ())}


class FileEntry(Frozen):
    bytes: int
    sha256: str


class Provenance(Frozen):
    """Where the artifact came from.

    Attributes:
        source: the source's name.
        source_files: what was read, by name.
        licence: SPDX name, or None where the source does not say.
        created: ISO date of the export.
        versions: of the packages that made it, by package.
    """

    source: str
    source_files: Mapping[str, FileEntry]
    licence: str | None
    created: str
    versions: Mapping[str, str]


class Fidelity(Frozen):
    """How far the first target's predictions are from the float32 model it was made from; measured at export.

    `precast.loaders.audit.evaluate` describes the method.

    Attributes:
        text: name of the text.
        tokens: predictions scored.
        perplexity: of the artifact; None where it is more than a float holds.
        reference_perplexity: of the float32 model; None as above.
        kl_mean: mean KL(float32 model ‖ artifact), nats per token.
        kl_p99: its 99th percentile.
        top1: share of predictions where both find the same token likeliest, 0 to 1.
    """

    text: str
    tokens: int
    perplexity: float | None
    reference_perplexity: float | None
    kl_mean: float
    kl_p99: float
    top1: float


class Manifest(Frozen):
    """All of ``manifest.json``.

    Attributes:
        capacity: the context length, under its name in the file.
        slots: B, sequences decoded together.
        buckets: prompt lengths that a prefill program exists for, ascending.
        sampling: the model's own sampling defaults.
        golden: file of recorded answers.
        fidelity: None where it was not measured.
        files: every file of the artifact but the manifest itself.
    """

    format_version: int
    name: str
    model: ModelInfo
    capacity: int
    slots: int
    buckets: tuple[int, ...]
    cache: tuple[CacheArray, ...]
    targets: tuple[Target, ...]
    tokenizer: TokenizerFiles
    sampling: SamplingDefaults
    golden: str
    provenance: Provenance
    files: Mapping[str, FileEntry]
    fidelity: Fidelity | None

    @property
    def context(self) -> int:
        """S, the most positions that a sequence may have."""
        return self.capacity


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse and check the text of a manifest.

    Raises:
        PrecastError: the format version is unknown, a key or value is invalid, or a program disagrees with the cache
            or names an unlisted file.
    """
    value = parse_json(data, where)
    _check_version(value, where)
    manifest = from_json(Manifest, upgrade(value, where), where)
    _check_files(manifest, where)
    _check_geometry(manifest, where)
    names = Counter(target.name for target in manifest.targets)
    for target in manifest.targets:
        _expect(f"{where}: target {target.name!r}", "targets of this name", 1, names[target.name])
        _check_target(manifest, target, f"{where}: target {target.name!r}")
        for program in target.programs:
            _check_program(manifest, program, f"{where}: target {target.name!r}, program {program.name!r}")
    return manifest


def _check_version(value: Any, where: str) -> None:
    version = value.get("format_version") if isinstance(value, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise PrecastError(f"{where}: expected a precast manifest with a format_version, found none.")
    if version not in (*UPGRADES, FORMAT_VERSION):
        raise PrecastError(
            f"{where}: format version {version} is not the {FORMAT_VERSION} that this precast reads; "
            + ("update precast." if version > FORMAT_VERSION else "export the model again.")
        )


def _check_files(manifest: Manifest, where: str) -> None:
    named = {WEIGHTS_FILE, manifest.tokenizer.file, manifest.golden, manifest.tokenizer.chat_template}
    named |= set(manifest.tokenizer.named_templates.values())
    for target in manifest.targets:
        for program in target.programs:
            named |= {program.executable, program.stablehlo}
    for name in sorted(n for n in named if n is not None):
        if name not in manifest.files:
            raise PrecastError(f"{where}: file {name!r} is used but not listed under files.")


def _expect(where: str, what: str, expected: object, found: object) -> None:
    if found != expected:
        raise PrecastError(
            f"{where}: {what}: expected {expected!r:.200}, found {found!r:.200}; export the model again."
        )


def _check_geometry(manifest: Manifest, where: str) -> None:
    """Capacity, slots, buckets and cache must tell the same story: the programs' loops are driven by them."""
    if manifest.slots < 1 or manifest.model.vocab < 1 or not manifest.buckets:
        raise PrecastError(f"{where}: expected at least one slot, one token and one bucket, found none.")
    if manifest.context >= 2**31 or manifest.slots > _MAX_SLOTS:
        raise PrecastError(
            f"{where}: {manifest.slots} slots of {manifest.context} positions are more than any machine holds;"
            " export the model again."
        )
    if not 1 <= min(manifest.buckets) <= max(manifest.buckets) <= manifest.context:
        raise PrecastError(
            f"{where}: buckets: expected lengths from 1 to the context of {manifest.context}, found"
            f" {list(manifest.buckets)!r:.200}."
        )
    _expect(where, "buckets", tuple(sorted(set(manifest.buckets))), manifest.buckets)
    for array in manifest.cache:
        place = f"{where}: cache {array.name!r}"
        _expect(place, "letters of its axes", len(array.shape), len(array.axes))
        _expect(place, "axes in its layout", list(range(len(array.shape))), sorted(array.layout))
        named = dict(zip(array.axes, array.shape, strict=True))
        # Of layers with a window: what the first token of the longest chunk sees, and the chunk.
        seen = array.window + max(manifest.buckets) - 1 if array.window else manifest.context
        positions = named.get("S", 0)
        if not min(seen, manifest.context) <= positions <= manifest.context:
            raise PrecastError(
                f"{place}: it keeps {positions} positions, expected {min(seen, manifest.context)} to"
                f" {manifest.context}; export the model again."
            )
        sizes = {"B": manifest.slots, "L": len(array.layers)}
        _expect(place, "slots and layers", sizes, {axis: named.get(axis) for axis in sizes})
        _expect(place, "bytes", prod(array.shape) * DTYPE_BYTES.get(array.dtype, 0), array.bytes)
        _expect(place, "layers in their order", tuple(sorted(set(array.layers))), array.layers)
    held_by_kind: dict[str, list[int]] = {}
    for array in manifest.cache:
        held_by_kind.setdefault(array.name.rpartition(".")[2], []).extend(array.layers)
    for kind, layers in sorted(held_by_kind.items()):
        held = sorted(layers)
        # The number alone may be anything; so many layers are listed only once they are known to be there.
        _expect(f"{where}: caches of {kind}", "number of layers", manifest.model.layers, len(held))
        _expect(f"{where}: caches of {kind}", "layers", list(range(len(held))), held)


def _check_target(manifest: Manifest, target: Target, where: str) -> None:
    """A target has a runtime that is known, and each program that generating takes, once."""
    if target.runtime not in RUNTIMES:
        raise PrecastError(
            f"{where}: runtime {target.runtime!r} is not known, expected one of {', '.join(RUNTIMES)}."
        )
    kinds = sorted((p.kind, p.tokens) for p in target.programs)
    needed = [("cache", 0), ("decode", 1), *(("prefill", tokens) for tokens in manifest.buckets)]
    _expect(where, "kinds and lengths of its programs", needed, kinds)
    _expect(where, "names of its programs", len(kinds), len({p.name for p in target.programs}))
    for program in target.programs:
        if target.file_of(program) is None:
            what = "StableHLO" if target.runtime == "stablehlo" else "executable"
            raise PrecastError(f"{where}: program {program.name!r} has no {what}; export the model again.")
    _check_layouts(manifest, target, where)


def _check_layouts(manifest: Manifest, target: Target, where: str) -> None:
    """KVCaches and constants lie alike in all of a target's programs, and everything else row after row."""
    first = manifest.targets[0] is target
    layouts = {c.name: c.layout for c in manifest.cache} if first else {}
    for value in (v for p in target.programs for v in (*p.arguments, *p.results)):
        rows = tuple(range(len(value.shape)))
        _expect(where, f"axes in the layout of {value.name!r}", rows, tuple(sorted(value.layout)))
        shared = value.role in ("cache", "table", "weight")
        expected = layouts.setdefault(value.name, value.layout) if shared else rows
        _expect(where, f"layout of {value.name!r}", expected, value.layout)


def _signature(manifest: Manifest, program: Program) -> tuple[dict[str, _Shape], dict[str, _Shape]]:
    """Inputs and results but caches that a program of this kind has, by name and role alike."""
    one, slots, vocab = 1, manifest.slots, manifest.model.vocab
    if program.kind == "cache":
        return {}, {}
    if program.kind == "decode":
        return {"tokens": (slots,), "positions": (slots,)}, {"token": (slots,), "logits": (slots, vocab)}
    inputs: dict[str, _Shape] = {"tokens": (program.tokens,), "length": (), "start": (), "slot": ()}
    return inputs, {"token": (one,), "logits": (one, vocab)}


def _check_signature(manifest: Manifest, program: Program, where: str) -> None:
    """Arguments are inputs, then caches, then constants; results are as the loader reads them."""
    inputs, results = _signature(manifest, program)
    order = {"cache": 1, "table": 2, "weight": 2}
    places = [order.get(v.role, 0) for v in program.arguments]
    _expect(where, "arguments in the order inputs, caches, constants", sorted(places), places)
    given = {v.name: (v.role, v.shape, v.dtype) for v in program.arguments if v.role not in order}
    _expect(where, "inputs", {name: (name, shape, "int32") for name, shape in inputs.items()}, given)
    returned = {v.name: (v.role, v.shape, v.dtype) for v in program.results if v.role != "cache"}
    types = {"token": "int32", "logits": "float32"}
    _expect(where, "results", {name: (name, shape, types[name]) for name, shape in results.items()}, returned)


def _check_program(manifest: Manifest, program: Program, where: str) -> None:
    _check_signature(manifest, program, where)
    for values in (program.arguments, program.results):
        if len({v.name for v in values}) != len(values):
            raise PrecastError(f"{where}: two arguments or two results have the same name.")
        for v in values:
            if v.dtype not in DTYPE_BYTES:
                raise PrecastError(
                    f"{where}: {v.name!r} has dtype {v.dtype!r}, expected one of {', '.join(DTYPE_BYTES)}."
                )
    caches = {c.name: (c.shape, c.dtype) for c in manifest.cache}
    holders = (program.results,) if program.kind == "cache" else (program.arguments, program.results)
    for values in holders:
        found = {v.name: (v.shape, v.dtype) for v in values if v.role == "cache"}
        if found != caches:
            raise PrecastError(
                f"{where}: its cache is not the artifact's: expected {caches!r:.200}, found {found!r:.200}; export the"
                " model again."
            )
    arguments = {v.name for v in program.arguments}
    for result in program.results:
        if result.alias is not None and result.alias not in arguments:
            raise PrecastError(
                f"{where}: result {result.name!r} aliases {result.alias!r}, which is no argument."
            )
