"""Untrusted strings in an artifact: no command sends their control characters to a terminal."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

HOSTILE = "x\x1b]52;c;eA==\x07\x9b2J\r\x08\x7f\u202e\u2028\n"


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all strings in JSON."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from strings(inner, (*path, key))


def kind(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the kind of a path. The same code reads the strings of all programs, or of all files."""
    names = tuple("#" if isinstance(step, int) else step for step in path)
    return (*names[:1], "*", *names[2:]) if names[0] in ("files", "arrays") else names


def replaced(manifest: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    changed = json.loads(json.dumps(manifest))
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = HOSTILE
    return changed


def assert_shown_harmlessly(result: Any, what: object) -> None:
    lines = (result.stdout + result.stderr).split("\n")
    assert [line for line in lines if not line.isprintable()] == [], what


def test_strings_of_a_manifest(cli, tiny_artifact, artifact_copy):
    manifest = json.loads((tiny_artifact / "manifest.json").read_text())
    paths = {kind(path): path for path in strings(manifest)}
    assert len(paths) > 25
    commands = (
        ("inspect", artifact_copy),
        ("list", artifact_copy),
        ("diff", tiny_artifact, artifact_copy),
        ("check", artifact_copy),
        ("run", artifact_copy, "--ids", "7", "-n", "1", "--stats"),
    )
    shown = 0
    for path in paths.values():
        (artifact_copy / "manifest.json").write_text(json.dumps(replaced(manifest, path)))
        for command in commands:
            result = cli(*command)
            assert_shown_harmlessly(result, (command[0], path))
            shown += "�]52;c;eA==�" in result.output
    assert shown > 40


def test_names_of_an_artifact_and_its_folder(cli, tiny_artifact, artifact_copy, edit_manifest, tmp_path):
    edit_manifest(artifact_copy, lambda m: (m.update(name=HOSTILE), m["provenance"].update(source=HOSTILE)))
    folder = artifact_copy.rename(tmp_path / HOSTILE)
    (tmp_path / "prose.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12)
    text = ("--text", tmp_path / "prose.txt", "--tokens", "64", "--window", "64")
    for command in (
        ("eval", folder, *text),
        ("eval", tiny_artifact, *text, "--reference", folder),
        ("verify", folder),
        ("add-target", folder, "--target", "none"),
        ("push", folder, f"file://{tmp_path}/store/tiny"),
        ("pull", f"file://{tmp_path}/store/tiny", "-o", tmp_path / f"{HOSTILE}2"),
        ("list", tmp_path),
        ("run", tmp_path),
        ("run", folder, "-p", ""),
        ("run", tmp_path / f"{HOSTILE}.gguf", "-p", "x"),
    ):
        assert_shown_harmlessly(cli(*command), command)


def test_files_that_do_not_belong(cli, artifact_copy):
    (artifact_copy / HOSTILE).write_text("")
    result = cli("verify", artifact_copy)
    assert result.exit_code == 1
    assert_shown_harmlessly(result, "verify")


def test_what_an_export_quotes(capsys, monkeypatch, tmp_path):
    from precast.exporter import console
    from precast.exporter.options import ExportOptions

    def export(source: Any, path: Any, options: Any, *, log: Any, progress: Any) -> Any:
        log(f"  remark on {HOSTILE}")
        return SimpleNamespace(files={"weights.safetensors": SimpleNamespace(bytes=1)}, targets=())

    monkeypatch.setattr(console, "open_source", lambda _: SimpleNamespace(name=HOSTILE))
    monkeypatch.setattr(console, "export", export)
    console.run(HOSTILE, None, ExportOptions())
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "�]52;c;eA==�" in text
        assert all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("option", ["--target", "--require-signature"])
def test_options_are_quoted_harmlessly(cli, tiny_artifact, option):
    assert_shown_harmlessly(cli("run", tiny_artifact, "-p", "x", option, HOSTILE), option)
