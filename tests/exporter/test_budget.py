"""A budget of bits: the choice among formats, the measured sensitivities, and whole exports."""

import dataclasses
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.exporter import export
from precast.exporter.block_formats import BLOCK_FORMATS
from precast.exporter.budget import cheapest
from precast.exporter.calibration import cut_windows, open_model, read_calibration_text
from precast.exporter.options import ExportOptions, check_options
from precast.exporter.plan import make_plan
from precast.exporter.quantize import BUDGET_FORMATS
from precast.exporter.sensitivity import measure
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import map_weights
from precast.loaders.audit.inspect import describe
from precast.loaders.load import load

WORDS = "the quick brown fox jumps over the lazy dog; def fibonacci(n): return n; the cat sat on the mat. "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS * 60)
    return path


# --- the choice ---------------------------------------------------------------------------------------------------

ITEMS = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 100)), min_size=3, max_size=3),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=300)
@given(items=ITEMS, spare=st.integers(0, 60))
def test_the_choice_fits_and_no_single_step_would_be_better(
    items: list[list[tuple[int, int]]], spare: int
) -> None:
    sizes = [list(np.cumsum([size for size, _ in item])) for item in items]
    losses = [[float(loss) for _, loss in item] for item in items]
    budget = int(sum(each[0] for each in sizes)) + spare
    chosen = cheapest(sizes, losses, budget)

    def total(values: list[list[Any]], options: Any) -> float:
        return sum(value[option] for value, option in zip(values, options, strict=True))

    assert total(sizes, chosen) <= budget
    assert total(losses, chosen) <= total(losses, [0] * len(sizes))
    left = budget - total(sizes, chosen)
    for item, option in enumerate(chosen):
        for other in range(option + 1, 3):
            if sizes[item][other] - sizes[item][option] <= left:
                assert losses[item][other] >= losses[item][option]


def test_the_choice_is_the_best_of_all_where_the_budget_is_filled() -> None:
    """If losses are convex and all steps have the same size, the greedy choice is optimal."""
    sizes, losses = [[1, 2, 3, 4]] * 5, [[8 * w, 4 * w, 2 * w, w] for w in (1.0, 7.0, 3.0, 0.1, 2.0)]
    for budget in range(5, 21):
        chosen = cheapest(sizes, losses, budget)
        best = min(
            sum(losses[i][option] for i, option in enumerate(options))
            for options in product(range(4), repeat=5)
            if sum(option + 1 for option in options) <= budget
        )
        assert sum(losses[i][option] for i, option in enumerate(chosen)) == pytest.approx(best)


# --- sensitivities ------------------------------------------------------------------------------------------------


def test_every_matrix_is_measured_and_more_bits_lose_less(
    tiny_source: Callable[..., Any], text: Path
) -> None:
    options = ExportOptions(buckets=(8,), context=64, bits=6.0, calibrate=text)
    plan = make_plan(tiny_source(), options)
    model = open_model(plan)
    formats = [BLOCK_FORMATS[name] for name in BUDGET_FORMATS]
    windows = cut_windows(model, read_calibration_text(text))[:2]
    found = measure(model, plan.spec, plan.stored.parameters, windows, formats)
    mixed = {name: len(kinds) for name, kinds in plan.stored.formats.items() if not isinstance(kinds, str)}
    measured: dict[str, list[int]] = {}
    for each in found:
        measured.setdefault(each.parameter.name, []).extend(each.sources)
        assert all(a > b > 0 for a, b in zip(each.losses, each.losses[1:], strict=False))
    assert {name: sorted(places) for name, places in measured.items()} == {
        name: list(range(count)) for name, count in mixed.items()
    }
    again = measure(model, plan.spec, plan.stored.parameters, windows, formats)
    assert [each.losses for each in again] == [each.losses for each in found]


# --- exports ------------------------------------------------------------------------------------------------------


def test_an_export_keeps_the_budget_and_loses_less_with_more_bits(
    export_tiny: Callable[..., Path], text: Path
) -> None:
    budgets = (7.6, 8.5)
    kept = {"kv_cache": "float32", "targets": ("cpu",)}
    roots = [export_tiny(weights=None, bits=bits, calibrate=text, **kept) for bits in budgets]
    exact = logits(load(export_tiny(**kept)))
    lost = [float(np.square(logits(load(root)) - exact).mean()) for root in roots]
    for root, bits in zip(roots, budgets, strict=True):
        manifest = load(root).manifest
        assert manifest.model.weights == "mixed"
        assert bits - 0.5 < describe(manifest)["bits_per_weight"] <= bits
    assert lost[0] > lost[1]
    codes = {
        int(code)
        for name, array in map_weights(roots[1] / "weights.safetensors").items()
        if name.endswith(".table")
        for code in array[:, 0]
    }
    assert codes <= {BLOCK_FORMATS[name].code for name in BUDGET_FORMATS}
    assert len(codes) > 1
    again = export_tiny(weights=None, bits=budgets[0], calibrate=text, **kept)
    assert (again / "weights.safetensors").read_bytes() == (roots[0] / "weights.safetensors").read_bytes()


def logits(model: Any) -> np.ndarray:
    engine = model.engine
    step = engine.prefill(model.tokenizer.encode(WORDS), engine.new_cache())
    return np.array(engine.logits(step)[0])


def test_a_budget_below_the_smallest_format_is_refused(
    export_refusal: Callable[..., str],
    tiny_source: Callable[..., Any],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The refusal comes before the long work.
    monkeypatch.setattr(export, "equalised", lambda *_: pytest.fail("the inputs were equalised first"))
    options = ExportOptions(buckets=(8,), context=64, bits=4.25, calibrate=text)
    found = export_refusal(tiny_source(), options)
    assert found.startswith("--bits: expected at least ")
    assert found.endswith(" for this model, found 4.25; raise it.")


def test_the_default_text_is_python_s_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_calibration_text(None)
    assert found.name == "Python's documentation"
    assert "Assert statements are a convenient way" in found.content
    assert len(found.content) > 100_000
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(PrecastError) as raised:
        read_calibration_text(None)
    assert str(raised.value) == (
        "--bits: the default text is Python's own documentation (pydoc_data), which is not installed here; add"
        " --calibrate FILE."
    )


GOOD = ExportOptions(bits=5.0, calibrate=Path("a.txt"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bits": 4.2}, "--bits: expected 4.25 to 9, found 4.2."),
        ({"bits": float("nan")}, "--bits: expected 4.25 to 9, found nan."),
    ],
)
def test_impossible_budgets_are_refused(changes: dict[str, Any], text: str) -> None:
    check_options(GOOD)
    with pytest.raises(PrecastError) as raised:
        check_options(dataclasses.replace(GOOD, **changes))
    assert str(raised.value) == text
