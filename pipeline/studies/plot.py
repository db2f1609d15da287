"""A study's plot: accuracy against the images pretrained on, and against what pretraining computed.

One panel above the other, so that a telephone shows it as it is. Colours are those of Okabe and Ito, which people tell
apart who see no red or no green; networks also differ in their markers, and objectives in their lines.
"""

import io
from collections.abc import Sequence

from pipeline.studies.points import Point, at_longest
from pipeline.words import number_in_words

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES = ("o", "s", "^", "D", "v", "P"), ("-", "--", ":", "-.")
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 10, "font.family": "sans-serif"}


def draw(points: Sequence[Point], title: str, scored: str) -> str:
    """The plot as SVG, the same text for the same points. `scored` says what the accuracy is of."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 7.4), layout="constrained", facecolor="white")
        by_images, by_compute = figure.subplots(2, 1, sharey=True)
        _draw_panel(by_images, points, at_longest(points), "images")
        along, unit = _along_compute(points), "petaFLOP"
        if along and max(point.petaflop for point in along) < 0.1:
            along, unit = [point._replace(petaflop=1000 * point.petaflop) for point in along], "teraFLOP"
        _draw_panel(by_compute, points, along, "petaflop")
        by_images.set_xlabel("images pretrained on")
        several = len({point.length for point in points}) > 1
        by_compute.set_xlabel(f"pretraining compute, {unit}{', of all images' if several else ''}")
        for axes in (by_images, by_compute):
            axes.set_ylabel(f"top-1, {scored}, %")
        by_images.set_title(title, fontsize=10)
        lines = by_images.get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _along_compute(points: Sequence[Point]) -> list[Point]:
    """Those that differ in compute: of runs of several lengths all data alone, else every amount of it."""
    if len({point.length for point in points}) == 1:
        return list(points)
    return [point for point in points if point.fraction == max(one.fraction for one in points)]


def _draw_panel(axes, points: Sequence[Point], shown: Sequence[Point], quantity: str) -> None:
    """Colours and markers are of all `points`, so that both panels have the same."""
    networks = list(dict.fromkeys(point.network for point in points))
    objectives = list(dict.fromkeys(point.objective for point in points))
    for objective, network in ((o, n) for o in objectives for n in networks):
        line = sorted(
            (point for point in shown if (point.network, point.objective) == (network, objective)),
            key=lambda point: getattr(point, quantity),
        )
        if not line:
            continue
        colour, line_style = networks.index(network), objectives.index(objective)
        errors = [[100 * max(0.0, point.accuracy - point.low) for point in line],
                  [100 * max(0.0, point.high - point.accuracy) for point in line]]  # fmt: skip
        axes.errorbar(
            [getattr(point, quantity) for point in line], [100 * point.accuracy for point in line], yerr=errors,
            color=COLOURS[colour % len(COLOURS)], marker=MARKERS[colour % len(MARKERS)],
            linestyle=LINES[line_style % len(LINES)], linewidth=1.5, markersize=5, capsize=3,
            label=f"{network}, {objective}" if len(objectives) > 1 else network,
        )  # fmt: skip
    axes.set_xscale("log")
    _mark(axes, sorted({getattr(point, quantity) for point in shown}))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _mark(axes, values: Sequence[float]) -> None:
    """A few of the amounts themselves, not too close, or the logarithmic scale's own marks; without exponents."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: _amount(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    marks: list[float] = []
    for value in values:
        if not marks or value > 1.6 * marks[-1]:
            marks.append(value)
    if len(marks) <= 6:
        axes.set_xticks(marks)
        axes.xaxis.set_minor_locator(NullLocator())


def _amount(value: float) -> str:
    return number_in_words(value) if value >= 0.01 else f"{value:.2g}"
