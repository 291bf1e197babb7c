"""``precast add-prefix`` and ``remove-prefix``: store the keys and values of a prefix in an artifact, or remove them.

A target computes the keys and values once, when the prefix is added. At run time, a prompt that begins with the
prefix's tokens needs prefill only for the tokens after the prefix. `artifact_changes` writes the result atomically: at
any moment the artifact is either the old or the new one.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from precast import kernels

from .artifact import files
from .artifact.errors import PrecastError
from .artifact.frozen import Frozen
from .artifact.manifest import FileEntry, Manifest, Prefix
from .artifact.manifest_parser import LONGEST_PREFIX_NAME, is_prefix_name
from .artifact.origin import is_reproducible, origin_of
from .artifact.weights import file_parts
from .artifact_changes import (
    PREFIXES,
    LockedArtifact,
    Parts,
    changing,
    free_folder,
    record_change,
    replace_manifest,
    write_files,
)
from .generation.model import Message, Model
from .generation.prefixes import PrefixTree
from .generation.state_file import stored_arrays
from .generation.stored_prefixes import tokens_json
from .load import load
from .locate import find_artifact

# Samples of text that may follow a prefix. A token that depends on this text is not part of the prefix.
_FOLLOWING = ("a", "The", " b", "\n", "0", ".", "é", "日")


class PrefixSource(Frozen):
    """The text of a prefix; exactly one of `system`, `chat` and `text` is given.

    Attributes:
        system: a system message, for chats that begin with it.
        chat: messages, oldest first, for chats that continue them.
        text: plain text, for prompts that begin with it.
        tools: JSON schemas of the functions that the model may call, for `system` and `chat`; None for no tools.
        template_variables: additional variables of the chat template, for `system` and `chat`.
    """

    system: str | None = None
    chat: Sequence[Message] | None = None
    text: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template_variables: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class PrefixChange:
    """The result of adding or removing a prefix.

    Attributes:
        prefix: the prefix, as the manifest describes it.
        bytes: total size of the prefix's files.
        has_replaced: True if the new prefix replaced a prefix of the same name.
        signature_removed: True if the change removed the artifact's signature.
    """

    prefix: Prefix
    bytes: int
    has_replaced: bool
    signature_removed: bool


def add_prefix(
    path: Path,
    name: str,
    source: PrefixSource,
    *,
    target: str | None = None,
    overwrite: bool = False,
    require_signature: Path | None = None,
    threads: int | None = None,
    log: Callable[[str], None],
) -> PrefixChange:
    """Compute the keys and values of a prefix, and store them in an artifact.

    Args:
        path: the artifact's folder, or a folder with exactly one artifact in it.
        name: the prefix's name: 1 to 64 letters, digits, "-", "_" and ".", not beginning with ".".
        source: the prefix's text.
        target: name of the target that computes the keys and values. Only this target can use them. None chooses the
            best target that runs here.
        overwrite: allow replacing a prefix of the same name.
        require_signature: file of the public key that must verify the artifact's signature before the change.
        threads: number of computing threads; one per usable core by default.
        log: receives a message before each stage.

    Raises:
        PrecastError: the name is invalid or taken, the text is empty or exceeds the context, the target cannot reuse
            keys and values, or the artifact is damaged or cannot be written to. The artifact is then unchanged.
    """
    _check_name(name)
    root = find_artifact(path)
    with changing(root, PREFIXES, require_signature, log) as (artifact, manifest):
        if name in {p.name for p in manifest.prefixes} and not overwrite:
            raise PrecastError(
                f"{root}: prefix {name!r} exists already; replace it with --overwrite, or choose another name."
            )
        model = load(
            root,
            target=target,
            require_signature=require_signature,
            threads=threads,
            prefix_memory=0,
            log=log,
        )
        if not is_reproducible(model.target):
            raise PrecastError(
                f"{root}: target {model.target.name!r} cannot reuse keys and values; choose a target with precast's"
                " CPU kernels (--target), or add one with precast add-target."
            )
        tokens = prefix_tokens(model, source)
        log(f"computing keys and values of {len(tokens)} tokens with target {model.target.name}")
        prefix, contents = _computed(artifact, manifest, model, name, tokens)
        return _store(artifact, manifest, prefix, contents)


def remove_prefix(
    path: Path, name: str, *, require_signature: Path | None = None, log: Callable[[str], None]
) -> PrefixChange:
    """Remove a prefix from an artifact.

    Raises:
        PrecastError: there is no such prefix, or the artifact is damaged or cannot be written to.
    """
    root = find_artifact(path)
    with changing(root, PREFIXES, require_signature, log) as (artifact, manifest):
        found = [p for p in manifest.prefixes if p.name == name]
        if not found:
            known = ", ".join(repr(p.name) for p in manifest.prefixes)
            remedy = f"choose one of its prefixes: {known}" if known else "add it with precast add-prefix"
            raise PrecastError(f"{root}: the artifact has no prefix {name!r}; {remedy}.")
        with record_change(artifact, _without(manifest, name)) as folder:
            was_signed = replace_manifest(artifact, folder)
        return PrefixChange(
            prefix=found[0],
            bytes=_size(manifest, found[0]),
            has_replaced=False,
            signature_removed=was_signed,
        )


def prefix_tokens(model: Model, source: PrefixSource) -> list[int]:
    """Return the tokens of a prefix that do not depend on the text after the prefix.

    Raises:
        PrecastError: the prefix has no tokens or fills the context, or the chat template rejects the messages.
    """
    prompts = [_prompt(model, source, following) for following in _FOLLOWING]
    tokens = _common_beginning(prompts)
    if not tokens:
        raise PrecastError("prefix: expected some text, found none; give a file that is not empty.")
    if len(tokens) >= model.engine.context:
        raise PrecastError(
            f"prefix: {len(tokens)} tokens leave no room in a context of {model.engine.context}; shorten it to"
            f" {model.engine.context - 1} or fewer, or export with a larger --context."
        )
    return tokens


def _prompt(model: Model, source: PrefixSource, following: str) -> list[int]:
    """Return the tokens of a prompt: the prefix, then the text `following` unless a user's message ends the prefix."""
    if source.text is not None:
        # With an empty text, the prefix would consist of the special tokens that begin every prompt.
        return model.tokenizer.encode(source.text + following) if source.text else []
    messages = [{"role": "system", "content": source.system}] if source.chat is None else list(source.chat)
    # A chat that ends with the user's message is already a complete prompt: the model's answer comes next.
    if not messages or messages[-1].get("role") != "user":
        messages.append({"role": "user", "content": following})
    return model.chat_prompt(messages, tools=source.tools, template_variables=source.template_variables)


def _common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    common = []
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        common.append(tokens[0])
    return common


def _check_name(name: str) -> None:
    if not is_prefix_name(name):
        raise PrecastError(
            f"prefix: expected a name of 1 to {LONGEST_PREFIX_NAME} letters, digits, '-', '_' or '.', not beginning"
            f" with '.', found {name!r:.80}; choose another name."
        )


def _computed(
    artifact: LockedArtifact, manifest: Manifest, model: Model, name: str, tokens: Sequence[int]
) -> tuple[Prefix, dict[str, Parts]]:
    """Compute a prefix's keys and values; return the prefix's entry in the manifest, and the contents of its files."""
    # This prefix tree is empty, so the result does not depend on the artifact's other prefixes.
    spans = PrefixTree(model.engine, 0).compute(tokens)
    folder = free_folder(artifact.root, PREFIXES, name, manifest.files)
    origin = origin_of(manifest, model.target, kernels.isa())
    prefix = Prefix(
        name=name,
        tokens=len(tokens),
        file=f"{folder}/tokens.json",
        arrays=f"{folder}/cache.safetensors",
        target=model.target.name,
        kernels=model.target.kernel_abi,
        isa=origin.isa,
        programs=origin.programs,
        weights=origin.weights,
    )
    arrays = file_parts(stored_arrays(spans, manifest.cache), {})
    return prefix, {prefix.file: [tokens_json(tokens)], prefix.arrays: arrays}


def _store(
    artifact: LockedArtifact, manifest: Manifest, prefix: Prefix, contents: Mapping[str, Parts]
) -> PrefixChange:
    kept = _without(manifest, prefix.name)
    changed = replace(
        kept,
        prefixes=(*kept.prefixes, prefix),
        files=dict(
            sorted({**kept.files, **{name: _entry(parts) for name, parts in contents.items()}}.items())
        ),
    )
    with record_change(artifact, changed) as folder:
        write_files(artifact, folder, contents)
        was_signed = replace_manifest(artifact, folder)
    # Record the hash, so that the next load does not hash the file again.
    files.record_hash(artifact.root / prefix.arrays, changed.files[prefix.arrays].sha256)
    return PrefixChange(
        prefix=prefix,
        bytes=_size(changed, prefix),
        has_replaced=len(kept.prefixes) < len(manifest.prefixes),
        signature_removed=was_signed,
    )


def _entry(parts: Parts) -> FileEntry:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return FileEntry(bytes=sum(map(len, parts)), sha256=digest.hexdigest())


def _without(manifest: Manifest, name: str) -> Manifest:
    """Return the manifest without a prefix and its files."""
    dropped = {file for p in manifest.prefixes if p.name == name for file in (p.file, p.arrays)}
    return replace(
        manifest,
        prefixes=tuple(p for p in manifest.prefixes if p.name != name),
        files={file: entry for file, entry in manifest.files.items() if file not in dropped},
    )


def _size(manifest: Manifest, prefix: Prefix) -> int:
    return manifest.files[prefix.file].bytes + manifest.files[prefix.arrays].bytes
