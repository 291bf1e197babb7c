"""The prefixes stored in an artifact: their files, and the conditions under which a target may use them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..artifact import files
from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen
from ..artifact.json_records import parse_json
from ..artifact.manifest import Manifest, Prefix, Target
from ..artifact.origin import is_reproducible, origin_of
from ..artifact.weights import map_weights
from .kv_state import Span
from .state_file import checked_spans

_REMEDY = "remove the prefix with precast remove-prefix, and add it again"


class StoredPrefix(Frozen):
    """A prefix from the artifact.

    Attributes:
        name: the name of the prefix.
        tokens: the tokens of the prefix.
        spans: keys and values by array, mapped from the file.
        watch: the detector of later writes to the file.
    """

    name: str
    tokens: tuple[int, ...]
    spans: Mapping[str, Span]
    watch: files.Watch


def obstacle(prefix: Prefix, manifest: Manifest, target: Target, isa: str) -> str | None:
    """Return the reason why a target must not use a prefix, without a full stop; None if the target may use it.

    A target may use a prefix only if it would compute the same bits. This requires that the same target computed the
    prefix with the same kernels.

    Args:
        prefix: the prefix.
        manifest: the artifact's manifest.
        target: the target that runs.
        isa: the instruction set of the machine's kernels.
    """
    if target.name != prefix.target:
        return f"target {prefix.target!r} computed it, but target {target.name!r} runs here"
    origin = origin_of(manifest, target, isa)
    if not is_reproducible(target):
        return f"executables of target {prefix.target!r} computed it, but programs compiled here may differ"
    if (origin.programs, origin.weights) != (prefix.programs, prefix.weights):
        return f"other programs of target {prefix.target!r}, or other kernels, computed it"
    if target.kernel_abi != prefix.kernels:
        return f"kernels of ABI {prefix.kernels} computed it, but the target calls ABI {target.kernel_abi}"
    if isa != prefix.isa:
        return f"kernels for {prefix.isa} computed it, but this machine's kernels use {isa}"
    return None


def usable(manifest: Manifest, target: Target, isa: str) -> tuple[list[Prefix], list[tuple[Prefix, str]]]:
    """Return the prefixes that a target may use, and all other prefixes in pairs with their obstacles."""
    pairs = [(prefix, obstacle(prefix, manifest, target, isa)) for prefix in manifest.prefixes]
    return [p for p, reason in pairs if reason is None], [(p, r) for p, r in pairs if r is not None]


def open_prefix(root: Path, manifest: Manifest, prefix: Prefix, *, rehash: bool = False) -> StoredPrefix:
    """Check a prefix's files and map its keys and values.

    Args:
        root: the artifact's folder.
        manifest: the artifact's manifest.
        prefix: the prefix.
        rehash: hash the keys and values again, even if they were hashed before and are unchanged.

    Raises:
        PrecastError: a file differs from its hash in the manifest, or its contents do not fit the prefix.
    """
    where = str(root / prefix.file)
    data = files.read_checked(root, prefix.file, manifest.files[prefix.file])
    tokens = _tokens(parse_json(data, where, _REMEDY), prefix, manifest.model.vocab, where)
    with files.open_checked(root, prefix.arrays, manifest.files[prefix.arrays], rehash=rehash) as file:
        tensors, watch = map_weights(file), files.Watch(file)
    spans = checked_spans(str(root / prefix.arrays), tensors, manifest.cache, len(tokens), _REMEDY)
    return StoredPrefix(name=prefix.name, tokens=tokens, spans=spans, watch=watch)


def tokens_json(tokens: Sequence[int]) -> bytes:
    """Return the contents of the file with a prefix's tokens."""
    return json.dumps(list(tokens)).encode()


def _tokens(value: object, prefix: Prefix, vocab: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != prefix.tokens:
        found = len(value) if isinstance(value, list) else "something else"
        raise PrecastError(
            f"{where}: expected a list of {prefix.tokens} token ids, found {found}; {_REMEDY}."
        )
    for token in value:
        if type(token) is not int or not 0 <= token < vocab:
            raise PrecastError(
                f"{where}: expected token ids from 0 to {vocab - 1}, found {token!r:.40}; {_REMEDY}."
            )
    return tuple(value)
