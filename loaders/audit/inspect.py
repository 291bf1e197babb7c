"""Describe an artifact from its manifest."""

import dataclasses
from typing import Any

from ..artifact.manifest import Manifest, Prefix, Program, Target


def describe(manifest: Manifest) -> dict[str, Any]:
    """Return the facts of a manifest in plain JSON types."""
    return {
        "name": manifest.name,
        "format_version": manifest.format_version,
        "model": dataclasses.asdict(manifest.model),
        "bits_per_weight": _bits_per_weight(manifest),
        "context": manifest.context,
        "slots": manifest.slots,
        "buckets": manifest.buckets,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "cache": {
            "bytes": sum(array.bytes for array in manifest.cache),
            "arrays": [dataclasses.asdict(array) for array in manifest.cache],
        },
        "targets": [_target(manifest, target) for target in manifest.targets],
        "prefixes": [_prefix(manifest, prefix) for prefix in manifest.prefixes],
        "sampling": manifest.sampling.given(),
        "fidelity": None if manifest.fidelity is None else dataclasses.asdict(manifest.fidelity),
        "provenance": dataclasses.asdict(manifest.provenance),
    }


def _bits_per_weight(manifest: Manifest) -> float:
    """Return the average number of bits for each parameter, including scales, minima and padding."""
    weights = {
        value.name: value.bytes
        for target in manifest.targets
        for program in target.programs
        for value in program.arguments
        if value.role == "weight"
    }
    return round(8 * sum(weights.values()) / manifest.model.parameters, 2)


def _target(manifest: Manifest, target: Target) -> dict[str, Any]:
    fields = (
        "name",
        "runtime",
        "platform",
        "device",
        "machine",
        "jaxlib",
        "cpu_features",
        "kernel_abi",
        "kernels",
        "stablehlo_expires",
    )
    facts = {key: getattr(target, key) for key in fields}
    return facts | {"programs": [_program(manifest, program) for program in target.programs]}


def _prefix(manifest: Manifest, prefix: Prefix) -> dict[str, Any]:
    size = manifest.files[prefix.file].bytes + manifest.files[prefix.arrays].bytes
    return dataclasses.asdict(prefix) | {"bytes": size}


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
