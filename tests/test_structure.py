"""The structure of the code: no import cycle, short functions and files, empty __init__ files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("exporter", "loaders", "kernels", "tests")
LONGEST_FUNCTION, LONGEST_FILE = 60, 500
# start.py imports cli.py, and cli.py imports start.py if it is run as a file.
CYCLES = {frozenset({"precast.cli", "precast.start"})}


def sources(*endings: str) -> list[Path]:
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in endings)
    return sorted(path for path in files if "__pycache__" not in path.parts)


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    first = function.body[0]
    docstring = 0
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno:
        docstring = first.end_lineno - first.lineno + 1
    assert function.end_lineno
    return function.end_lineno - function.lineno + 1 - docstring


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def components(edges: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that import each other, directly or through others."""
    reached = {}
    for start in edges:
        seen, waiting = set(), [start]
        while waiting:
            for module in edges[waiting.pop()] - seen:
                seen.add(module)
                waiting.append(module)
        reached[start] = seen
    cycles = ({a, *(b for b in reached[a] if a in reached[b])} for a in edges if a in reached[a])
    return [set(cycle) for cycle in {frozenset(cycle) for cycle in cycles}]


def test_no_module_imports_itself_through_others() -> None:
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("precast", exclude_type_checking_imports=True, cache_dir=None)
    # A package that imports its extension module would count as importing itself.
    edges = {name: graph.find_modules_directly_imported_by(name) - {name} for name in graph.modules}
    assert len(edges) > 100
    assert [sorted(cycle) for cycle in components(edges) if cycle not in CYCLES] == []


def test_cycles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": {"e"}}
    assert sorted(map(sorted, components(edges))) == [["b", "c"], ["e"]]


def test_functions_are_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}": lines_of(function)
        for path in sources(".py")
        for function in functions(path)
        if lines_of(function) > LONGEST_FUNCTION
    }
    assert long == {}


def test_files_are_short() -> None:
    lengths = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for path in sources(".py", ".cc", ".h", ".inc")
    }
    assert {str(path): length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_init_files_of_the_loaders_are_empty() -> None:
    """Each file would run at every start."""
    files = list((ROOT / "loaders").rglob("__init__.py"))
    assert len(files) > 5
    assert [str(path.relative_to(ROOT)) for path in files if path.read_text()] == []
