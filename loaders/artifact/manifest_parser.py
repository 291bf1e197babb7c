"""Parse and check ``manifest.json``. `artifacts/README.md` is the specification in prose."""

from collections import Counter
from math import prod
from typing import Any

from .errors import PrecastError
from .json_records import from_json, parse_json
from .manifest import (
    DTYPE_BYTES,
    FORMAT_VERSION,
    RUNTIMES,
    WEIGHTS_FILE,
    CacheArray,
    Manifest,
    Prefix,
    Program,
    Target,
)

_MAX_SLOTS = 1 << 16
LONGEST_PREFIX_NAME = 64  # a prefix's name is part of file names

_Shape = tuple[int, ...]


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse and check the text of a manifest.

    Args:
        data: contents of the file, untrusted.
        where: the file's path, for messages.

    Raises:
        PrecastError: the format version is unknown, a key or value is invalid, or a program disagrees with the cache
            or names an unlisted file.
    """
    manifest = from_json(Manifest, _current(parse_json(data, where), where), where)
    _check_files(manifest, where)
    _check_geometry(manifest, where)
    names = Counter(target.name for target in manifest.targets)
    for target in manifest.targets:
        _expect(f"{where}: target {target.name!r}", "targets of this name", 1, names[target.name])
        _check_target(manifest, target, f"{where}: target {target.name!r}")
        for program in target.programs:
            _check_program(manifest, program, f"{where}: target {target.name!r}, program {program.name!r}")
    distinct = {prefix.name for prefix in manifest.prefixes}
    _expect(f"{where}: prefixes", "distinct names", len(manifest.prefixes), len(distinct))
    for prefix in manifest.prefixes:
        _check_prefix(manifest, prefix, f"{where}: prefix {prefix.name!r}")
    return manifest


def _current(value: Any, where: str) -> dict[str, Any]:
    """Check the format version of a parsed manifest, and upgrade it to the current version."""
    version = value.get("format_version") if isinstance(value, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise PrecastError(
            f"{where}: expected a precast manifest with a format_version, found none; check the path, or export the"
            " model again."
        )
    if version == FORMAT_VERSION:
        return dict(value)
    from .upgrade import UPGRADES, upgrade  # a lazy import, because the current version needs no upgrade

    if version not in UPGRADES:
        raise PrecastError(
            f"{where}: expected format version {min(UPGRADES)} to {FORMAT_VERSION}, found {version}; "
            + ("update precast." if version > FORMAT_VERSION else "export the model again.")
        )
    return upgrade(value, where)


def _check_files(manifest: Manifest, where: str) -> None:
    named = {WEIGHTS_FILE, manifest.tokenizer.file, manifest.golden, manifest.tokenizer.chat_template}
    named |= set(manifest.tokenizer.named_templates.values())
    for target in manifest.targets:
        for program in target.programs:
            named |= {program.executable, program.stablehlo}
    for prefix in manifest.prefixes:
        named |= {prefix.file, prefix.arrays}
    for name in sorted(n for n in named if n is not None):
        if name not in manifest.files:
            raise PrecastError(
                f"{where}: file {name!r} is used but not listed under files; export the model again."
            )


def _expect(where: str, what: str, expected: object, found: object) -> None:
    if found != expected:
        raise PrecastError(
            f"{where}: {what}: expected {expected!r:.200}, found {found!r:.200}; export the model again."
        )


def _check_geometry(manifest: Manifest, where: str) -> None:
    """Check that context, slots, buckets and KV cache are consistent, because the engine relies on them."""
    if manifest.model.parameters < 1:
        raise PrecastError(
            f"{where}: expected at least one parameter, found {manifest.model.parameters}; export the model again."
        )
    if manifest.slots < 1 or manifest.model.vocab < 1 or not manifest.buckets:
        raise PrecastError(
            f"{where}: expected at least one slot, one token in the vocabulary and one bucket, found"
            f" {manifest.slots}, {manifest.model.vocab} and {len(manifest.buckets)}; export the model again."
        )
    if manifest.context >= 2**31 or manifest.slots > _MAX_SLOTS:
        raise PrecastError(
            f"{where}: {manifest.slots} slots of {manifest.context} positions exceed any machine's memory;"
            " export the model again."
        )
    if not 1 <= min(manifest.buckets) <= max(manifest.buckets) <= manifest.context:
        raise PrecastError(
            f"{where}: buckets: expected lengths from 1 to the context of {manifest.context}, found"
            f" {list(manifest.buckets)!r:.200}; export the model again."
        )
    _expect(where, "buckets in ascending order", tuple(sorted(set(manifest.buckets))), manifest.buckets)
    layers: dict[str, list[int]] = {}
    for array in manifest.cache:
        _check_cache_array(manifest, array, f"{where}: cache {array.name!r}")
        layers.setdefault(array.name.rpartition(".")[2], []).extend(array.layers)
    for kind, found in sorted(layers.items()):
        # Compare the counts first: an untrusted manifest may claim 2^63 layers, too many to list.
        _expect(f"{where}: caches of {kind}", "number of layers", manifest.model.layers, len(found))
        _expect(f"{where}: caches of {kind}", "layers", list(range(len(found))), sorted(found))


def _check_cache_array(manifest: Manifest, array: CacheArray, where: str) -> None:
    _expect(where, "number of letters in its axes", len(array.shape), len(array.axes))
    _expect(where, "axes in its layout", list(range(len(array.shape))), sorted(array.layout))
    named = dict(zip(array.axes, array.shape, strict=True))
    # A ring buffer must have room for the longest chunk and for the window before the chunk's first token.
    needed = array.window + max(manifest.buckets) - 1 if array.window else manifest.context
    needed = min(needed, manifest.context)
    positions = named.get("S", 0)
    if not needed <= positions <= manifest.context:
        raise PrecastError(
            f"{where}: expected {needed} to {manifest.context} positions, found {positions}; export the model again."
        )
    sizes = {"B": manifest.slots, "L": len(array.layers)}
    _expect(where, "slots and layers", sizes, {axis: named.get(axis) for axis in sizes})
    _expect(where, "bytes", prod(array.shape) * DTYPE_BYTES.get(array.dtype, 0), array.bytes)
    _expect(where, "layers in ascending order", tuple(sorted(set(array.layers))), array.layers)


def _check_target(manifest: Manifest, target: Target, where: str) -> None:
    """Check that a target has a known runtime, and has each program exactly once."""
    if target.runtime not in RUNTIMES:
        raise PrecastError(
            f"{where}: runtime: expected one of {', '.join(RUNTIMES)}, found {target.runtime!r}; update precast, or"
            " export the model again."
        )
    kinds = sorted((p.kind, p.tokens) for p in target.programs if p.kind not in ("decode", "score"))
    needed = [("cache", 0), *(("prefill", tokens) for tokens in manifest.buckets)]
    _expect(where, "kinds and lengths of its programs", needed, kinds)
    names = {p.name for p in target.programs}
    _expect(where, "distinct names of its programs", len(target.programs), len(names))
    _check_decode_and_score(manifest, target, where)
    for program in target.programs:
        if target.file_of(program) is None:
            what = "StableHLO" if target.runtime == "stablehlo" else "executable"
            raise PrecastError(f"{where}: program {program.name!r} has no {what}; export the model again.")
    _check_layouts(manifest, target, where)


def _check_decode_and_score(manifest: Manifest, target: Target, where: str) -> None:
    """Check that one decode program has a row for each slot, and that score takes at most as many tokens as prefill."""
    decodes = sorted(target.of_kind("decode"), key=lambda p: p.rows)
    rows = [p.rows for p in decodes]
    # Up to format 5, decode has one row for each slot, and row i belongs to slot i.
    fits = all(p.tokens == 1 and (p.has_slots or p.rows == manifest.slots) for p in decodes)
    if not fits or rows[-1:] != [manifest.slots] or rows[0] < 1 or len(set(rows)) < len(rows):
        raise PrecastError(
            f"{where}: decode programs: expected different numbers of rows, with {manifest.slots} as the largest,"
            f" found {rows!r:.200}; export the model again."
        )
    scores = [p.tokens for p in target.of_kind("score")]
    if len(scores) > 1 or not all(1 <= tokens <= max(manifest.buckets) for tokens in scores):
        raise PrecastError(
            f"{where}: score programs: expected at most one (with 1 to {max(manifest.buckets)} tokens), found"
            f" {scores!r:.200}; export the model again."
        )


def _check_layouts(manifest: Manifest, target: Target, where: str) -> None:
    """Check that all programs use the same layouts for KV cache and constants, and row-major layouts elsewhere."""
    first = manifest.targets[0] is target
    layouts = {c.name: c.layout for c in manifest.cache} if first else {}
    for value in (v for p in target.programs for v in (*p.arguments, *p.results)):
        rows = tuple(range(len(value.shape)))
        _expect(where, f"axes in the layout of {value.name!r}", rows, tuple(sorted(value.layout)))
        shared = value.role in ("cache", "table", "weight")
        expected = layouts.setdefault(value.name, value.layout) if shared else rows
        _expect(where, f"layout of {value.name!r}", expected, value.layout)


def _signature(manifest: Manifest, program: Program) -> tuple[dict[str, _Shape], dict[str, _Shape]]:
    """Return the expected shapes of a program's inputs and of its results, by name, without the KV cache."""
    if program.kind == "cache":
        return {}, {}
    rows = {"prefill": 1, "score": program.tokens}.get(program.kind, program.rows)
    results: dict[str, _Shape] = {"token": (rows,), "logits": (rows, manifest.model.vocab)}
    if program.kind == "decode":
        names = ("tokens", "positions", "slots") if program.has_slots else ("tokens", "positions")
        return dict.fromkeys(names, (rows,)), results
    return {"tokens": (program.tokens,), "length": (), "start": (), "slot": ()}, results


def _check_signature(manifest: Manifest, program: Program, where: str) -> None:
    """Check names, shapes and dtypes, and the order of the arguments: inputs, caches, constants."""
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
            raise PrecastError(
                f"{where}: two arguments or two results have the same name; export the model again."
            )
        for v in values:
            if v.dtype not in DTYPE_BYTES:
                raise PrecastError(
                    f"{where}: dtype of {v.name!r}: expected one of {', '.join(DTYPE_BYTES)}, found {v.dtype!r}; export"
                    " the model again."
                )
    caches = {c.name: (c.shape, c.dtype) for c in manifest.cache}
    holders = (program.results,) if program.kind == "cache" else (program.arguments, program.results)
    for values in holders:
        found = {v.name: (v.shape, v.dtype) for v in values if v.role == "cache"}
        if found != caches:
            raise PrecastError(
                f"{where}: its KV cache differs from the artifact's: expected {caches!r:.200}, found {found!r:.200};"
                " export the model again."
            )
    arguments = {v.name for v in program.arguments}
    for result in program.results:
        if result.alias is not None and result.alias not in arguments:
            raise PrecastError(
                f"{where}: result {result.name!r} aliases {result.alias!r}, which is not an argument; export the model"
                " again."
            )


def _check_prefix(manifest: Manifest, prefix: Prefix, where: str) -> None:
    if not is_prefix_name(prefix.name):
        raise PrecastError(
            f"{where}: expected a name of 1 to {LONGEST_PREFIX_NAME} letters, digits, '-', '_' or '.', not beginning"
            f" with '.', found {prefix.name!r:.80}; export the model again."
        )
    if not 1 <= prefix.tokens < manifest.context:
        raise PrecastError(
            f"{where}: expected 1 to {manifest.context - 1} tokens, found {prefix.tokens}; export the model again."
        )
    _expect(where, "targets of this name", 1, sum(t.name == prefix.target for t in manifest.targets))
    for what, digest in (("programs", prefix.programs), ("weights", prefix.weights)):
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise PrecastError(
                f"{where}: {what}: expected a sha256 in hex, found {digest!r:.80}; export the model again."
            )
    if prefix.weights != manifest.files[WEIGHTS_FILE].sha256:
        raise PrecastError(
            f"{where}: its keys and values were computed with other weights; export the model again."
        )


def is_prefix_name(name: str) -> bool:
    """Return True if a name has 1 to 64 ASCII letters, digits, "-", "_" and ".", and does not begin with "."."""
    letters = name.translate(dict.fromkeys(map(ord, "-_.")))
    return (
        0 < len(name) <= LONGEST_PREFIX_NAME
        and name[0] != "."
        and name.isascii()
        and (not letters or letters.isalnum())
    )
