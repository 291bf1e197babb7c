"""Pages and pictures from outside docs/ for the site, with links that work in the repository and on the site alike."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

# Pages by their path in the repository, and their names on the site.
PAGES = {
    "artifacts/README.md": "format.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
RESULTS = "benchmarks/results"

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

    return _LINK.sub(translated, markdown)


def _on_site(path: str) -> str:
    """Return the site's name of a file of the repository."""
    if path.startswith(f"{RESULTS}/"):
        return f"results/{path.removeprefix(f'{RESULTS}/')}"
    return PAGES.get(path, path.removeprefix("docs/"))
