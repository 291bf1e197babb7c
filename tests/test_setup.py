"""Building the kernels: the choice of headers."""

import pytest

# A replacement for setuptools that prints the second compiler argument of the extension.
SETUPTOOLS = """
def Extension(*_, extra_compile_args, **__):
    return extra_compile_args[1]


def setup(*, ext_modules, **_):
    print(*ext_modules)
"""


@pytest.fixture
def build(tmp_path, python):
    """Return a function that runs setup.py with a given version of jaxlib."""

    def run(version):
        (tmp_path / "setuptools.py").write_text(SETUPTOOLS)
        (tmp_path / "jaxlib").mkdir()
        (tmp_path / "jaxlib" / "__init__.py").write_text("raise AssertionError('it must not be imported')")
        info = tmp_path / f"jaxlib-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: jaxlib\nVersion: {version}\n")
        return python("setup.py", env={"PYTHONPATH": str(tmp_path)})

    return run


@pytest.mark.parametrize("version", ["0.10.2", "0.12.0.1", "1.0"])
def test_headers_of_a_newer_jaxlib_are_refused(build, version):
    result = build(version)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"precast's kernels are built against the headers of jaxlib 0.10.1, found {version}: build without"
        " --no-build-isolation, or pip install jaxlib==0.10.1 for the build\n"
    )


def test_headers_of_the_oldest_jaxlib_are_used(build, tmp_path):
    result = build("0.10.1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'jaxlib' / 'include'}\n"
