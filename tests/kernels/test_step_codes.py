"""The names of a step's integers in C++ and in Python agree."""

import re
from pathlib import Path

import pytest

from precast import kernels

SOURCES = Path(kernels.__file__).parent / "src"
HEADER = (SOURCES / "step_codes.h").read_text()


def fields(code: str) -> list[str]:
    """Return the fields of a struct of the header in order."""
    found = re.search(rf"struct {code} {{\s*int64_t ([^;]+);\s*}};", HEADER)
    assert found, f"no struct {code} of int64_t fields in step_codes.h"
    return found[1].replace("\n", " ").replace(" ", "").split(",")


def enumerators(text: str, name: str) -> list[str]:
    found = re.search(rf"enum class {name}[^{{]*{{ ([^}}]+) }};", text)
    assert found, f"no enum {name}"
    return found[1].split(", ")


def test_every_code_has_the_same_fields_in_both_languages() -> None:
    steps = pytest.importorskip("precast.exporter.models.steps")
    assert {code.__name__: fields(code.__name__) for code in steps.CODES} == {
        code.__name__: list(code._fields) for code in steps.CODES
    }
    assert set(re.findall(r"struct (\w+Code) ", HEADER)) == {code.__name__ for code in steps.CODES}


def test_every_kind_has_the_same_number_in_both_languages() -> None:
    steps = pytest.importorskip("precast.exporter.models.steps")
    kinds = [f"k{code.__name__.removesuffix('Code')}" for code in steps.CODES]
    assert enumerators(HEADER, "StepKind") == kinds
    assert f"kStepIntegers = {steps.STEP_INTEGERS};" in HEADER
    assert all(len(code._fields) < steps.STEP_INTEGERS for code in steps.CODES)


def test_every_gate_has_the_same_number_in_both_languages() -> None:
    steps = pytest.importorskip("precast.exporter.models.steps")
    names = [name.title().replace("_", "") or "None" for name in steps.GATES]
    assert enumerators((SOURCES / "linear.h").read_text(), "Gate") == [f"k{name}" for name in names]
