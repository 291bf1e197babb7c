"""The command ``precast verify``."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..artifact.errors import printable
from ..artifact.units import size_text
from ..progress import show_progress
from .command import local_folder

if TYPE_CHECKING:
    from ..artifact.manifest import Manifest
    from ..audit.prefixes import PrefixReport
    from ..audit.verify import FileReport, ReplayReport


def run(
    artifact: Path | str,
    *,
    target: str | None,
    allow_compile: bool,
    as_json: bool,
    require_signature: Path | None,
    threads: int | None,
) -> int:
    """Verify an artifact and print the result. If it differs, also print the first difference on standard error.

    Returns:
        The exit code: 0 if files and answers are as exported, 1 if they differ.

    Raises:
        PrecastError: there is no artifact, its format is unknown, or it does not run on this machine.
    """
    from ..artifact.files import read_checked
    from ..artifact.golden import parse_golden
    from ..audit.prefixes import replay_prefixes
    from ..audit.replayed import forget
    from ..audit.verify import check_files, replay
    from ..load import load
    from ..locate import find_artifact, read_manifest
    from ..runtime.installed import this_machine

    root = find_artifact(local_folder(artifact, require_signature))
    manifest = read_manifest(root, require_signature=require_signature)
    replayed = prefixes = None
    with show_progress() as display:
        files = check_files(root, manifest, display)
        # A file that differs must not reach a deserialiser.
        if not files.problems and not _in_savedmodel(manifest, files.unlisted):
            data = read_checked(root, manifest.golden, manifest.files[manifest.golden])
            golden = parse_golden(data, manifest, str(root / manifest.golden))
            model = load(
                root,
                target=target,
                allow_compile=allow_compile,
                require_signature=require_signature,
                threads=threads,
                log=display.log,
                progress=display,
            )
            replayed = replay(model, golden, str(root), display)
            prefixes = replay_prefixes(model, root, this_machine(cuda=False).isa, display)
    problems = _problems(root, files, replayed, prefixes)
    if problems:
        forget(manifest)  # or a server would load the artifact without a replay
    if as_json:
        print(_json_line(root, manifest, files, replayed, prefixes, problems))
    else:
        print("\n".join(map(printable, _lines(root, manifest, files, replayed, prefixes, problems))))
    if problems:
        more = f" ({len(problems) - 1} more differ)" if len(problems) > 1 else ""
        print(f"error: {printable(problems[0])}{more}", file=sys.stderr)
    return 1 if problems else 0


def _in_savedmodel(manifest: "Manifest", names: Iterable[str]) -> bool:
    """Return True if one of the files is in the folder of a SavedModel, because TensorFlow reads all files there."""
    folders = {
        PurePosixPath(program.executable).parent
        for target in manifest.targets
        if target.runtime == "savedmodel"
        for program in target.programs
        if program.executable is not None
    }
    return any(PurePosixPath(name).is_relative_to(folder) for name in names for folder in folders)


def _problems(
    root: Path, files: "FileReport", replayed: "ReplayReport | None", prefixes: "PrefixReport | None"
) -> list[str]:
    unlisted = [
        f"{root}: {name!r} is {'a link, and ' if (root / name).is_symlink() else ''}not listed in the manifest; remove"
        " it, or copy the artifact again."
        for name in files.unlisted
    ]
    replays = (report for report in (replayed, prefixes) if report is not None)
    return [*files.problems, *unlisted, *(problem for report in replays for problem in report.problems)]


def _json_line(
    root: Path,
    manifest: "Manifest",
    files: "FileReport",
    replayed: "ReplayReport | None",
    prefixes: "PrefixReport | None",
    problems: list[str],
) -> str:
    facts = {
        "name": manifest.name,
        "root": str(root),
        "ok": not problems,
        "files": dataclasses.asdict(files),
        "replay": None if replayed is None else dataclasses.asdict(replayed),
        "prefixes": None if prefixes is None else dataclasses.asdict(prefixes),
        "problems": problems,
    }
    return json.dumps(facts, allow_nan=False)


def _lines(
    root: Path,
    manifest: "Manifest",
    files: "FileReport",
    replayed: "ReplayReport | None",
    prefixes: "PrefixReport | None",
    problems: list[str],
) -> Iterator[str]:
    verdict = (
        "differs from what was exported" if problems else "is as exported: the same files, the same answers"
    )
    yield f"{manifest.name} {verdict}  ({root})"
    yield f"  files     {files.checked - len(files.problems)} of {files.checked} as listed, {size_text(files.bytes)}"
    if replayed is None:
        yield "  answers   not replayed, because files differ"
    else:
        yield f"  answers   {replayed.answers} prompts, {replayed.tokens} tokens, by target {replayed.target}"
        largest = "not finite" if replayed.difference is None else f"{replayed.difference:.2g}"
        share = "beyond" if replayed.share is None else f"{replayed.share:.0%} of"
        yield f"  logits    {replayed.logits} compared, largest difference {largest}, {share} the tolerance"
    for prefix in () if prefixes is None else prefixes.prefixes:
        verdict = "recomputed and compared" if prefix.obstacle is None else f"not compared: {prefix.obstacle}"
        yield f"  prefix    {prefix.name}: {prefix.tokens:,} tokens, {verdict}"
    for problem in problems:
        yield f"  ! {problem}"
