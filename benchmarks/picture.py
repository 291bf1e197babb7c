"""Draw the README's picture from peers.json: decoding speed, and time to the first token, in two panels.

    python benchmarks/picture.py

Writes decode-and-start-light.svg and decode-and-start-dark.svg into benchmarks/results. The files depend only on the
figures, byte for byte.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CONTENDERS = (
    ("precast-int8", "llama.cpp-q8_0", "openvino-int8"),
    ("precast-int4", "llama.cpp-q4_1", "llama.cpp-q4_0", "openvino-int4"),
)

# Sizes in the picture, in pixels.
WIDTH, MARGIN, LABELS, GAP = 880, 16, 112, 40
TITLE, ROW, BAR, GROUP_GAP = 48, 24, 16, 14
ASCENT = 12.5  # from the top of a row to the baseline of its text
FIGURE_WIDTH = 44  # room for the figure after the longest bar


@dataclass(frozen=True, kw_only=True)
class Theme:
    """The colours of one picture."""

    background: str
    text: str
    quiet: str
    own: str
    peer: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One comparison.

    Attributes:
        title: the quantity and its unit.
        hint: a note on which bars are better, such as "longer is better".
        values: groups of pairs, each of a label and its figure.
        decimals: digits after the decimal point.
    """

    title: str
    hint: str
    values: Sequence[Sequence[tuple[str, float]]]
    decimals: int


THEMES = {
    "light": Theme(background="#ffffff", text="#1f2328", quiet="#59636e", own="#c2570c", peer="#8fa9c4"),
    "dark": Theme(background="#0d1117", text="#f0f6fc", quiet="#9198a1", own="#f0883e", peer="#4f6d8c"),
}


def panels(result: Mapping) -> tuple[Panel, Panel]:
    """Return the two panels of a benchmark's result."""
    contenders = result["contenders"]
    return (
        Panel(
            title="Decode, tokens/s",
            hint="longer is better",
            values=[
                [
                    (contenders[c]["label"], contenders[c]["prompts"]["128"]["decode_tokens_per_s"]["median"])
                    for c in group
                ]
                for group in CONTENDERS
            ],
            decimals=0,
        ),
        Panel(
            title="Cold start to first token, s",
            hint="shorter is better",
            values=[
                [(contenders[c]["label"], contenders[c]["cold_start_s"]["median"]) for c in group]
                for group in CONTENDERS
            ],
            decimals=2,
        ),
    )


def _text(x: float, y: float, content: str, colour: str, *, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}"{extra}>{escape(content)}</text>'


def _bars(panel: Panel, left: float, room: float, theme: Theme) -> list[str]:
    longest = max(value for group in panel.values for _, value in group)
    title = _text(left, 24, panel.title, theme.text, extra=' font-size="15" font-weight="600"')
    hint = _text(left + LABELS + room, 24, panel.hint, theme.quiet, extra=' text-anchor="end"')
    lines, y = [title, hint], float(TITLE)
    for group in panel.values:
        for label, value in group:
            is_own = label.startswith("precast")
            length = round(value / longest * (room - FIGURE_WIDTH), 1)
            weight = ' font-weight="600"' if is_own else ""
            figure = f"{value:.{panel.decimals}f}"
            box = f'x="{left + LABELS:g}" y="{y:g}" width="{length:g}" height="{BAR}" rx="2"'
            lines += [
                _text(left, y + ASCENT, label, theme.text, extra=weight),
                f'<rect {box} fill="{theme.own if is_own else theme.peer}"/>',
                _text(left + LABELS + length + 6, y + ASCENT, figure, theme.text, extra=weight),
            ]
            y += ROW
        y += GROUP_GAP
    return lines


def draw(result: Mapping, theme: Theme) -> str:
    """Return the picture of a benchmark's result as SVG."""
    room = (WIDTH - 2 * MARGIN - GAP) / 2 - LABELS
    rows = sum(map(len, CONTENDERS))
    height = TITLE + rows * ROW + (len(CONTENDERS) - 1) * GROUP_GAP + 34
    machine = f"SmolLM2-135M-Instruct, {result['cores']}-core {result['processor']}, prompt of 128 tokens"
    note = f"{machine}, medians of {result['rounds']} rounds"
    left, right = (
        _bars(panel, MARGIN + place * (room + LABELS + GAP), room, theme)
        for place, panel in enumerate(panels(result))
    )
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    font = 'font-family="system-ui, sans-serif" font-size="13"'
    label = "Bars: decoding speed and cold start of precast, llama.cpp and OpenVINO"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img" aria-label="{label}">',
            f'<rect width="{WIDTH}" height="{height}" rx="6" fill="{theme.background}"/>',
            *left,
            *right,
            _text(MARGIN, height - 12, note, theme.quiet, extra=' font-size="12"'),
            "</svg>\n",
        ]
    )


def main() -> None:
    result = json.loads((RESULTS / "peers.json").read_text())
    for name, theme in THEMES.items():
        (RESULTS / f"decode-and-start-{name}.svg").write_text(draw(result, theme))


if __name__ == "__main__":
    main()
