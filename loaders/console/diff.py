"""The command ``precast diff``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.errors import printable
from ..progress import show_progress
from .command import local_folder

if TYPE_CHECKING:
    from ..audit.diff import Change

# Maximum number of lines of a section in the text output. The JSON output contains all differences.
_MOST_LINES = 12
_MOST_CHARACTERS = 80
# If two lists differ in more items than this, the output gives only counts.
_MOST_ITEMS = 8


def run(before: Path | str, after: Path | str, *, as_json: bool, require_signature: Path | None) -> int:
    """Compare two artifacts and print the differences.

    Returns:
        The exit code: 0 without differences, else 1.

    Raises:
        PrecastError: a path is not an artifact, or an artifact cannot be read or is not signed as required.
    """
    from ..audit.diff import diff, to_json
    from ..locate import find_artifact, read_manifest

    a, b = (find_artifact(local_folder(artifact, require_signature)) for artifact in (before, after))
    with show_progress() as display:
        sections = diff(
            a,
            read_manifest(a, require_signature=require_signature),
            b,
            read_manifest(b, require_signature=require_signature),
            display,
        )
    same = not any(sections.values())
    print(json.dumps(to_json(sections)) if as_json else "\n".join(map(printable, lines(a, b, sections))))
    return 0 if same else 1


def lines(before: Path, after: Path, sections: "Mapping[str, Sequence[Change]]") -> Iterator[str]:
    """Yield the differences as lines of text that begin with + (new), - (gone) or ~ (changed)."""
    if not any(sections.values()):
        yield f"{before} and {after} are the same"
        return
    yield f"{before} → {after}"
    for name, changes in sections.items():
        if changes:
            yield f"  {name}: {len(changes)} difference{'' if len(changes) == 1 else 's'}"
            # Additions and removals first.
            ordered = sorted(changes, key=lambda c: not (c.is_addition or c.is_removal))
            yield from (f"    {_line(change)}" for change in ordered[:_MOST_LINES])
        if len(changes) > _MOST_LINES:
            yield f"    … and {len(changes) - _MOST_LINES} more (--json shows all)"
    yield f"  the same: {', '.join(name for name, changes in sections.items() if not changes) or 'nothing'}"


def _line(change: "Change") -> str:
    if change.is_addition:
        return f"+ {change.what}: {_text(change.after)}"
    if change.is_removal:
        return f"- {change.what}: {_text(change.before)}"
    if isinstance(change.before, list | tuple) and isinstance(change.after, list | tuple):
        return f"~ {change.what}: {_lists(change.before, change.after)}"
    return f"~ {change.what}: {_text(change.before)} → {_text(change.after)}"


def _lists(before: Sequence[Any], after: Sequence[Any]) -> str:
    """Format the items that differ between two lists, or both lists if only their order differs."""
    old, new = set(before), set(after)
    removed = [f"-{item}" for item in before if item not in new]
    added = [f"+{item}" for item in after if item not in old]
    if len(removed) + len(added) > _MOST_ITEMS:
        return f"{len(removed)} of {len(before)} gone, {len(added)} new"
    return " ".join((*removed, *added)) or f"{_text(before)} → {_text(after)}"


def _text(value: Any) -> str:
    text = "none" if value is None else "'" + value + "'" if value == "" else str(value)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
