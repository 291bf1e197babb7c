"""The package from a user's point of view: typed, run as a module, and run from a clone without installation."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import precast

ROOT = Path(__file__).resolve().parent.parent
USER = """
import asyncio
import precast

model = precast.load("artifact", threads=2)
reveal_type(model)
done = model.generate("text", precast.SamplingParams(max_tokens=16))
reveal_type(done.text)
reveal_type(done.timing.decode_tokens_per_s)
with model.stream([1, 2]) as stream:
    for piece in stream:
        reveal_type(piece)
    reveal_type(stream.completion)

async def use() -> None:
    async with model.stream("text") as stream:
        async for piece in stream:
            reveal_type(piece)

try:
    model.chat([{"role": "user", "content": "hi"}])
except precast.PrecastError:
    pass
model.generate(5)
precast.no_such_name
"""


def run(*arguments: object, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **environment},
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the package as setuptools installs it, without the kernels."""
    folder = tmp_path_factory.mktemp("installed")
    code = (
        "import runpy, sys, setuptools; sys.argv[1:] = ['-q', 'build_py', '--build-lib', sys.argv[1]]\n"
        "setuptools.Extension = lambda *a, **k: None\n"
        "setuptools.setup(ext_modules=[])"
    )
    result = run("-c", code, folder, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_user_s_program_sees_the_types(installed: Path, tmp_path: Path) -> None:
    """mypy uses an installed package's types only if it finds py.typed."""
    (tmp_path / "user.py").write_text(USER)
    packages = tmp_path / "venv/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "venv"], cwd=tmp_path, check=True)
    shutil.copytree(installed / "precast", packages / "precast")
    options = (
        "--python-executable",
        tmp_path / "venv/bin/python",
        "--follow-imports",
        "silent",
        "--no-color-output",
    )
    result = run("-m", "mypy", *options, "--cache-dir", tmp_path / "cache", "user.py", cwd=tmp_path)
    revealed = [line.split('"')[1] for line in result.stdout.splitlines() if "Revealed type" in line]
    completion = "precast.loaders.generation.stream.Completion"
    assert [name.removeprefix("builtins.") for name in revealed] == [
        "precast.loaders.generation.model.Model", "str", "float", "str", completion, "str",
    ], result.stdout  # fmt: skip
    errors = [line for line in result.stdout.splitlines() if "error:" in line]
    assert [error.rpartition("[")[2] for error in errors[:1]] == ["arg-type]"], result.stdout
    assert (packages / "precast/py.typed").is_file()


@pytest.mark.parametrize("folder", ["loaders/audit/data", "loaders/serving/static"])
def test_files_besides_code_are_installed(installed: Path, folder: str) -> None:
    names = sorted(path.name for path in (ROOT / folder).iterdir())
    assert len(names) > 1
    assert sorted(path.name for path in (installed / "precast" / folder).iterdir()) == names


def test_every_public_name_is_there() -> None:
    for name in precast.__all__:
        assert getattr(precast, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = precast.no_such_name


def test_python_m_precast_is_the_command_line(tmp_path: Path) -> None:
    result = run("-m", "precast", "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage: python -m precast [OPTIONS] COMMAND [ARGS]...")


def test_a_checkout_on_the_path_does_not_break_transformers() -> None:
    """transformers checks if a package named kernels exists, and finds this project's folder of that name."""
    code = "import transformers; transformers.AutoTokenizer; import kernels; print(kernels.__file__)"
    result = run("-c", code, cwd=ROOT, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{ROOT / 'kernels' / '__init__.py'}\n"


# --- a clone --------------------------------------------------------------------------------------------------

# Code that hides only the installed precast from a process.
ALONE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Make a checkout named precast, with built kernels."""
    folder = tmp_path / "precast"
    folder.mkdir()
    for file in ("__init__.py", "__main__.py", "cli.py", "start.py"):
        shutil.copy(ROOT / file, folder)
    for name in ("loaders", "kernels", "exporter"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "src"))
    return folder


def test_a_clone_beside_the_script_works(clone: Path, tiny_artifact: Path, own_cache: Path) -> None:
    script = clone.parent / "script.py"
    script.write_text(
        f"{ALONE}import precast\nassert precast.__file__ == {str(clone / '__init__.py')!r}, precast.__file__\n"
        f"print(len(precast.load({str(tiny_artifact)!r}).generate('the cat', precast.SamplingParams(max_tokens=3,"
        " ignore_eos=True)).token_ids))\n"
    )
    result = run(script, cwd=clone.parent, PRECAST_CACHE=str(own_cache))
    assert (result.returncode, result.stdout, result.stderr) == (0, "3\n", "")


@pytest.mark.parametrize("how", ["-m precast", "precast/cli.py"])
def test_a_clone_runs_commands(clone: Path, tiny_artifact: Path, own_cache: Path, how: str) -> None:
    code = (
        f"{ALONE}import runpy\n"
        f"sys.argv = ['x', 'run', {str(tiny_artifact)!r}, '--ids', '7,200,31', '-n', '3', '--json']\n"
    )
    if how == "-m precast":
        code += "runpy.run_module('precast', run_name='__main__', alter_sys=True)"
    else:
        code += (
            f"sys.path[0] = {str(clone)!r}\nrunpy.run_path({str(clone / 'cli.py')!r}, run_name='__main__')"
        )
    result = run("-c", code, cwd=clone.parent, PRECAST_CACHE=str(own_cache))
    assert result.returncode == 0, result.stderr
    assert '"token_ids"' in result.stdout


def test_a_clone_whose_kernels_are_not_built_says_so(clone: Path, tiny_artifact: Path) -> None:
    for library in (clone / "kernels").glob("_kernels*.so"):
        library.unlink()
    result = run("-m", "precast", "run", tiny_artifact, "-p", "x", cwd=clone.parent)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: precast's kernels are not built (")
    assert line.endswith(f"; run: pip install -e {clone}")
