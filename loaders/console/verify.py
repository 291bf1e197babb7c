"""What ``precast verify`` does and prints."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..artifact.errors import printable
from ..artifact.units import size_text
from ..progress import show_progress

if TYPE_CHECKING:
    from ..artifact.manifest import Manifest
    from ..audit.verify import Files, Replay
    from ..generation.model import Model


def run(
    path: Path,
    *,
    target: str | None,
    compile: bool,
    as_json: bool,
    require_signature: Path | None = None,
    threads: int | None = None,
) -> int:
    """Verifies the artifact at `path`, and prints what was found; one sentence on standard error where it differs.

    Returns:
        The exit code: 0 when it is what was exported and answers as it did, 1 when it differs.

    Raises:
        PrecastError: when there is no artifact, it is not understood, or it does not run on this machine.
    """
    from ..audit.verify import check_files
    from ..locate import find_artifact, read_manifest

    root = find_artifact(path)
    manifest = read_manifest(root, require_signature=require_signature)
    with show_progress() as progress:
        files = check_files(root, manifest, progress)
    # What is not what it should be reaches no deserialiser.
    refused = bool(files.problems) or _in_a_savedmodel(manifest, files.unlisted)

    def opened() -> "Model":
        from ..load import load

        return load(
            root, target=target, allow_compile=compile, require_signature=require_signature, threads=threads
        )

    played = None if refused else _replay(root, manifest, opened)
    problems = _problems(root, files, played)
    if as_json:
        facts = {
            "name": manifest.name,
            "root": str(root),
            "ok": not problems,
            "files": dataclasses.asdict(files),
            "replay": None if played is None else dataclasses.asdict(played),
            "problems": problems,
        }
        print(json.dumps(facts, allow_nan=False))
    else:
        print("\n".join(map(printable, _lines(root, manifest, files, played, problems))))
    if problems:
        more = f" ({len(problems) - 1} more differ)" if len(problems) > 1 else ""
        print(f"error: {printable(problems[0])}{more}", file=sys.stderr)
    return 1 if problems else 0


def _in_a_savedmodel(manifest: "Manifest", names: Iterable[str]) -> bool:
    """Whether one of these is below the folder of a SavedModel, of which TensorFlow reads whatever it finds."""
    folders = {
        PurePosixPath(program.executable).parent
        for target in manifest.targets
        if target.runtime == "savedmodel"
        for program in target.programs
        if program.executable is not None
    }
    return any(PurePosixPath(name).is_relative_to(folder) for name in names for folder in folders)


def _replay(root: Path, manifest: "Manifest", opened: "Callable[[], Model]") -> "Replay":
    from ..artifact.files import read_checked
    from ..artifact.golden import parse_golden
    from ..audit.verify import replay

    data = read_checked(root, manifest.golden, manifest.files[manifest.golden])
    golden = parse_golden(data, manifest, str(root / manifest.golden))
    model = opened()
    with show_progress() as progress:
        return replay(model, golden, str(root), progress)


def _problems(root: Path, files: "Files", played: "Replay | None") -> list[str]:
    beside = [
        f"{root}: {name!r} is {'a link, and ' if (root / name).is_symlink() else ''}not listed in the manifest; remove"
        " it, or copy the artifact again."
        for name in files.unlisted
    ]
    return [*files.problems, *beside, *(() if played is None else played.problems)]


def _lines(
    root: Path, manifest: "Manifest", files: "Files", played: "Replay | None", problems: list[str]
) -> Iterator[str]:
    verdict = (
        "is what was exported, and answers as it did" if not problems else "differs from what was exported"
    )
    yield f"{manifest.name} {verdict}  ({root})"
    yield f"  files     {files.checked - len(files.problems)} of {files.checked} as listed, {size_text(files.bytes)}"
    if played is None:
        yield "  answers   not asked for: nothing is run of files that differ"
    else:
        yield f"  answers   {played.answers} prompts, {played.tokens} tokens, by target {played.target}"
        largest = "no number" if played.difference is None else f"{played.difference:.2g}"
        share = "beyond" if played.share is None else f"{played.share:.0%} of"
        yield f"  logits    {played.logits} compared, largest difference {largest}, {share} what is allowed"
    for problem in problems:
        yield f"  ! {problem}"
