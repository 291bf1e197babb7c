"""The README.md of an artifact: what it is, made from what, under which licence, how to run it."""

from precast.loaders.artifact.manifest import Fidelity, Manifest


def render(manifest: Manifest) -> str:
    """The model card as Markdown; a function of the manifest alone, but of no target: those may be added later."""
    m, p = manifest.model, manifest.provenance
    sources = "\n".join(f"- `{name}`, sha256 `{entry.sha256}`" for name, entry in p.source_files.items())
    return f"""# {manifest.name}

An ahead-of-time compiled language model, written by precast {p.versions.get("precast", "")} on {p.created}.

| | |
|---|---|
| model | {m.architecture}, {m.parameters / 1e6:.1f} million parameters, {m.layers} layers |
| weights | {m.weights} |
| context | {manifest.context} positions, {manifest.slots} {"slot" if manifest.slots == 1 else "slots"} |
| prefill buckets | {", ".join(map(str, manifest.buckets))} |
| compiled for | see `precast inspect .`; `precast check .` says whether it runs on a machine |
| licence | {p.licence or "not stated by the source; ask whoever published the model"} |
{_fidelity(manifest.fidelity) if manifest.fidelity else ""}
Run it in this folder, where precast is installed; jax is not needed:

    precast run . --prompt "The capital of France is"

Made from:

{sources or "- weights in memory"}
"""


def _fidelity(f: Fidelity) -> str:
    own, reference = (
        "more than a float holds" if p is None else f"{p:.4f}" for p in (f.perplexity, f.reference_perplexity)
    )
    return f"""
Measured against the source in float32, on {f.tokens:,} predictions of {f.text}:

| | |
|---|---|
| perplexity | {own} (float32: {reference}) |
| KL divergence | {f.kl_mean:.3g} nats per token on average, 99th percentile {f.kl_p99:.3g} |
| same likeliest token | {f.top1:.2%} |
"""
