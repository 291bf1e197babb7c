"""The model card of an artifact (README.md): the model, its origin and licence, and how to run it."""

from precast.loaders.artifact.manifest import Fidelity, Manifest


def render(manifest: Manifest) -> str:
    """Return the model card as Markdown, without a list of targets, because `add-target` can add more later."""
    model, provenance = manifest.model, manifest.provenance
    version, files = provenance.versions.get("precast", ""), provenance.source_files
    sources = "\n".join(f"- `{name}`, sha256 `{entry.sha256}`" for name, entry in files.items())
    return f"""# {manifest.name}

An ahead-of-time compiled language model, written by precast {version} on {provenance.created}.

| | |
|---|---|
| model | {model.architecture}, {model.parameters / 1e6:.1f} million parameters, {model.layers} layers |
| weights | {model.weights} |
| context | {manifest.context} positions, {manifest.slots} {"slot" if manifest.slots == 1 else "slots"} |
| prefill buckets | {", ".join(map(str, manifest.buckets))} |
| compiled for | see `precast inspect .`; `precast check .` tells whether it runs on this machine |
| licence | {provenance.licence or "not stated by the source; ask the publisher of the model"} |
{_fidelity(manifest.fidelity) if manifest.fidelity else ""}
Run it from this folder, with precast installed; jax is not needed:

    precast run . --prompt "The capital of France is"

Made from:

{sources or "- weights in memory"}
"""


def _fidelity(fidelity: Fidelity) -> str:
    own, reference = (
        "beyond the range of a float" if perplexity is None else f"{perplexity:.4f}"
        for perplexity in (fidelity.perplexity, fidelity.reference_perplexity)
    )
    return f"""
Compared with the source in float32, on {fidelity.tokens:,} predicted tokens of {fidelity.text}:

| | |
|---|---|
| perplexity | {own} (float32: {reference}) |
| KL divergence | {fidelity.kl_mean:.3g} nats per token on average, 99th percentile {fidelity.kl_p99:.3g} |
| same most likely token | {fidelity.top1:.2%} |
"""
