"""Choose a format for each matrix, so that a model of at most a given size loses the least accuracy."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.progress import Progress, silent

from .block_formats import BLOCK_FORMATS
from .calibration import CalibrationText, check_triangle, cut_windows, open_model
from .plan import ExportPlan
from .quantize import BUDGET_FORMATS
from .sensitivity import Sensitivity, measure
from .weights import stored_bytes

# Sensitivity is measured on at most this many windows of the text. The states of all windows are in memory together.
_WINDOWS = 4


def with_budget(
    plan: ExportPlan, bits: float, text: CalibrationText, progress: Progress = silent
) -> tuple[ExportPlan, Mapping[str, np.ndarray]]:
    """Choose one of `BUDGET_FORMATS` for each matrix of a plan with mixed weights.

    Args:
        plan: the plan, in which all matrices have the smallest format.
        bits: maximum size of the parameters in the weight file, in bits per weight. Scales, norms and biases count.
        text: the text to measure sensitivity on.
        progress: receives the number of layers measured so far.

    Returns:
        The plan with the chosen formats, and the result of `gptq.compensation` for each matrix outside the layers, by
        the name of its parameter.

    Raises:
        PrecastError: the budget is too small, the text is too short, or its inputs are too large for float32.
    """
    parameters = plan.stored.parameters
    spare = check_budget(plan, bits)
    model = open_model(plan)
    windows = cut_windows(model, text)[:_WINDOWS]
    candidates = [BLOCK_FORMATS[name] for name in BUDGET_FORMATS]
    found = measure(model, plan.spec, parameters, windows, candidates, progress)
    triangles = {each.parameter.name: each.triangle for each in found if each.triangle is not None}
    for name, triangle in triangles.items():
        check_triangle(triangle, text, name)
    found = [each for each in found if not isinstance(plan.stored.formats[each.parameter.name], str)]
    sizes = [_sizes(each) for each in found]
    budget = spare + sum(each[0] for each in sizes)
    chosen = cheapest(sizes, [_losses(plan, each) for each in found], budget)
    formats = dict(plan.stored.formats)
    for each, option in zip(found, chosen, strict=True):
        own = list(formats[each.parameter.name])
        own[each.sources.start : each.sources.stop] = [BUDGET_FORMATS[option]] * len(each.sources)
        formats[each.parameter.name] = tuple(own)
    return replace(plan, stored=replace(plan.stored, formats=formats)), triangles


def check_budget(plan: ExportPlan, bits: float) -> int:
    """Check that a plan with the smallest formats fits a budget of `bits` per weight; return the bytes left over.

    Raises:
        PrecastError: the budget is too small.
    """
    parameters = plan.stored.parameters
    count = sum(p.size for p in parameters)
    smallest = stored_bytes(parameters, plan.stored.formats)
    spare = int(bits * count / 8) - smallest
    if spare < 0:
        least = np.ceil(100 * 8 * smallest / count) / 100
        raise PrecastError(f"--bits: expected at least {least:g} for this model, found {bits:g}; raise it.")
    return spare


def _sizes(item: Sensitivity) -> list[int]:
    """Return the size in bytes of the matrices in each of `BUDGET_FORMATS`."""
    outs, inputs = item.parameter.source_shape
    return [BLOCK_FORMATS[name].matrix_bytes(outs, inputs) * len(item.sources) for name in BUDGET_FORMATS]


def _losses(plan: ExportPlan, item: Sensitivity) -> list[float]:
    """Return the expected divergence in each of `BUDGET_FORMATS`: 0 in the format of the source."""
    names = [item.parameter.sources[i] for i in item.sources]
    stored = {plan.weight_plan.tensors[name].block_format for name in names}
    return [0.0 if stored == {f} else loss for f, loss in zip(BUDGET_FORMATS, item.losses, strict=True)]


def cheapest(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Choose an option for each item. The sum of sizes is at most the budget, and the sum of losses is small.

    Begin with the smallest options. Then replace one item's option by a larger one, again and again: of the
    replacements that still fit the budget, the one that saves the most loss per byte. Until a replacement no longer
    fits, the choice is optimal for its size, because all replacements lie on the convex hulls of the items' options
    (Fox 1966, https://doi.org/10.1287/mnsc.13.3.210).

    Args:
        sizes: the sizes of each item's options, ascending.
        losses: the losses of each item's options.
        budget: maximum sum of sizes; it must be at least the sum of the smallest sizes.

    Returns:
        The index of each item's option.
    """
    chosen = [0] * len(sizes)
    left = budget - sum(each[0] for each in sizes)
    steps: list[tuple[float, int, int]] = []  # change of the loss per byte, negative; item; option

    def offer(item: int, room: int) -> None:
        """Push an item's best replacement of at most `room` bytes."""
        now = chosen[item]
        gains = [
            ((losses[item][option] - losses[item][now]) / size, item, option)
            for option in range(now + 1, len(sizes[item]))
            if (size := sizes[item][option] - sizes[item][now]) <= room
        ]
        if gains and min(gains)[0] < 0:
            heapq.heappush(steps, min(gains))

    for item in range(len(sizes)):
        offer(item, left)
    while steps:
        _, item, option = heapq.heappop(steps)
        size = sizes[item][option] - sizes[item][chosen[item]]
        if size <= left:
            chosen[item], left = option, left - size
        offer(item, left)  # if the replacement no longer fits, a smaller one may
    return chosen
