"""Draw frontier.svg: divergence over bits per weight, one panel for each model and variant."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import peers_picture

# Mid-tones, like those of `peers_picture`. The key of a series is the engine, and True for an importance matrix.
SERIES = {
    ("precast", False): ("precast --bits", peers_picture.OURS, "o", "-"),
    ("llama.cpp", True): ("llama.cpp with imatrix", peers_picture.PEER, "s", "-"),
    ("llama.cpp", False): ("llama.cpp", peers_picture.PEER, "s", ":"),
    ("OpenVINO", False): ("OpenVINO", "#8a6fb0", "^", ""),
}
_IMATRIX, _BITS = " imatrix", "--bits "


def series(points: Sequence[Mapping]) -> dict[tuple[str, bool], list[Mapping]]:
    """Return the points of each series, by size."""
    found: dict[tuple[str, bool], list[Mapping]] = {key: [] for key in SERIES}
    for point in sorted(points, key=lambda point: point["bits"]):
        found[point["engine"], point["label"].endswith(_IMATRIX)].append(point)
    return found


def draw(result: Mapping, path: Path) -> None:
    """Draw a result into `path`. The same figures always give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    panels = [
        (f"{model}, {variant}", list(found["points"].values()))
        for model, variants in result["models"].items()
        for variant, found in variants.items()
        if found["points"]
    ]
    if not panels:
        return
    with matplotlib.rc_context(peers_picture.STYLE):
        figure, axes = plt.subplots(len(panels), 1, figsize=(8, 4 * len(panels)), squeeze=False)
        for axis, (title, points) in zip(axes[:, 0], panels, strict=True):
            _panel(axis, title, points)
        figure.tight_layout()
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _panel(axis, title: str, points: Sequence[Mapping]) -> None:
    for key, members in series(points).items():
        label, colour, marker, line = SERIES[key]
        # The line joins the points of one option; the others stand alone.
        joined = [p for p in members if key[0] != "precast" or p["label"].startswith(_BITS)]
        axis.plot(_bits(joined), _divergences(joined), color=colour, linestyle=line or "none")
        axis.plot(_bits(members), _divergences(members), color=colour, marker=marker, linestyle="none",
                  label=label, markerfacecolor="none" if line == ":" else colour)  # fmt: skip
        for point in members:
            text = point["label"].removesuffix(_IMATRIX)
            place = (point["bits"], point["kl_mean"])
            above = key[1] or key[0] == "precast"
            axis.annotate(
                text,
                place,
                xytext=(4, -9 if above else 4),
                textcoords="offset points",
                color=colour,
                fontsize=7,
            )
    axis.set_yscale("log")
    axis.set_title(
        f"{title}: KL divergence to float32, nats (less is better)", loc="left", color=peers_picture.TEXT
    )
    axis.set_xlabel("bits per weight")
    axis.grid(color=peers_picture.TEXT, alpha=0.25, linewidth=0.5)
    for side in axis.spines.values():
        side.set_color(peers_picture.TEXT)
    axis.legend(frameon=False, labelcolor=peers_picture.TEXT)


def _bits(points: Sequence[Mapping]) -> list[float]:
    return [point["bits"] for point in points]


def _divergences(points: Sequence[Mapping]) -> list[float]:
    return [point["kl_mean"] for point in points]
