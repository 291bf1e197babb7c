"""The command ``precast check``."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..artifact.errors import printable
from ..artifact.units import size_text
from ..audit.check import SOON_DAYS, CheckReport, TargetReport, check
from .command import local_folder


def run(
    artifact: Path | str,
    *,
    target: str | None,
    allow_compile: bool,
    as_json: bool,
    require_signature: Path | None,
) -> int:
    """Compare an artifact with this machine and print the result.

    Returns:
        The exit code: 0 if the artifact runs here, else 1.

    Raises:
        PrecastError: there is no artifact, its format is unknown, or it has no target of the given name.
    """
    from ..locate import find_artifact, read_manifest
    from ..runtime.installed import this_machine
    from ..runtime.limits import threads_started
    from ..runtime.resources import limits, memory, processors

    root = find_artifact(local_folder(artifact, require_signature))
    manifest = read_manifest(root, require_signature=require_signature)
    cores = processors()
    report = check(
        root,
        manifest,
        this_machine(cuda=any(t.platform == "cuda" for t in manifest.targets)),
        cores,
        memory(),
        limits(threads_started(cores.threads)),
        datetime.now(UTC).date(),
        target=target,
        allow_compile=allow_compile,
    )
    if as_json:
        print(json.dumps(to_json(report, require_signature)))
    else:
        print("\n".join(map(printable, lines(report, require_signature))))
    return 0 if report.runs else 1


def to_json(report: CheckReport, key: Path | None = None) -> dict[str, Any]:
    """Return the report in plain JSON types.

    Args:
        report: result of the check.
        key: file of the public key that the signature was checked with; None if the signature was not checked.
    """
    facts = dataclasses.asdict(report)
    return {
        "runs": report.runs,
        **facts,
        "root": str(report.root),
        "need": facts["need"] | {"all": report.need.all},
        "signature_checked": key is not None,
    }


def lines(report: CheckReport, key: Path | None = None) -> Iterator[str]:
    """Yield the lines of the report as text: verdict, targets, machine, and remedies.

    Args:
        report: result of the check.
        key: as for `to_json`.
    """
    if report.runs:
        how = ", compiled first" if report.compiled else ""
        yield f"{report.name} runs here, as target {report.target}{how}  ({report.root})"
    else:
        yield f"{report.name} does not run here  ({report.root})"
    for target in report.targets:
        yield from _target_lines(target)
    for prefix in report.prefixes:
        used = "used" if prefix.obstacle is None else f"not used: {prefix.obstacle}"
        yield f"  prefix    {prefix.name}: {prefix.tokens:,} tokens, {used}"
    if report.cpus:
        yield f"  CPUs      {report.cpus}"
    yield from _machine_lines(report, key)
    for finding in (*report.problems, *report.notes):
        yield f"  ! {finding.problem}"
        yield f"      → {finding.remedy}"


def _target_lines(target: TargetReport) -> Iterable[str]:
    if target.runs:
        yield f"  target    {target.name}: fits"
        return
    yield f"  target    {target.name}: {'fits once it is compiled here' if target.compiles else 'does not fit'}"
    for finding in target.mismatches:
        # The line above already says that the target must be compiled.
        if finding.what != "compiling":
            yield f"    ! {finding.problem}"
        yield f"        → {finding.remedy}"


def _machine_lines(report: CheckReport, key: Path | None) -> Iterable[str]:
    need, memory, p = report.need, report.memory, report.processors
    parts = {"weights": need.weights, "cache": need.cache, "temporary": need.temporary}
    yield (
        f"  memory    needs {size_text(need.all)} ({', '.join(f'{k} {size_text(v)}' for k, v in parts.items())}),"
        f" {size_text(memory.available)} of {size_text(memory.limit)} available"
    )
    share = "" if p.quota is None else f", the container may keep {p.quota:g} of them busy"
    yield f"  threads   {p.threads}, on {p.usable} of {p.cores} cores{share}"
    if report.days_left >= SOON_DAYS:
        yield f"  StableHLO promised to compile until {report.expires}, {report.days_left} days"
    unchecked = "present, not checked" if report.signed else "none"
    yield f"  signature {unchecked if key is None else f'valid, by the key {key}'}"
