"""The progress line for pip: counts from pip's output, silence without a terminal, and pip's output after a failure."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "pip_install.py"


@pytest.fixture
def installation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import pip_install

    yield pip_install.Installation()
    del sys.modules["pip_install"]


def test_packages_and_megabytes_are_counted(installation) -> None:
    for line in (
        "Processing /srv/wheels/ml_dtypes-0.6.0-cp311-cp311-linux_x86_64.whl (from precast==0.2.0)",
        "Collecting jaxlib!=0.10.2,>=0.10.1 (from precast==0.2.0)",
        "  Downloading jaxlib-0.10.1-cp311-cp311-linux_x86_64.whl (86.0 MB)",
        "Collecting pyjwt[crypto] (from precast==0.2.0)",
        "  Downloading pyjwt-2.15.1-py3-none-any.whl (500 kB)",
        "Requirement already satisfied: jaxlib in /srv/lib (from flax>=0.12)",
    ):
        installation.read(line)
    assert installation.packages == {"ml_dtypes", "jaxlib", "pyjwt"}
    assert installation.megabytes == pytest.approx(86.5)


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("Collecting numpy", "fetching"),
        (
            "  Building editable for precast (pyproject.toml): started",
            "compiling the kernels, 1 to 2 minutes",
        ),
        ("Installing collected packages: numpy, jaxlib", "installing"),
    ],
)
def test_the_stage_follows_pip(installation, line: str, stage: str) -> None:
    installation.read(line)
    assert str(installation).endswith(f"; {stage}")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


def test_pip_is_silent_without_a_terminal() -> None:
    done = run("--dry-run", "--no-index", "pip")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_failure_shows_what_pip_said() -> None:
    done = run("--no-index", "no-such-package-of-precast")
    assert done.returncode == 1
    assert "No matching distribution found for no-such-package-of-precast" in done.stderr
