"""llama.cpp's tools llama-quantize, llama-imatrix and llama-server, which its Python package lacks.

    .venv-bench/bin/python benchmarks/peers/llama_tools.py            # builds those that are missing
    .venv-bench/bin/python benchmarks/peers/llama_tools.py NAME …     # builds these, even if they exist

All three take about ten minutes on 2 cores.

They are built from the source package of the installed llama-cpp-python, so that the tools and the measured library are
of one version, and put beside the interpreter. Like the library, they are compiled for this machine's processor.
Without llama-quantize and llama-imatrix, `frontier.py` leaves out the files that need them. `serving.py` needs
llama-server.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

NAMES = ("llama-quantize", "llama-imatrix")
SERVER = "llama-server"
_BIN = Path(sys.executable).parent
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_UI=OFF",  # the server's web page, which a build would download
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


def find(name: str) -> str | None:
    """Return the path of a tool, beside the interpreter or on the PATH; None if it is missing."""
    return shutil.which(name, path=f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}")


def missing() -> list[str]:
    """Return the names of the tools that are missing."""
    return [name for name in NAMES if find(name) is None]


def build(names: Sequence[str]) -> None:
    """Fetch the source of the installed version, build tools, and copy them beside the interpreter."""
    cmake = find("cmake")
    if cmake is None:
        raise SystemExit(f"cmake is missing; install it: {sys.executable} -m pip install cmake")
    package = f"llama-cpp-python=={version('llama-cpp-python')}"
    with tempfile.TemporaryDirectory(prefix="llama-tools-") as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*pip, package], check=True)
        archive = next(Path(folder).glob("*.tar.gz"))
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        source = next(Path(folder).glob("*/vendor/llama.cpp"))
        built = Path(folder) / "built"
        subprocess.run([cmake, "-S", source, "-B", built, *_OPTIONS], check=True)
        targets = ["--target", *names, "--parallel", str(os.cpu_count())]
        subprocess.run([cmake, "--build", built, *targets], check=True)
        for name in names:
            shutil.copy2(built / "bin" / name, _BIN / name)


def main(arguments: Sequence[str]) -> None:
    known = (*NAMES, SERVER)
    if unknown := sorted(set(arguments) - set(known)):
        raise SystemExit(f"expected {', '.join(known)}, found {', '.join(unknown)}")
    if names := arguments or [name for name in known if find(name) is None]:
        build(names)
    else:
        print(f"{', '.join(known)} exist already")


if __name__ == "__main__":
    main(sys.argv[1:])
