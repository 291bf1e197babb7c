"""What ``precast inspect`` shows: an artifact's manifest, for people and as JSON."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..artifact.errors import printable
from ..artifact.manifest import Manifest, Program, Target
from ..artifact.units import size_text
from ..compiling.isa import audience
from ..locate import find_artifact, read_manifest


def render(path: Path, *, as_json: bool, require_signature: Path | None = None) -> str:
    """Describe the artifact at `path`.

    Raises:
        PrecastError: there is no artifact, it is not signed as required, or its format is unknown.
    """
    root = find_artifact(path)
    facts = gather(read_manifest(root, require_signature=require_signature))
    if as_json:
        return json.dumps(facts)
    # Names may hold line breaks and commands to a terminal.
    return "\n".join(map(printable, _lines(root, facts)))


def gather(manifest: Manifest) -> dict[str, Any]:
    """Everything `render` shows, in plain JSON types."""
    return {
        "name": manifest.name,
        "format_version": manifest.format_version,
        "model": dataclasses.asdict(manifest.model),
        "context": manifest.context,
        "slots": manifest.slots,
        "buckets": manifest.buckets,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "cache": {
            "bytes": sum(array.bytes for array in manifest.cache),
            "arrays": [dataclasses.asdict(array) for array in manifest.cache],
        },
        "targets": [_target(manifest, target) for target in manifest.targets],
        "sampling": manifest.sampling.given(),
        "fidelity": None if manifest.fidelity is None else dataclasses.asdict(manifest.fidelity),
        "provenance": dataclasses.asdict(manifest.provenance),
    }


def _target(manifest: Manifest, target: Target) -> dict[str, Any]:
    plain = (
        "name",
        "runtime",
        "platform",
        "device",
        "machine",
        "jaxlib",
        "cpu_features",
        "kernel_abi",
        "kernels",
    )
    facts = {key: getattr(target, key) for key in (*plain, "stablehlo_expires")}
    return facts | {"programs": [_program(manifest, program) for program in target.programs]}


def _program(manifest: Manifest, program: Program) -> dict[str, Any]:
    def size(name: str | None) -> int | None:
        return None if name is None else manifest.files[name].bytes

    return {
        "name": program.name,
        "executable_bytes": size(program.executable),
        "stablehlo_bytes": size(program.stablehlo),
        "flops": program.flops,
        "memory": None if program.memory is None else dataclasses.asdict(program.memory),
    }


def _lines(root: Path, facts: dict[str, Any]) -> Iterable[str]:
    m = facts["model"]
    yield f"{facts['name']}  ({root}, format {facts['format_version']}, {size_text(facts['bytes'])})"
    yield (
        f"  model    {m['architecture']}: {m['parameters'] / 1e6:.1f} M parameters, L={m['layers']} D={m['width']}"
        f" N={m['heads']} K={m['kv_heads']} H={m['head_dim']} F={m['ff_width']} V={m['vocab']}, weights {m['weights']}"
    )
    yield (
        f"  context  {facts['context']} positions, slots {facts['slots']}, prefill buckets"
        f" {', '.join(map(str, facts['buckets']))}"
    )
    yield f"  cache    {size_text(facts['cache']['bytes'])} when full{_saved(facts)}"
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
    """What windows save, for people."""
    arrays = facts["cache"]["arrays"]
    whole = sum(a["bytes"] // a["shape"][a["axes"].index("S")] * facts["context"] for a in arrays)
    saved = whole - facts["cache"]["bytes"]
    return f" ({size_text(saved)} less than without windows)" if saved else ""


def _ranges(layers: Sequence[int]) -> str:
    """Layers, with runs of neighbours as "0-4"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _fidelity_lines(f: dict[str, Any]) -> Iterable[str]:
    own, reference = (
        "beyond a float" if f[key] is None else f"{f[key]:.4f}"
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
    rows: list[Sequence[str]] = [
        ("program", "executable", "StableHLO", "FLOPs", "temporary", "cache aliased")
    ]
    for p in target["programs"]:
        memory = p["memory"] or {}
        rows.append(
            (
                p["name"],
                size_text(p["executable_bytes"]),
                size_text(p["stablehlo_bytes"]),
                f"{p['flops'] / 1e9:.2f} G",
                size_text(memory.get("temporary")),
                size_text(memory.get("aliased")),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "    " + "  ".join((first, *rest))
