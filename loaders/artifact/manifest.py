"""``manifest.json``: the description of an artifact. `artifacts/README.md` is the specification in prose."""

from collections.abc import Mapping
from math import prod
from typing import Any

from .frozen import Frozen

FORMAT_VERSION = 7
MANIFEST_FILE = "manifest.json"
# The signature of the manifest. The manifest lists every file except itself and its signature.
SIGNATURE_FILE = "manifest.json.sig"
WEIGHTS_FILE = "weights.safetensors"

# Bytes of an element, by dtype.
DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
}
# Values of `Target.runtime`.
RUNTIMES = ("pjrt", "stablehlo", "savedmodel")


class Value(Frozen):
    """An argument or a result of a program.

    Attributes:
        name: the value's name, unique among the program's arguments, or among its results.
        role: "tokens", "positions", "slots", "start", "length", "slot", "cache", "table", "weight", "logits" or
            "token".
        shape: sizes of the axes.
        dtype: a key of `DTYPE_BYTES`.
        layout: the order of the axes in memory that the compiler chose, from the slowest to the fastest. Programs
            accept and return their arrays with the axes in this order.
        alias: name of the argument whose memory a result reuses; None for arguments and other results. The call
            invalidates that argument (donation).
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    layout: tuple[int, ...]
    alias: str | None

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def physical(self) -> tuple[int, ...]:
        """The shape of the array in the executable: the axes of `shape` in the order of `layout`."""
        return tuple(self.shape[axis] for axis in self.layout)


class ProgramMemory(Frozen):
    """The memory of one call, in bytes, as the compiler reports it.

    Attributes:
        arguments: size of the arguments.
        results: size of the results.
        aliased: the part of `results` that reuses the memory of arguments.
        temporary: scratch memory, excluding the scratch memory of precast's kernels.
    """

    arguments: int
    results: int
    aliased: int
    temporary: int


class Program(Frozen):
    """A compiled function with flat arguments and results.

    Attributes:
        name: the program's name, unique in the target: "cache", "prefill_64", …, "decode", "score".
        kind: "cache" (creates an empty KV cache), "prefill", "decode" or "score".
        tokens: maximum number of tokens of a sequence in one call: T for prefill and score, 1 for decode, 0 for cache.
        executable: file of the serialised executable; None if the target has only StableHLO.
        stablehlo: file of the StableHLO portable artifact, which several targets may share; None if there is none.
        arguments: arguments in the executable's order.
        results: results in the executable's order.
        flops: number of multiplications and additions in the matrix products, and in attention over the whole context.
        memory: memory of one call; None if the program was not compiled.
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

    @property
    def rows(self) -> int:
        """The number of rows in each result: R for decode, 1 for prefill, T for score, 0 for cache."""
        return next((v.shape[0] for v in self.results if v.role == "token" and v.shape), 0)

    @property
    def has_slots(self) -> bool:
        """True for a decode program whose rows may belong to any slots. Up to format 5, row i belongs to slot i."""
        return any(v.role == "slots" for v in self.arguments)


class Target(Frozen):
    """The artifact's programs for one kind of machine and one runtime.

    Attributes:
        name: the target's name, unique in the artifact ("cpu-x86-64-v2", "portable").
        runtime: "pjrt" (executables that jaxlib deserialises), "stablehlo" (compiled on request) or "savedmodel"
            (executed by TensorFlow).
        platform: XLA's name for the platform ("cpu", "cuda"); "any" for portable programs.
        device: model of the device, as its driver names it; "any" for every device of the platform.
        machine: processor family ("x86_64", "aarch64"); "any" for StableHLO.
        jaxlib: the version that compiled the executables and the only version that loads them; "any" for StableHLO.
        cpu_features: features that the machine must have, in LLVM's names.
        kernel_abi: ABI version of precast's kernels; 0 if no kernel is called.
        kernels: custom-call targets that the programs call.
        xla_flags: value of XLA_FLAGS at compile time.
        stablehlo_expires: ISO date until which newer jaxlibs are guaranteed to compile the StableHLO.
        programs: one cache program, one prefill program for each bucket, one or more decode programs, and at most one
            score program. Each decode program has its own number of rows, and the largest has a row for each slot.
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
        """Return the programs of one kind."""
        return tuple(p for p in self.programs if p.kind == kind)

    def file_of(self, program: Program) -> str | None:
        """Return the file of one of this target's programs, in the form that the target's runtime reads."""
        return program.stablehlo if self.runtime == "stablehlo" else program.executable


class ModelInfo(Frozen):
    """The model's architecture and shape.

    Attributes:
        architecture: Hugging Face ``model_type``.
        layers: number of layers, L.
        width: model width, D.
        heads: query heads, N.
        kv_heads: key/value heads, K.
        head_dim: head dimension, H.
        ff_width: feed-forward width, F.
        vocab: vocabulary size, V.
        parameters: number of parameters; shared parameters count once.
        weights: storage format of the weights: "float32", "bfloat16", "int8", "int4", "source" (each matrix
            as in the checkpoint) or "mixed" (a format chosen for each matrix).
        max_positions: context length that the model was trained for.
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
    """An array of the KV cache. The programs of every target accept it as an argument and return it as a result.

    Attributes:
        name: the name among a program's arguments and results ("cache.keys").
        shape: sizes of the axes.
        axes: one letter for each axis of the shape ("LBKSH").
        dtype: a key of `DTYPE_BYTES`.
        layout: the layout in the programs of the first target; programs of other targets may declare different layouts.
        window: number of positions that a token attends to in the array's layers; 0 for all. An array with a window is
            a ring buffer: position p is stored at index p mod S, where S is the size of this array's axis "S".
        layers: indices of the layers whose keys or values the array contains, in their order along the axis "L".
        bytes: size in bytes.
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
    """The tokenizer's files and special tokens.

    Attributes:
        file: the tokenizer's file.
        chat_template: file of the default chat template; None if the model has none.
        named_templates: files of further chat templates, by name ("tool_use").
        bos_token: beginning-of-sequence token, for chat templates.
        eos_token: end-of-sequence token, for chat templates.
        eos_token_ids: tokens that end a generation.
    """

    file: str
    chat_template: str | None
    named_templates: Mapping[str, str]
    bos_token: str | None
    eos_token: str | None
    eos_token_ids: tuple[int, ...]


class SamplingDefaults(Frozen):
    """The model's own sampling defaults, under the names of the fields of `precast.SamplingParams`.

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
    """A file's size in bytes, and its sha256 in hex."""

    bytes: int
    sha256: str


class Provenance(Frozen):
    """The origin of an artifact.

    Attributes:
        source: the source's name.
        source_files: size and hash of each source file that was read, by name.
        licence: SPDX identifier; None if the source states no licence.
        created: ISO date of the export.
        versions: versions of the packages that made the export, by package.
    """

    source: str
    source_files: Mapping[str, FileEntry]
    licence: str | None
    created: str
    versions: Mapping[str, str]


class Fidelity(Frozen):
    """The distance between the first target's predictions and the float32 model's, measured at export.

    `precast.loaders.audit.evaluate` describes the method.

    Attributes:
        text: name of the text.
        tokens: number of predictions scored.
        perplexity: perplexity of the artifact; None if it overflows a float.
        reference_perplexity: perplexity of the float32 model; None if it overflows a float.
        kl_mean: mean of KL(float32 model ‖ artifact), in nats per token.
        kl_p99: 99th percentile of that divergence.
        top1: share of predictions with the same most likely token, 0 to 1.
    """

    text: str
    tokens: int
    perplexity: float | None
    reference_perplexity: float | None
    kl_mean: float
    kl_p99: float
    top1: float


class Prefix(Frozen):
    """Tokens whose keys and values are stored in the artifact.

    Attributes:
        name: the prefix's name, unique in the artifact.
        tokens: number of tokens.
        file: JSON file with the token ids.
        arrays: safetensors file with a tensor for each array of the KV cache. A tensor contains positions 0 to
            ``tokens − 1`` of a slot. For an array with a window of W positions, it contains at most the last W of them.
        target: name of the target that computed the arrays.
        kernels: ABI version of the kernels that computed the arrays.
        isa: instruction set of these kernels.
        programs: sha256 of the target's programs, as `precast.loaders.artifact.origin` computes it.
        weights: sha256 of the weight file.
    """

    name: str
    tokens: int
    file: str
    arrays: str
    target: str
    kernels: int
    isa: str
    programs: str
    weights: str


class Manifest(Frozen):
    """The contents of ``manifest.json``.

    Attributes:
        format_version: version of the artifact format.
        name: the model's name.
        model: the model's architecture and shape.
        capacity: the context length, which the property `context` returns.
        slots: B, the number of sequences decoded together.
        buckets: prompt lengths that have their own prefill program, ascending.
        cache: arrays of the KV cache.
        targets: targets in the exporter's order; the first is the reference for cache layouts, golden answers and
            fidelity.
        tokenizer: the tokenizer's files and special tokens.
        sampling: the model's own sampling defaults.
        golden: file of the golden answers.
        prefixes: the prefixes whose keys and values are stored.
        provenance: origin of the artifact.
        files: size and hash of every file except the manifest and its signature, by name.
        fidelity: distance from the float32 model; None if it was not measured.
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
    prefixes: tuple[Prefix, ...]
    provenance: Provenance
    files: Mapping[str, FileEntry]
    fidelity: Fidelity | None

    @property
    def context(self) -> int:
        """S, the context length: the maximum number of positions in a sequence."""
        return self.capacity
