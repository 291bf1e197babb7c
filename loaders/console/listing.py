"""The output of ``precast list``."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..artifact.errors import printable
from ..artifact.units import size_text
from ..audit.listing import Listed, artifacts_below

_HEAD = ("artifact", "model", "weights", "context", "size", "runs here")


def run(folder: Path, *, as_json: bool, require_signature: Path | None) -> None:
    """Print the artifacts below a folder.

    Raises:
        PrecastError: the folder does not exist.
    """
    found = list(artifacts_below(folder, require_signature=require_signature))
    if as_json:
        print(json.dumps([dataclasses.asdict(one) | {"path": str(one.path)} for one in found]))
    elif found:
        print("\n".join(lines(found)))
    else:
        print(printable(f"{folder}: no artifacts below it; precast export makes one"))


def lines(found: Sequence[Listed]) -> Iterator[str]:
    """Format a table of the artifacts, with the reason below each unreadable one."""
    rows = [_HEAD, *(_row(one) for one in found)]
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if len(row) > 1), strict=True)]
    problems = (None, *(one.problem for one in found))
    for row, problem in zip(rows, problems, strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        if problem is not None:
            yield f"  ! {printable(problem)}"


def _row(one: Listed) -> tuple[str, ...]:
    path = printable(str(one.path))
    if one.problem is not None:
        return (path,)
    count = one.parameters or 0
    size = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    here = printable(one.target) if one.target else "with --compile" if one.compiles else "no"
    model = printable(f"{one.name} ({one.architecture}, {size})")
    return (path, model, printable(str(one.weights)), str(one.context), size_text(one.bytes), here)
