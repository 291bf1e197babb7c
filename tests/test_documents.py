"""The documents agree with the code: links, folders, commands, pictures and tables."""

import json
import re
import shlex
import sys
from pathlib import Path

import click
import pytest

from precast import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "artifacts" / "README.md"],
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def is_source(path: Path) -> bool:
    return path.is_dir() and path.name != "__pycache__" and any(p.is_file() for p in path.iterdir())


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the benchmarks, and make their modules importable by bare names."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    for module in ("picture", "models"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return folder


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r'\]\(([^)\s#]+)|(?:src|srcset)="([^"]+)"', text)
    relative = [a or b for a, b in links if not re.match(r"https?:", a or b)]
    assert [link for link in relative if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(("page", "depth"), [("docs/code.md", 3), ("CONTRIBUTING.md", 2)])
def test_every_folder_has_a_line(page: str, depth: int) -> None:
    text = (ROOT / page).read_text()
    folders = {
        p for top in ("exporter", "loaders") for p in (ROOT / top, *(ROOT / top).rglob("*")) if is_source(p)
    }
    folders |= {ROOT / top for top in ("kernels", "artifacts", "benchmarks", "deploy", "docs", "tests")}
    wanted = {name(p) for p in folders if len(p.relative_to(ROOT).parts) <= depth}
    assert len(wanted) > 10
    assert {folder for folder in wanted if f"| `{folder}/` |" not in text} == set()


NAMED = re.compile(r"`((?:\.ci|artifacts|benchmarks|deploy|docs|exporter|kernels|loaders|tests)/[\w./-]*)`")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_every_file_named_exists(page: Path) -> None:
    named = NAMED.findall(page.read_text())
    if page.name == "code.md":
        assert len(named) > 60
    assert [path for path in named if not (ROOT / path).exists()] == []


def command_lines() -> list[tuple[str, str]]:
    """Return each `precast …` line in a code block, with the name of its page."""
    found = []
    for page in PAGES:
        if page.name in ("LOG.md", "CHANGELOG.md"):  # these pages describe earlier versions
            continue
        for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL):
            lines = (line.partition(" # ")[0].removeprefix("$ ").strip() for line in block.splitlines())
            found += [(name(page), line) for line in lines if line.startswith("precast ")]
    return found


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_parse(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    command = cli.main.get_command(click.Context(cli.main), words[0])
    assert command is not None
    options = {text for p in command.params if isinstance(p, click.Option) for text in p.opts}
    used = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
    assert used <= options, f"{page}: {line}"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_shows_the_committed_results(benchmarks: Path, theme: str) -> None:
    import picture

    result = json.loads((benchmarks / "results" / "peers.json").read_text())
    drawn = (benchmarks / "results" / f"decode-and-start-{theme}.svg").read_text()
    assert drawn == picture.draw(result, picture.THEMES[theme])


def test_the_table_of_models_is_the_computed_one(benchmarks: Path) -> None:
    import models

    assert models.table() in (ROOT / "README.md").read_text()
