"""Charts of a report as inline SVG: curves with their bands, and scores with their intervals."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from pipeline.pages.parts import Html
from pipeline.report.ledger import Curve

WIDTH, HEIGHT = 360, 190  # in the SVG's own units
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
LOGARITHMIC = 5  # greatest by least value, from which on an axis that may be is logarithmic
FEWEST_JOINED = 3  # points that a line is drawn through: two say nothing of what lies between
MOST_MARKS = 40  # points of a curve up to which each is marked


class Line(NamedTuple):
    """A curve by name; `kind` is its class in the page's style."""

    name: str
    curve: Curve
    kind: str = "one"


Band = Sequence[tuple[float, float, float]]  # step, low, high


def line_chart(
    title: str, lines: Sequence[Line], *, band: Band = (), last_step: float = 0, logarithmic: bool = False
) -> Html:  # fmt: skip
    """Lines over steps, and behind them what was expected. `logarithmic`: the axis may be, where that shows more."""
    lines = [line for line in lines if line.curve.steps]
    if not lines:
        return Html()
    values = [value for line in lines for value in (*line.curve.lows, *line.curve.highs)]
    values += [value for _, low, high in band for value in (low, high)]
    axis = _Axis.of(values, logarithmic)
    steps = [step for line in lines for step in line.curve.steps] + [step for step, _, _ in band]
    span = (min(0.0, *steps), max(last_step, *steps) or 1)

    def x(step: float) -> float:
        return LEFT + (step - span[0]) / (span[1] - span[0]) * (WIDTH - LEFT - RIGHT)

    shapes = [_grid(axis), _steps_axis(span)]
    if band:
        shapes.append(
            f'<path class="band" d="{_area([(x(step), axis.y(low), axis.y(high)) for step, low, high in band])}"/>'
        )
    for line in lines:
        shapes.append(_drawn(line, x, axis))
    said = "; ".join(f"{line.name}: {_in_words(line.curve)}" for line in lines)
    label = f"{title}. {said}" + ("; the band is what was expected" if band else "")
    legend = "".join(
        f'<span><i class="{line.kind}"></i>{escape(line.name)} {_short(line.curve.last)}</span>' for line in lines
    )
    legend += '<span><i class="expected"></i>expected</span>' if band else ""
    scale = " <small>logarithmic</small>" if axis.logarithmic else ""
    return Html(
        f'<figure class="curve"><figcaption><b>{escape(title)}</b>{scale}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(shapes)}</svg>'
        f'<p class="legend">{legend}</p></figure>'
    )


def _drawn(line: Line, x, axis: "_Axis") -> str:
    curve = line.curve
    points = [(x(step), axis.y(value)) for step, value in zip(curve.steps, curve.means, strict=True)]
    spread, path = "", ""
    radius = 2.4 if len(points) >= FEWEST_JOINED else 3.6
    if len(points) >= FEWEST_JOINED:
        joined = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in points)
        path = f'<path class="line {line.kind}" d="{joined}"/>'
    if curve.lows != curve.highs:
        edges = zip(curve.steps, curve.lows, curve.highs, strict=True)
        area = _area([(x(step), axis.y(low), axis.y(high)) for step, low, high in edges])
        spread = f'<path class="spread-of {line.kind}" d="{area}"/>'
    few = len(points) <= MOST_MARKS
    marks = [
        f'<circle class="{line.kind}" cx="{left:.1f}" cy="{top:.1f}" r="{radius}"><title>step {step:,.0f}: '
        f"{_short(value)}</title></circle>"
        for (left, top), step, value in zip(points, curve.steps, curve.means, strict=True)
    ]
    return f"{spread}{path}{''.join(marks if few else marks[-1:])}"


def _area(edges: Sequence[tuple[float, float, float]]) -> str:
    """Between two lines: (x, y of the lower, y of the upper), from left to right."""
    there = [f"{left:.1f} {high:.1f}" for left, _, high in edges]
    back = [f"{left:.1f} {low:.1f}" for left, low, _ in reversed(edges)]
    return "M" + "L".join([*there, *back]) + "Z"


class _Axis(NamedTuple):
    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[float], may_be_logarithmic: bool) -> "_Axis":
        low, high = min(values), max(values)
        if may_be_logarithmic and low > 0 and high / low >= LOGARITHMIC:
            return cls(low, high, True)
        margin = 0.04 * (high - low) or abs(high) * 0.05 or 1.0
        below = 0.0 if 0 <= low < margin else low - margin
        return cls(below, high + margin, False)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    @property
    def ticks(self) -> list[float]:
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            found = [tick for tick in found if self.low <= tick <= self.high]
            tens = [tick for tick in found if f"{tick:.0e}".startswith("1")]
            return found if len(found) <= 5 else tens[:: -(-len(tens) // 5)]
        return _round_ticks(self.low, self.high)


def _round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def _grid(axis: _Axis) -> str:
    return "".join(
        f'<line x1="{LEFT}" y1="{axis.y(tick):.1f}" x2="{WIDTH - RIGHT}" y2="{axis.y(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{axis.y(tick) + 3.5:.1f}" text-anchor="end">{_short(tick)}</text>'
        for tick in axis.ticks
    )


def _steps_axis(span: tuple[float, float]) -> str:
    return (
        f'<text x="{LEFT}" y="{HEIGHT - 7}">step {span[0]:,.0f}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 7}" text-anchor="end">{span[1]:,.0f}</text>'
    )


def _in_words(curve: Curve) -> str:
    first, last = _short(curve.means[0]), _short(curve.last)
    return f"{first} at step {curve.steps[0]:,.0f}, {last} at step {curve.steps[-1]:,.0f}"


def _short(value: float) -> str:
    """A number as an axis has room for it."""
    size = abs(value)
    if size and (size < 0.001 or size >= 1e6):
        return f"{value:.2g}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


class Score(NamedTuple):
    """A share from 0 to 1 with its interval, where it has one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    kind: str = "one"


def score_chart(title: str, scores: Sequence[Score]) -> Html:
    """A row per score: a dot, and the line of its interval."""
    known = [value for score in scores for value in (score.value, score.low, score.high) if value is not None]
    low, high = min(known), max(known)
    margin = 0.06 * (high - low) or 0.02
    low, high = max(0.0, low - margin), min(1.0, high + margin)

    def x(value: float) -> float:
        return 100 * (value - low) / (high - low or 1)

    rows = []
    for score in scores:
        whisker, between = "", ""
        if score.low is not None and score.high is not None:
            whisker = f'<i style="left:{x(score.low):.2f}%;width:{x(score.high) - x(score.low):.2f}%"></i>'
            between = f"<span>[{100 * score.low:.1f}, {100 * score.high:.1f}]</span>"
        drawn, value = f'{whisker}<b style="left:{x(score.value):.2f}%"></b>', f"<b>{100 * score.value:.2f}</b>"
        rows.append(
            f'<tr><th scope="row">{escape(score.name)}</th><td class="plot"><div class="range {score.kind}" '
            f'aria-hidden="true">{drawn}</div></td><td class="number">{value} {between}</td></tr>'
        )
    scale = f"<small>{100 * low:.1f} to {100 * high:.1f} %</small>"
    return Html(f'<table class="scores"><caption>{escape(title)} {scale}</caption>{"".join(rows)}</table>')
