"""Build the CPU kernels. pyproject.toml contains the rest of the package's metadata."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from setuptools import Extension, setup

# The version of the oldest supported jaxlib. A jaxlib refuses handlers that were built against newer headers.
NEWEST_HEADERS = (0, 10, 1)


def xla_headers() -> str:
    """Return jaxlib's include folder without importing jaxlib.

    Raises:
        SystemExit: jaxlib is missing or newer than the oldest supported one.
    """
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        raise SystemExit("precast's kernels need the headers of jaxlib to build: pip install jaxlib==0.10.1")
    found = importlib.metadata.version("jaxlib")
    if tuple(map(int, re.findall(r"\d+", found)[:3])) > NEWEST_HEADERS:
        raise SystemExit(
            f"precast's kernels are built against the headers of jaxlib 0.10.1, found {found}: build without"
            " --no-build-isolation, or pip install jaxlib==0.10.1 for the build"
        )
    return str(Path(spec.origin).parent / "include")


setup(
    ext_modules=[
        Extension(
            "precast.kernels._kernels",
            sources=sorted(str(path) for path in Path("kernels/src").glob("*.cc")),
            depends=sorted(str(path) for path in Path("kernels/src").glob("*.[hi]*")),
            language="c++",
            define_macros=[("Py_LIMITED_API", "0x030B0000"), ("NDEBUG", None)],
            py_limited_api=True,
            extra_compile_args=[
                "-isystem",
                xla_headers(),
                "-std=c++20",
                "-O3",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",
            ],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
