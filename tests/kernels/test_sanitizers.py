"""The C++ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, without XLA or Python around it."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from precast import kernels

HERE = Path(__file__).parent / "sanitize"
SOURCES = Path(kernels.__file__).parent / "src"
KERNELS = [
    *SOURCES.glob("isa_*.cc"),
    *(
        SOURCES / f"{n}.cc"
        for n in ("dispatch", "linear_call", "attention_call", "norm_call", "experts_call")
    ),
]
CHECKS = [HERE / f"{name}.cc" for name in ("driver", "wide", "linear", "calls", "experts")]
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Werror")
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = ("-fsanitize=thread",)
# For one compilation or one run; the slowest takes half a minute on an idle machine.
LIMIT_S = 900


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def compile_all(folder: Path, sources: list[Path], flags: tuple[str, ...], include: Path) -> Path:
    """Compile the sources, one for each CPU at a time, and link them."""
    compiler = (
        os.environ.get("CXX", "g++"),
        "-std=c++20",
        "-O1",
        "-g1",
        "-ffp-contract=off",
        *WARNINGS,
        *flags,
    )
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [*compiler, f"-I{SOURCES}", f"-I{include}", "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(usable_cpus()) as pool:
        done = list(pool.map(run, commands))
    assert [one.returncode for one in done] == [0] * len(done), "".join(one.stderr for one in done)
    subprocess.run([*compiler, *map(str, objects), "-o", str(folder / "driver")], check=True)
    return folder / "driver"


def require_sanitizer(folder: Path, flags: tuple[str, ...]) -> None:
    """Skip if no program compiles with these flags, or if such a program does not run."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    program = folder / "empty.cc"
    program.write_text("int main() {}\n")
    command = [os.environ.get("CXX", "g++"), *flags, str(program), "-o", str(folder / "empty")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"the compiler has no {flags[0]}")
    if subprocess.run([folder / "empty"], capture_output=True, check=False).returncode:
        pytest.skip(f"a program compiled with {flags[0]} does not start on this machine")


def assert_clean(command: list[str | Path]) -> None:
    result = run(command)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    require_sanitizer(folder, MEMORY)
    return compile_all(folder, [*KERNELS, *CHECKS], (*MEMORY, "-pthread"), HERE / "fake")


# "wide" is the source of the AVX-512 kernels compiled for any CPU.
@pytest.mark.long
@pytest.mark.parametrize("name", [*kernels.ISAS, "wide"])
def test_kernels_stay_within_their_buffers(driver: Path, name: str) -> None:
    if name not in (*kernels.supported_isas(), "wide"):
        pytest.skip(f"this CPU does not run {name}")
    assert_clean([driver, name])


@pytest.mark.long
def test_the_driver_refuses_an_unknown_name(driver: Path) -> None:
    assert subprocess.run([driver, "sve3"], capture_output=True, check=False).returncode == 2


@pytest.mark.long
def test_calls_share_nothing_that_is_written(tmp_path: Path) -> None:
    require_sanitizer(tmp_path, THREADS)
    driver = compile_all(tmp_path, [*KERNELS, *CHECKS], (*THREADS, "-pthread"), HERE / "fake")
    assert_clean([driver, kernels.supported_isas()[-1], "calls"])


@pytest.mark.parametrize("flags", [MEMORY, THREADS], ids=["memory", "threads"])
def test_teams(tmp_path: Path, flags: tuple[str, ...]) -> None:
    require_sanitizer(tmp_path, flags)
    program = compile_all(tmp_path, [HERE / "threads.cc"], (*flags, "-pthread"), HERE / "fake")
    assert_clean([program])
