"""Tools for attacks on an artifact: files with correct hashes, error messages, and a failing disk."""

import importlib.util
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def put() -> Callable[[Path, str, bytes], Path]:
    """Return a function that writes a file into an artifact and its correct hash into the manifest."""

    def write(root: Path, name: str, data: bytes) -> Path:
        path = root / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        manifest = json.loads((root / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
        (root / "manifest.json").write_text(json.dumps(manifest))
        return path

    return write


@pytest.fixture
def refusal(cli: Callable[..., Any]) -> Callable[..., str]:
    """Return a function that runs a command, which must fail in one sentence, and returns the sentence."""

    def run(*arguments: object, stdin: str = "") -> str:
        result = cli(*arguments, stdin=stdin)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        assert result.stdout == ""
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: ")
        return str(last.removeprefix("error: "))

    return run


@pytest.fixture
def run_refused(refusal: Callable[..., str]) -> Callable[..., str]:
    """Return a function like `refusal` for `precast run` with a prompt."""
    return lambda root, *options: refusal("run", root, "--ids", "7,200,31", "-n", "4", *options)


@pytest.fixture
def answers(cli: Callable[..., Any]) -> Callable[[Path], list[int]]:
    """Return a function that gives the token ids of the answer of `precast run`."""

    def run(root: Path) -> list[int]:
        result = cli("run", root, "--ids", "7,200,31", "-n", "4", "--ignore-eos", "--json")
        assert result.exit_code == 0, result.output
        return list(json.loads(result.stdout)["token_ids"])

    return run


@pytest.fixture(scope="session")
def disks() -> ModuleType:
    """Return the module with the failing disk."""
    spec = importlib.util.spec_from_file_location("failing_disk", Path(__file__).parent / "disk.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
