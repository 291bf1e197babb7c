"""The command ``precast list``."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.errors import printable
from ..artifact.units import size_text
from ..audit.listing import ListEntry, artifacts_below

if TYPE_CHECKING:
    from ..audit.prefixes import PrefixStatus

_HEAD = ("artifact", "model", "weights", "context", "size", "runs here", "prefixes")


def run(folder: Path, *, as_json: bool, require_signature: Path | None) -> int:
    """Print the artifacts below a folder.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: the folder does not exist.
    """
    entries = list(artifacts_below(folder, require_signature=require_signature))
    if as_json:
        print(json.dumps([dataclasses.asdict(entry) | {"path": str(entry.path)} for entry in entries]))
    elif entries:
        print("\n".join(lines(entries)))
    else:
        print(printable(f"{folder}: no artifacts below this folder; make one with precast export"))
    return 0


def lines(entries: Sequence[ListEntry]) -> Iterator[str]:
    """Yield the lines of a table of artifacts. An artifact that cannot be read is followed by a line with the error."""
    rows = [_HEAD, *(_row(entry) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if len(row) > 1), strict=True)]
    problems = (None, *(entry.problem for entry in entries))
    for row, problem in zip(rows, problems, strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        if problem is not None:
            yield f"  ! {printable(problem)}"


def _row(entry: ListEntry) -> tuple[str, ...]:
    path = printable(str(entry.path))
    if entry.problem is not None:
        return (path,)
    count = entry.parameters or 0
    size = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    here = printable(entry.target) if entry.target else "with --compile" if entry.compiles else "no"
    model = printable(f"{entry.name} ({entry.architecture}, {size})")
    weights, context = printable(str(entry.weights)), str(entry.context)
    prefixes = ", ".join(map(_prefix, entry.prefixes or ()))
    return (path, model, weights, context, size_text(entry.bytes), here, printable(prefixes))


def _prefix(prefix: "PrefixStatus") -> str:
    unused = "" if prefix.obstacle is None else ", not used here"
    return f"{prefix.name} ({prefix.tokens:,} tokens{unused})"
