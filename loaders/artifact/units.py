"""Numbers as people read them."""


def size_text(count: int | None) -> str:
    """A number of bytes; a dash for None."""
    if count is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
