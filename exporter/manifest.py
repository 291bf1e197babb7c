"""The manifest of a new artifact."""

import dataclasses
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from precast.loaders.artifact import files
from precast.loaders.artifact.json_records import to_json
from precast.loaders.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    CacheArray,
    FileEntry,
    Manifest,
    ModelInfo,
    Provenance,
    Target,
    TokenizerFiles,
)

from . import model_card, texts
from .plan import ExportPlan
from .programs import cache_arrays

GOLDEN_FILE = "golden.json"
_PACKAGES = ("precast", "jax", "jaxlib", "flax", "numpy", "gguf", "tokenizers")


def make_manifest(plan: ExportPlan, targets: Sequence[Target]) -> Manifest:
    """Return the manifest of a new artifact, still without its fidelity and its file hashes."""
    source = plan.source
    return Manifest(
        format_version=FORMAT_VERSION,
        name=source.name,
        model=_model_info(plan),
        capacity=plan.geometry.context,
        slots=plan.geometry.slots,
        buckets=plan.geometry.buckets,
        cache=_laid_out(cache_arrays(plan.spec.config, plan.geometry), targets[0]),
        targets=tuple(targets),
        tokenizer=TokenizerFiles(
            file=texts.TOKENIZER_FILE,
            chat_template=texts.TEMPLATE_FILE if source.chat_template is not None else None,
            named_templates=texts.named_files(source),
            bos_token=source.bos_token,
            eos_token=source.eos_token,
            eos_token_ids=source.eos_token_ids,
        ),
        sampling=plan.sampling,
        golden=GOLDEN_FILE,
        prefixes=(),
        provenance=Provenance(
            source=source.name,
            source_files={f.name: FileEntry(bytes=f.bytes, sha256=f.sha256) for f in source.files},
            licence=source.licence,
            created=plan.created.isoformat(),
            versions=_versions(),
        ),
        fidelity=None,
        files={},
    )


def write_manifest(folder: Path, manifest: Manifest, weights_sha256: str) -> Manifest:
    """Write the model card, then the manifest with the hash of every file in the folder.

    Args:
        folder: the artifact, complete except for these two files.
        manifest: the manifest from `make_manifest`; its `files` are replaced.
        weights_sha256: the hash of the weight file; reading that file again would take long.

    Returns:
        The manifest as written.

    Raises:
        OSError: a file cannot be written.
    """
    (folder / "README.md").write_text(model_card.render(manifest), encoding="utf-8")
    written = dataclasses.replace(manifest, files=files.hash_files(folder, {WEIGHTS_FILE: weights_sha256}))
    (folder / MANIFEST_FILE).write_text(to_json(written), encoding="utf-8")
    files.record_hash(folder / WEIGHTS_FILE, weights_sha256)
    return written


def _model_info(plan: ExportPlan) -> ModelInfo:
    c = plan.spec.config
    return ModelInfo(
        architecture=plan.spec.model_type,
        layers=c.layers,
        width=c.width,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        ff_width=c.ff_width,
        vocab=c.vocab,
        parameters=sum(p.size for p in plan.stored.parameters),
        weights=plan.weights,
        max_positions=c.max_positions,
    )


def _laid_out(arrays: Sequence[CacheArray], target: Target) -> tuple[CacheArray, ...]:
    """Return the arrays of the KV cache with the layouts that they have in a target's decode program."""
    layouts = {value.name: value.layout for value in target.of_kind("decode")[0].arguments}
    return tuple(dataclasses.replace(array, layout=layouts[array.name]) for array in arrays)


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect an artifact."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
