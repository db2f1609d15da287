"""Charts of the certificate's page as inline SVG and plain HTML; colours come from the page's style."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, FOOT = 320, 120, 18  # of a histogram, in the SVG's own units
MOST_COLUMNS = 1000  # of a skyline, which is as many units wide


def histogram(title: str, bars: Sequence[Mapping[str, int]], unit: str, ends: Sequence[int] | None = None) -> str:
    """Bars of `from`, `to`, `count`; labelled at both ends: with `ends`, the least and greatest value, where known."""
    if not bars:
        return ""
    most, total = max(bar["count"] for bar in bars), sum(bar["count"] for bar in bars)
    least, greatest = ends or (bars[0]["from"], bars[-1]["to"] - 1)
    step = WIDTH / len(bars)
    width = min(step, 48.0)
    shapes = []
    for number, bar in enumerate(bars):
        height = max(bar["count"] / most * (HEIGHT - FOOT - 6), 1.5 if bar["count"] else 0)
        x, y = number * step + (step - width) / 2 + 0.5, HEIGHT - FOOT - height
        words = f"{_size(max(bar['from'], least), unit)} to {_size(min(bar['to'] - 1, greatest), unit)}"
        words = f"{_size(least, unit) if least == greatest else words}: {bar['count']:,}"
        shapes.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height:.1f}" rx="1.5">'
            f"<title>{escape(words)}</title></rect>"
        )
    first, last = _size(least, unit), _size(greatest, unit)
    axis = f'<line x1="0" y1="{HEIGHT - FOOT}" x2="{WIDTH}" y2="{HEIGHT - FOOT}"/>'
    if least == greatest:
        axis += f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{first}</text>'
    else:
        axis += f'<text x="0" y="{HEIGHT - 4}">{first}</text>'
        axis += f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{last}</text>'
    label = f"{title}: {total:,} images {f'of {first}' if least == greatest else f'from {first} to {last}'}"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(shapes)}{axis}</svg></figure>'
    )


def class_skyline(classes: Sequence[Mapping[str, Any]], splits: Sequence[str]) -> str:
    """A column per class, the largest first, stacked by split; of more than MOST_COLUMNS classes, one of every few."""
    ordered = sorted(classes, key=lambda one: -sum(one[split] for split in splits))
    total = len(ordered)
    if total > MOST_COLUMNS:
        ordered = [ordered[number * (total - 1) // (MOST_COLUMNS - 1)] for number in range(MOST_COLUMNS)]
    most = max(1, sum(ordered[0][split] for split in splits))
    width, height = 1000.0, 160.0
    step = width / len(ordered)
    gap = min(step * 0.2, 4.0)
    shapes = []
    for number, one in enumerate(ordered):
        y = height
        words = f"{one['name']}: " + ", ".join(f"{one[split]:,} {split}" for split in splits)
        for split in splits:
            tall = one[split] / most * height
            y -= tall
            shapes.append(
                f'<rect class="{split}" x="{number * step:.2f}" y="{y:.2f}" width="{step - gap:.2f}" '
                f'height="{tall:.2f}"><title>{escape(words)}</title></rect>'
            )
    label = f"Images per class, {total} classes, the largest first"
    return (
        f'<svg class="skyline" viewBox="0 0 {width:.0f} {height:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{"".join(shapes)}</svg>'
    )


def split_bar(counts: Mapping[str, int], most: int) -> str:
    """One line, as long as its share of `most`, coloured by split."""
    parts = "".join(
        f'<i class="{split}" style="width:{100 * count / max(1, most):.2f}%"></i>'
        for split, count in counts.items()
        if count
    )
    return f'<span class="bar" aria-hidden="true">{parts}</span>'


def shares(title: str, counts: Mapping[str, int], total: int) -> str:
    """Names with their counts and a bar of their share."""
    if not counts:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class=number>{count:,}</td><td class=share>{split_bar({'all': count}, total)}"
        "</td></tr>"
        for name, count in counts.items()
    )
    return f'<div class="shares"><h3>{escape(title)}</h3><table>{rows}</table></div>'


def colour_statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> str:
    """Per channel: a line from 0 to 1 with mean and one standard deviation to each side."""
    if not mean or not std:
        return ""
    names = ("red", "green", "blue") if len(mean) == 3 else tuple(f"channel {number}" for number in range(len(mean)))
    rows = []
    for name, centre, spread in zip(names, mean, std, strict=True):
        low, high, kind = max(0.0, centre - spread), min(1.0, centre + spread), name.split()[0]
        drawn = (
            '<line class="rule" x1="0" y1="8" x2="200" y2="8"/>'
            f'<line class="{kind}" x1="{200 * low:.1f}" y1="8" x2="{200 * high:.1f}" y2="8"/>'
            f'<circle class="{kind}" cx="{200 * centre:.1f}" cy="8" r="5"/>'
        )
        rows.append(
            f'<tr><td>{name}</td><td><svg class="spread" viewBox="-6 0 212 16" aria-hidden="true">{drawn}</svg></td>'
            f"<td class=number>{centre:.4f} ± {spread:.4f}</td></tr>"
        )
    title = "<h3>Mean and deviation of pixels, 0 to 1</h3>"
    weighting = '<p class="quiet">Over images: each counts the same, whatever its size.</p>'
    return f'<div class="shares">{title}{weighting}<table>{"".join(rows)}</table></div>'


def _size(value: int, unit: str) -> str:
    if unit != "bytes":
        return f"{value:,} {unit}"
    for size, word in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value} B"
