"""Format quantities for people."""


def size_text(count: int | None) -> str:
    """Format a number of bytes, as in "1.2 MB"; None becomes a dash."""
    if count is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
