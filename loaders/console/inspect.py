"""The command ``precast inspect``."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..artifact.errors import printable
from ..artifact.units import size_text
from ..audit.inspect import describe
from ..compiling.isa import audience
from ..locate import find_artifact, read_manifest
from .command import local_folder


def run(artifact: Path | str, *, as_json: bool, require_signature: Path | None) -> int:
    """Print the description of an artifact.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: see `render`.
    """
    folder = local_folder(artifact, require_signature)
    print(render(folder, as_json=as_json, require_signature=require_signature))
    return 0


def render(path: Path, *, as_json: bool, require_signature: Path | None = None) -> str:
    """Return the description of the artifact at `path`, as lines of text or as one line of JSON.

    Raises:
        PrecastError: there is no artifact, it is not signed as required, or its format is unknown.
    """
    root = find_artifact(path)
    facts = describe(read_manifest(root, require_signature=require_signature))
    if as_json:
        return json.dumps(facts)
    # Names in a manifest may contain line breaks and control characters.
    return "\n".join(map(printable, lines(root, facts)))


def lines(root: Path, facts: dict[str, Any]) -> Iterable[str]:
    """Yield the lines of a description.

    Args:
        root: the artifact's folder.
        facts: the result of `describe`.
    """
    m = facts["model"]
    yield f"{facts['name']}  ({root}, format {facts['format_version']}, {size_text(facts['bytes'])})"
    yield (
        f"  model    {m['architecture']}: {m['parameters'] / 1e6:.1f} M parameters, L={m['layers']} D={m['width']}"
        f" N={m['heads']} K={m['kv_heads']} H={m['head_dim']} F={m['ff_width']} V={m['vocab']}, weights {m['weights']}"
        f" ({facts['bits_per_weight']:g} bits each)"
    )
    yield (
        f"  context  {facts['context']} positions, slots {facts['slots']}, prefill buckets"
        f" {', '.join(map(str, facts['buckets']))}"
    )
    total = facts["cache"]["bytes"]
    each = f", {size_text(total // facts['slots'])} a slot" if facts["slots"] > 1 else ""
    yield f"  cache    {size_text(total)} when full{each}{_saved(facts)}"
    for a in facts["cache"]["arrays"]:
        axes = " ".join(f"{letter}={size}" for letter, size in zip(a["axes"], a["shape"], strict=True))
        order = "".join(a["axes"][axis] for axis in a["layout"])
        window = f", a ring for a window of {a['window']}" if a["window"] else ""
        yield (
            f"    {a['name']:<14} {axes}  {a['dtype']}, {order} from slowest to fastest, {size_text(a['bytes'])},"
            f" layers {_ranges(a['layers'])}{window}"
        )
    for target in facts["targets"]:
        yield from _target_lines(target)
    for prefix in facts["prefixes"]:
        yield (
            f"  prefix   {prefix['name']}: {prefix['tokens']:,} tokens, {size_text(prefix['bytes'])}, by target"
            f" {prefix['target']} with kernels for {prefix['isa']}"
        )
    if facts["sampling"]:
        yield "  sampling " + ", ".join(map(_setting, facts["sampling"].items()))
    if facts["fidelity"]:
        yield from _fidelity_lines(facts["fidelity"])
    origin = facts["provenance"]
    yield f"  origin   {origin['source']}, licence {origin['licence'] or 'not stated'}, exported {origin['created']}"


def _setting(item: tuple[str, Any]) -> str:
    name, value = item
    if name == "stop":
        return f"stop {', '.join(map(repr, value))}"
    if isinstance(value, tuple):
        return f"{name} ({len(value)})"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _saved(facts: dict[str, Any]) -> str:
    """Format the memory that sliding windows save, in brackets; return "" if they save none."""
    arrays = facts["cache"]["arrays"]
    whole = sum(a["bytes"] // a["shape"][a["axes"].index("S")] * facts["context"] for a in arrays)
    saved = whole - facts["cache"]["bytes"]
    return f" ({size_text(saved)} less than without windows)" if saved else ""


def _ranges(layers: Sequence[int]) -> str:
    """Format layer numbers, with consecutive numbers as a range: "0-4,7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _fidelity_lines(f: dict[str, Any]) -> Iterable[str]:
    own, reference = (
        "beyond the range of a float" if f[key] is None else f"{f[key]:.4f}"
        for key in ("perplexity", "reference_perplexity")
    )
    yield (
        f"  fidelity perplexity {own}, of the source in float32 {reference}; KL divergence {f['kl_mean']:.3g} nats per"
        f" token, 99th percentile {f['kl_p99']:.3g}; same top token {f['top1']:.2%}"
    )
    yield f"           ({f['tokens']:,} predictions on {f['text']})"


def _target_lines(target: dict[str, Any]) -> Iterable[str]:
    runs = {
        "pjrt": f"jaxlib {target['jaxlib']}",
        "stablehlo": "compiled on request",
        "savedmodel": "TensorFlow",
    }
    needs = [runs[target["runtime"]]]
    needs += [f"kernels ABI {target['kernel_abi']}"] if target["kernel_abi"] else []
    yield f"  target   {target['name']}: {', '.join(needs)}; StableHLO promised until {target['stablehlo_expires']}"
    if (target["runtime"], target["platform"]) == ("pjrt", "cpu"):
        yield f"    runs on {audience(target['machine'], target['cpu_features'])}"
    head = ("program", "executable", "StableHLO", "FLOPs", "temporary", "cache aliased")
    yield from _table([head, *map(_program_row, target["programs"])])


def _program_row(program: dict[str, Any]) -> tuple[str, ...]:
    memory = program["memory"] or {}
    return (
        program["name"],
        size_text(program["executable_bytes"]),
        size_text(program["stablehlo_bytes"]),
        f"{program['flops'] / 1e9:.2f} G",
        size_text(memory.get("temporary")),
        size_text(memory.get("aliased")),
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Yield the rows of a table, with the first column aligned left and the others aligned right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "    " + "  ".join((first, *rest))
