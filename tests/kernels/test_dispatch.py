"""The choice of the instruction set, and the names of the XLA targets."""

import re
from collections.abc import Iterator

import pytest

from precast import kernels


@pytest.fixture(autouse=True)
def best_afterwards() -> Iterator[None]:
    yield
    kernels.force_isa(None)


def test_supported_isas_are_in_order_and_work_everywhere() -> None:
    supported = kernels.supported_isas()
    assert supported[0] == "portable"
    assert list(supported) == [name for name in kernels.ISAS if name in supported]


def test_the_widest_is_chosen() -> None:
    assert kernels.isa() == kernels.supported_isas()[-1]


@pytest.mark.parametrize("name", kernels.ISAS)
def test_forcing(name: str) -> None:
    if name not in kernels.supported_isas():
        pytest.skip(f"this CPU does not run {name}")
    kernels.force_isa(name)
    assert kernels.isa() == name
    kernels.force_isa(None)
    assert kernels.isa() == kernels.supported_isas()[-1]


@pytest.mark.parametrize("name", ["sve3", "", "AVX2", "avx2 ", "é"])
def test_an_unknown_name_is_refused_and_changes_nothing(name: str) -> None:
    kernels.force_isa("portable")
    with pytest.raises(ValueError, match=f"this CPU has no kernels for '{name}'"):
        kernels.force_isa(name)
    assert kernels.isa() == "portable"


@pytest.mark.parametrize("name", [name for name in kernels.ISAS if name not in kernels.supported_isas()])
def test_what_the_cpu_lacks_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"this CPU has no kernels for '{name}'"):
        kernels.force_isa(name)


@pytest.mark.parametrize("name", [1, b"avx2", "avx2\0"])
def test_what_is_no_name_is_refused(name: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        kernels.force_isa(name)  # type: ignore[arg-type]
    assert kernels.isa() == kernels.supported_isas()[-1]


def test_every_target_has_a_version() -> None:
    targets = kernels.targets()
    assert all(re.fullmatch(r"precast\.[a-z_]+\.v[1-9][0-9]*", name) for name in targets)
    assert all(type(handler).__name__ == "PyCapsule" for handler in targets.values())
    assert kernels.ABI_VERSION >= 1


def test_the_exporter_uses_targets_there_are() -> None:
    pytest.importorskip("jax")
    from precast.exporter.models.cpu_ops import CPU_OPS

    assert set(CPU_OPS.kernels) <= set(kernels.targets())
