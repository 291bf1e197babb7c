"""Format peers.json as tables, and list the figures in which precast is behind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# A figure to compare within a group: the title, a function that returns the figure of a contender, True if more is
# better, and a function that formats the figure.
Figure = tuple[str, Callable[[Mapping], float], bool, Callable[[float], str]]


def _prefill(length: int) -> Figure:
    return (
        f"prefill {length}, ms",
        lambda c: c["prompts"][str(length)]["prefill_s"]["median"],
        False,
        lambda v: f"{v * 1e3:.0f}",
    )


def _decode(length: int) -> Figure:
    return (
        f"decode after {length}, tokens/s",
        lambda c: c["prompts"][str(length)]["decode_tokens_per_s"]["median"],
        True,
        lambda v: f"{v:.1f}",
    )


COLD: Figure = ("cold start, s", lambda c: c["cold_start_s"]["median"], False, lambda v: f"{v:.2f}")
RESIDENT: Figure = (
    "resident, MB",
    lambda c: sum(c["resident_bytes"]["used"].values()),
    False,
    lambda v: f"{v / 1e6:.0f}",
)
KL: Figure = ("KL, mean", lambda c: c["fidelity"]["kl_mean"], False, lambda v: f"{v:.4f}")
KL99: Figure = ("KL, p99", lambda c: c["fidelity"]["kl_p99"], False, lambda v: f"{v:.4f}")
TOP1: Figure = ("top-1", lambda c: c["fidelity"]["top1"], True, lambda v: f"{v:.1%}")


def figures(result: Mapping) -> list[Figure]:
    """Return the figures that were measured for at least one contender."""
    lengths = sorted({int(n) for c in result["contenders"].values() for n in c.get("prompts", {})})
    every = [*map(_prefill, lengths), *map(_decode, lengths), COLD, RESIDENT, KL, KL99, TOP1]
    return [f for f in every if any(value(c, f) is not None for c in result["contenders"].values())]


def value(contender: Mapping, figure: Figure) -> float | None:
    try:
        return figure[1](contender)
    except KeyError:
        return None


def _row(contender: Mapping, wanted: list[Figure]) -> str:
    cells = [(value(contender, f), f[3]) for f in wanted]
    return " | ".join("–" if v is None else write(v) for v, write in cells)


def groups(result: Mapping) -> dict[str, dict[str, Mapping]]:
    found: dict[str, dict[str, Mapping]] = {}
    for name, contender in result["contenders"].items():
        found.setdefault(contender["group"], {})[name] = contender
    return found


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A figure of precast, compared with the same figure of the best peer.

    Attributes:
        own: label of the precast contender.
        figure: title of the figure.
        peer: label of the best peer.
        times: factor by which precast is better; below 1 if precast is behind.
    """

    own: str
    figure: str
    peer: str
    times: float


# The labels of peers begin with these names.
AGAINST = ("llama.cpp", "OpenVINO", "transformers")


def ratios(result: Mapping) -> list[Ratio]:
    """Compare each figure of precast with the best peer that has the same number of bits."""
    found = []
    for members in groups(result).values():
        peers = [c for c in members.values() if c["label"].startswith(AGAINST)]
        for own in (c for n, c in members.items() if n.startswith("precast")):
            found += [r for f in figures(result) if (r := _ratio(own, peers, f))]
    return found


def _ratio(own: Mapping, peers: Sequence[Mapping], figure: Figure) -> Ratio | None:
    mine = value(own, figure)
    theirs = [(v, c["label"]) for c in peers if (v := value(c, figure)) is not None]
    if not mine or not theirs:
        return None
    best, label = max(theirs) if figure[2] else min(theirs)
    times = mine / best if figure[2] else best / mine
    return Ratio(own=own["label"], figure=figure[0], peer=label, times=times)


def _compared(result: Mapping) -> str:
    """Return a table with a line for each figure and a column for each precast contender."""
    found = ratios(result)
    owns = list(dict.fromkeys(r.own for r in found))
    if not owns:
        return ""
    lines = ["| times better than the best peer | " + " | ".join(owns) + " |", "|---|" + "---:|" * len(owns)]
    for title in dict.fromkeys(r.figure for r in found):
        cells = {r.own: f"{r.times:.2f}× {r.peer}" for r in found if r.figure == title}
        lines.append(f"| {title} | " + " | ".join(cells.get(own, "–") for own in owns) + " |")
    return "\n".join(lines)


def _behind(result: Mapping) -> str:
    found = ratios(result)
    if not found:
        return ""
    lines = [f"- {r.own}: {r.figure}: {r.times:.2f}× of {r.peer}" for r in found if r.times < 1]
    return "Where precast is behind:\n\n" + ("\n".join(lines) or "- nowhere among these figures")


def _shares(result: Mapping) -> str:
    lines = []
    for contender in result["contenders"].values():
        for length, p in contender.get("prompts", {}).items():
            if "decode_share" in p:
                share, work = p["decode_share"]["median"], p["prefill_share"]["median"]
                lines.append(f"| {contender['label']} | {length} | {share:.0%} | {work:.0%} |")
    if not lines:
        return ""
    title = "| | prompt | decode: share of the memory limit | prefill: share of the arithmetic peak |"
    return "\n".join([title, "|---|---:|---:|---:|", *lines])


def _machine(result: Mapping) -> str:
    found = result.get("machine")
    if not found:
        return ""
    peaks = ", ".join(
        f"{k.replace('_', ' ')} {v['median'] / 1e9:.0f} G op/s"
        for k, v in found.items()
        if not k.startswith("read")
    )
    return (
        f"{result['processor']}, {result['threads']} threads: reads"
        f" {found['read_bytes_per_s']['median'] / 1e9:.1f} GB/s; {peaks}."
    )


def _contexts(result: Mapping) -> str:
    lines = []
    for name, c in result.get("contexts", {}).items():
        sizes = [k for k in c if k != "ratio"]
        times = ", ".join(f"{c[s]['median'] * 1e3:.2f} ms at {s}" for s in sizes)
        lines.append(f"- {name}: a step takes {times}: {c['ratio']['median']:.3f}×")
    return "\n".join(lines)


def tables(result: Mapping) -> str:
    """Return the whole report in Markdown."""
    wanted = figures(result)
    head = "| SmolLM2-135M-Instruct | " + " | ".join(f[0] for f in wanted) + " |"
    lines = [head, "|---|" + "---:|" * len(wanted)]
    for members in groups(result).values():
        for name, contender in members.items():
            label = f"**{contender['label']}**" if name.startswith("precast") else contender["label"]
            lines.append(f"| {label} | {_row(contender, wanted)} |")
    parts = ["\n".join(lines), _shares(result), _contexts(result), _machine(result)]
    parts += [_compared(result), _behind(result)]
    return "\n\n".join(part for part in parts if part)
