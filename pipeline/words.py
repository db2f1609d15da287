"""Numbers, sizes and durations as a person says them, and tables of them. Torch-free."""

from collections.abc import Iterator, Sequence

_UNITS = (("y", 31_557_600, "d", 86400), ("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))


def number_in_words(number: float) -> str:
    """`1,048`, `12.3`, `0.35`, `less than 0.01`: three digits that count, and never an exponent."""
    if 0 < number < 0.01:
        return "less than 0.01"
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.3g}"


def bytes_in_words(size: float) -> str:
    """`512.0 MiB`, `3.25 GiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def duration_in_words(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 13 min`, `4 d 6 h`, `12 y 80 d`: two units at most."""
    seconds = round(seconds)
    for unit, size, smaller, smaller_size in _UNITS:
        if seconds >= size:
            rest = seconds % size // smaller_size
            return f"{seconds // size:,} {unit} {rest} {smaller}" if rest else f"{seconds // size:,} {unit}"
    return f"{seconds} s"


def in_columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A line for each row, as wide as their cells ask; every row has as many."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
