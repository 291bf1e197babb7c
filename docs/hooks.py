"""Complete the site: pages and pictures from outside docs/, links to them, and the reference of the command line.

Links work in the repository and on the site alike.
"""

import ast
import inspect
import posixpath
import re
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from precast import cli

ROOT = Path(__file__).parents[1]

# Pages by their path in the repository, and their names on the site.
PAGES = {
    "artifacts/README.md": "format.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
RESULTS = "benchmarks/results"
# Places of generated text.
COMMANDS = "<!-- commands -->"
MODULES = "<!-- modules -->"

_LINK = re.compile(r'(?<=\]\()[^)\s#]+|(?<=src=")[^"]+|(?<=srcset=")[^"]+')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and results that lie outside docs/."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    for result in sorted((ROOT / RESULTS).rglob("*.*")):
        path = result.relative_to(ROOT).as_posix()
        files.append(File.generated(config, _on_site(path), abs_src_path=str(result)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translate links between files of the repository to links between files of the site."""
    name = page.file.src_uri
    source = next((path for path, site_name in PAGES.items() if site_name == name), f"docs/{name}")
    is_raw = re.compile(r"https?:|mailto:|/")

    def translated(match: re.Match[str]) -> str:
        link = match[0]
        if is_raw.match(link):
            return link
        in_html = markdown[match.start() - 1] == '"'
        target = _on_site(posixpath.normpath(posixpath.join(posixpath.dirname(source), link)))
        # HTML is not translated by MkDocs: its links start at the page's own folder on the site.
        folder = page.file.url if in_html else posixpath.dirname(name)
        return posixpath.relpath(target, folder or ".")

    return (
        _LINK.sub(translated, markdown)
        .replace(COMMANDS, command_reference(cli.main))
        .replace(MODULES, modules())
    )


def command_reference(group: click.Group) -> str:
    """Return the reference of a group's commands in Markdown: usage, help, and a table of options."""
    parent = click.Context(group, info_name="precast")
    return "\n\n".join(_section(group.commands[name], parent) for name in group.list_commands(parent))


def modules() -> str:
    """Return a table of all modules and kernel files, each with its first sentence."""
    paths = [path for top in ("exporter", "loaders", "kernels") for path in sorted((ROOT / top).rglob("*.*"))]
    rows = ((path, _purpose(path)) for path in paths if path.suffix in (".py", ".cc", ".h", ".inc"))
    lines = [f"| `{path.relative_to(ROOT).as_posix()}` | {_cell(text)} |" for path, text in rows if text]
    return "\n".join(["| file | purpose |", "|---|---|", *lines])


def _purpose(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].replace("\n", " ")
    comment = re.match(r"(?://.*\n)*", text)
    sentence = re.sub(r"\n?// ?", " ", comment[0] if comment else "").strip()
    return sentence.partition(". ")[0].rstrip(".") + "." if sentence else ""


def _section(command: click.Command, parent: click.Context) -> str:
    context = click.Context(command, info_name=command.name, parent=parent)
    options = [p.get_help_record(context) for p in command.params if isinstance(p, click.Option)]
    rows = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in filter(None, options)]
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"## precast {command.name}", f"```\n{usage}\n```", inspect.cleandoc(command.help or "")]
    return "\n\n".join([*parts, "\n".join(["| option | meaning |", "|---|---|", *rows])])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _on_site(path: str) -> str:
    """Return the site's name of a file of the repository."""
    if path.startswith(f"{RESULTS}/"):
        return f"results/{path.removeprefix(f'{RESULTS}/')}"
    return PAGES.get(path, path.removeprefix("docs/"))
