"""The ratios and the table of serving.py."""

from collections.abc import Mapping, Sequence
from math import ceil

import limits

TITLES = {
    "one": "1 stream",
    "sampled": "1 stream, temperature 1",
    "eight": "8 streams",
    "shared": "8 streams, shared system prompt",
}
_COLUMNS = (
    "load",
    "server",
    "tokens/s",
    "first token, ms",
    "p95, ms",
    "per token, ms",
    "gap p95, ms",
    "over generate_many",
    "prompt (cached)",
    "others",
)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that is at least as large as `percent` of all values (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(ceil(len(ordered) * percent / 100), 1) - 1]


def ratios(
    loads: Mapping[str, Mapping[str, Sequence[Mapping]]],
    starts: Mapping[str, Sequence[float]],
    contenders: Mapping,
) -> dict[str, dict]:
    """Return precast's figures divided by those of llama-server with the same bits, round by round."""
    pairs = {
        contenders[ours].group: (ours, theirs)
        for ours in starts
        for theirs in starts
        if contenders[ours].group == contenders[theirs].group
        and contenders[ours].is_precast > contenders[theirs].is_precast
    }
    return {
        group: {
            "start": limits.spread([a / b for a, b in zip(starts[ours], starts[theirs], strict=True)]),
            **{load: _load_ratios(named[ours], named[theirs]) for load, named in loads.items()},
        }
        for group, (ours, theirs) in pairs.items()
    }


def _load_ratios(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> dict:
    def of(figure) -> dict[str, float]:
        return limits.spread([figure(a) / figure(b) for a, b in zip(ours, theirs, strict=True)])

    return {
        "tokens_per_s": of(lambda run: 1 / run["seconds"]),
        "first_token_p95_s": of(lambda run: percentile([a.first_s for a in run["answers"]], 95)),
    }


def table(result: Mapping) -> str:
    """Return the results as Markdown."""
    return "\n\n".join([_loads(result), _servers(result), _compared(result)])


def summary(result: Mapping) -> str:
    """Return the medians as the table of docs/performance.md."""
    columns = (
        "SmolLM2-135M-Instruct, 2 threads",
        "8 streams, tokens/s",
        "first token, p95, ms",
        "8 streams, shared prompt, tokens/s",
        "first token, p95, ms",
        "1 stream, tokens/s",
        "start, s",
        "peak memory, MB",
    )
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for name, label in result["labels"].items():
        eight, shared, one = (result["loads"][load][name] for load in ("eight", "shared", "sampled"))
        cells = [
            f"{eight['tokens_per_s']['median']:.0f}",
            f"{eight['first_token_p95_s']['median'] * 1e3:.0f}",
            f"{shared['tokens_per_s']['median']:.0f}",
            f"{shared['first_token_p95_s']['median'] * 1e3:.0f}",
            f"{one['tokens_per_s']['median']:.0f}",
            f"{result['start_s'][name]['median']:.2f}",
            f"{result['memory'][name]['peak_rss_bytes'] / 1e6:.0f}",
        ]
        shown = f"**{label}**" if label.startswith("precast") else label
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _loads(result: Mapping) -> str:
    lines = [
        f"| {' | '.join(_COLUMNS)} |",
        f"|---|---|{'---:|' * (len(_COLUMNS) - 2)}",
    ]
    for load, named in result["loads"].items():
        for name, found in named.items():
            speed, over = found["tokens_per_s"], found.get("over_generate_many")
            cells = [
                f"{speed['median']:.0f} ({speed['min']:.0f}–{speed['max']:.0f})",
                f"{found['first_token_s']['median'] * 1e3:.0f}",
                f"{found['first_token_p95_s']['median'] * 1e3:.0f}",
                f"{found['token_s']['median'] * 1e3:.1f}",
                f"{found['gap_p95_s'] * 1e3:.1f}",
                "–" if over is None else f"{over['median']:.3f} ({over['min']:.3f}–{over['max']:.3f})",
                f"{found['prompt_tokens']['median']:.0f} ({found['cached_tokens']['median']:.0f})",
                f"{found['others']['median']:.0%}",
            ]
            lines.append(f"| {TITLES[load]} | {result['labels'][name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _servers(result: Mapping) -> str:
    lines = ["| server | start to first token, s | peak RSS, MB | PSS, MB |", "|---|---:|---:|---:|"]
    for name, memory in result["memory"].items():
        start = result["start_s"][name]
        sizes = f"{memory['peak_rss_bytes'] / 1e6:.0f} | {memory['pss_bytes'] / 1e6:.0f}"
        lines.append(
            f"| {result['labels'][name]} | {start['median']:.2f} ({start['min']:.2f}–{start['max']:.2f}) | {sizes} |"
        )
    return "\n".join(lines)


def _compared(result: Mapping) -> str:
    lines = ["| precast : llama-server | load | tokens/s | first token, p95 |", "|---|---|---:|---:|"]
    for group, found in result["ratios"].items():
        for load, each in found.items():
            if load == "start":
                lines.append(f"| {group} | start to first token | | {_spread(each)} |")
            else:
                cells = f"{_spread(each['tokens_per_s'])} | {_spread(each['first_token_p95_s'])}"
                lines.append(f"| {group} | {TITLES[load]} | {cells} |")
    return "\n".join(lines)


def _spread(value: Mapping[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f}–{value['max']:.2f})"
