"""Draw peers.svg: horizontal bars that are legible on white and on dark pages."""

from collections.abc import Mapping
from pathlib import Path

import report

# Mid-tones with enough contrast on white and on dark grey. precast is orange.
TEXT, PEER, OURS = "#7d8590", "#6e93b8", "#d9822b"
PANELS = (
    ("decode after 128 tokens, tokens/s", report._decode(128)),
    ("prefill of 128 tokens, ms", report._prefill(128)),
    ("prefill of 512 tokens, ms", report._prefill(512)),
    ("process start to first token, s", report.COLD),
)
STYLE = {
    "svg.hashsalt": "precast",
    "svg.fonttype": "none",  # write text as text, not as outlines
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}


def draw(result: Mapping, path: Path) -> None:
    """Draw a benchmark's result into `path`. The file depends only on the result, byte for byte."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = [c for members in report.groups(result).values() for c in members.values()]
    panels = [p for p in PANELS if any(report.value(c, p[1]) is not None for c in rows)]
    if not panels:
        return
    with matplotlib.rc_context(STYLE):
        height = 0.7 + 0.26 * len(rows)
        figure, axes = plt.subplots(len(panels), 1, figsize=(8, height * len(panels)), squeeze=False)
        for axis, (title, figure_) in zip(axes[:, 0], panels, strict=True):
            _panel(axis, title, figure_, rows)
        figure.tight_layout()
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _panel(axis, title: str, figure: report.Figure, rows: list[Mapping]) -> None:
    found = [(c, v) for c in rows if (v := report.value(c, figure)) is not None]
    better = "more is better" if figure[2] else "less is better"
    # Cut the bars of outliers, and mark them with an arrow. In full length, they would leave no room for the other
    # bars.
    middle = sorted(v for _, v in found)[len(found) // 2]
    limit = 4 * middle
    for place, (contender, value) in enumerate(found):
        ours = contender["label"].startswith("precast")
        axis.barh(place, min(value, limit), color=OURS if ours else PEER, height=0.72)
        text = figure[3](value) + (" →" if value > limit else "")
        axis.text(min(value, limit), place, f" {text}", va="center", color=TEXT)
    axis.set_yticks(range(len(found)), [c["label"] for c, _ in found])
    axis.set_title(f"{title} ({better})", loc="left", color=TEXT, fontsize=10)
    axis.set_xlim(0, min(max(v for _, v in found), limit) * 1.15)
    axis.invert_yaxis()
    axis.set_xticks([])
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(length=0)
