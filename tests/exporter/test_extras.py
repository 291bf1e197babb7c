"""The exporter imports exactly the packages that it declares and checks for."""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.console.extras import need_export

ROOT = Path(__file__).resolve().parent.parent.parent
# Modules whose names differ from those of their packages.
MODULES = {"pyyaml": "yaml", "orbax-export": "orbax", "tensorflow-cpu": "tensorflow"}


def declared(requirements) -> set[str]:
    names = (re.match(r"[\w-]+", requirement)[0] for requirement in requirements)
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def imported() -> set[str]:
    """Return the top-level modules that the exporter's files import, also inside functions."""
    found = set()
    for path in (ROOT / "exporter").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"precast"}


@pytest.fixture
def missing(monkeypatch):
    """Return the packages that the error names if none of them is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PrecastError) as raised:
        need_export()
    names = re.fullmatch(
        r"exporting needs (.+), which are not installed: pip install 'precast\[export\]'", str(raised.value)
    )
    return set(names[1].split(", "))


def test_declared_imported_and_checked_are_the_same(missing):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert declared(extras["export"]) == missing
    # The loaders import TensorFlow for the exporter.
    beside = declared(extras["export-savedmodel"]) - {"precast"}
    assert imported() - declared(project["dependencies"]) == missing | beside
