"""What ``precast diff`` prints."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.errors import printable
from ..progress import show_progress

if TYPE_CHECKING:
    from ..audit.diff import Change

# Lines of a section that people are shown; JSON has them all.
_MOST = 12
_LONGEST = 80
# Items of two lists that are shown rather than counted.
_ITEMS = 8


def run(before: Path, after: Path, *, as_json: bool, require_signature: Path | None = None) -> int:
    """Compare two artifacts and print the differences.

    Returns:
        The exit code: 0 without differences, else 1.

    Raises:
        PrecastError: one of them is not an artifact, is not signed as required, or cannot be read.
    """
    from ..audit.diff import diff, to_json
    from ..locate import find_artifact, read_manifest

    a, b = (find_artifact(path) for path in (before, after))
    with show_progress() as progress:
        sections = diff(
            a,
            read_manifest(a, require_signature=require_signature),
            b,
            read_manifest(b, require_signature=require_signature),
            progress,
        )
    same = not any(sections.values())
    print(json.dumps(to_json(sections)) if as_json else "\n".join(map(printable, lines(a, b, sections))))
    return 0 if same else 1


def lines(before: Path, after: Path, sections: "Mapping[str, Sequence[Change]]") -> Iterator[str]:
    """The differences for people: + is new, - is gone, ~ has changed."""
    from ..audit.diff import ABSENT

    if not any(sections.values()):
        yield f"{before} and {after} are the same"
        return
    yield f"{before} → {after}"
    for name, changes in sections.items():
        if changes:
            yield f"  {name}: {len(changes)} difference{'' if len(changes) == 1 else 's'}"
            # What is new and what is gone first.
            ordered = sorted(changes, key=lambda c: ABSENT not in (c.before, c.after))
            yield from (f"    {_line(change)}" for change in ordered[:_MOST])
        if len(changes) > _MOST:
            yield f"    … and {len(changes) - _MOST} more (--json shows all)"
    yield f"  the same: {', '.join(name for name, changes in sections.items() if not changes) or 'nothing'}"


def _line(change: "Change") -> str:
    from ..audit.diff import ABSENT

    if change.before is ABSENT:
        return f"+ {change.what}: {_text(change.after)}"
    if change.after is ABSENT:
        return f"- {change.what}: {_text(change.before)}"
    if isinstance(change.before, list | tuple) and isinstance(change.after, list | tuple):
        return f"~ {change.what}: {_lists(change.before, change.after)}"
    return f"~ {change.what}: {_text(change.before)} → {_text(change.after)}"


def _lists(before: Sequence[Any], after: Sequence[Any]) -> str:
    """Two lists: what is gone and what is new, or both where only their order differs."""
    old, now = set(before), set(after)
    gone = [f"-{item}" for item in before if item not in now]
    new = [f"+{item}" for item in after if item not in old]
    if len(gone) + len(new) > _ITEMS:
        return f"{len(gone)} of {len(before)} gone, {len(new)} new"
    return " ".join((*gone, *new)) or f"{_text(before)} → {_text(after)}"


def _text(value: Any) -> str:
    text = "none" if value is None else "'" + value + "'" if value == "" else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
