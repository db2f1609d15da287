"""Sheets of labelled panels, the form of most pictures here.

Sizes are laid out in pixels from what the sheet holds, so that nothing is clipped at any number of images, heads or
patches. Drawn by matplotlib without pyplot: no window, no state between two pictures. Maps are viridis, which is even
in brightness and can be told apart by colour-blind eyes.
"""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

COLOURS = "viridis"
DPI = 100
GAP, MARGIN, CAPTION, TITLE, LINE = 8, 14, 20, 32, 17  # pixels
NAME_LETTERS, LETTER = 20, 7.0  # of a row's name; pixels that a letter of the small font is wide, at most


class Panel(NamedTuple):
    """One panel: (h, w, 3) in 0..1, drawn as it is, or (h, w), drawn by the sheet's scale; NaN stays white."""

    pixels: np.ndarray
    caption: str = ""


class Scale(NamedTuple):
    """What the colours of a map mean."""

    label: str
    low: float
    high: float


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of so many pixels."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def drawn(figure: Figure) -> Image.Image:
    """The figure as pixels."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy())


def panel_sheet(
    rows: Sequence[Sequence[Panel]], *, title: str, note: str = "", row_names: Sequence[str] = (),
    scale: Scale | None = None, panel_pixels: int = 112,
) -> Image.Image:  # fmt: skip
    """Rows of panels under a title; `panel_pixels` is the longer side of the panels, whose ratio is the first one's."""
    size = rows[0][0].pixels.shape[:2]
    height, width = (round(panel_pixels * side / max(size)) for side in size)
    cell = max([width, *(round(LETTER * len(panel.caption)) for row in rows for panel in row)])
    left = MARGIN + (round(LETTER * min(NAME_LETTERS, max(map(len, row_names)))) + GAP if row_names else 0)
    columns = max(map(len, rows))
    right = 92 if scale else MARGIN
    total = max(left + columns * (cell + GAP) + right, 460, round(9.6 * len(title)) + 2 * MARGIN)
    lines = textwrap.wrap(note, int((total - 2 * MARGIN) / LETTER)) if note else []
    top = MARGIN + TITLE + LINE * len(lines)
    tops = _tops(rows, top, height)
    tall = round(LETTER * len(scale.label)) + GAP if scale else 0  # of the colour bar, whose label stands along it
    whole = max(tops[-1], tops[0] + tall) + MARGIN
    figure = new_figure(total, whole)
    _text(figure, MARGIN, MARGIN, title, size=11, weight="bold")
    for number, line in enumerate(lines):
        _text(figure, MARGIN, MARGIN + TITLE - 8 + LINE * number, line, color="0.25")
    for number, row in enumerate(rows):
        if row_names:
            _text(figure, MARGIN, tops[number] + height / 2 - 7, short_name(row_names[number]))
        for column, panel in enumerate(row):
            x = left + column * (cell + GAP) + (cell - width) / 2
            _text(figure, x + width / 2, tops[number] - CAPTION + 3, panel.caption, ha="center")
            axes = figure.add_axes((x / total, 1 - (tops[number] + height) / whole, width / total, height / whole))
            _draw(axes, panel, scale)
    if scale:
        x = left + columns * (cell + GAP) + GAP
        _colour_bar(figure, (x / total, 1 - (tops[0] + tall) / whole, 12 / total, tall / whole), scale)
    return drawn(figure)


def short_name(name: str) -> str:
    """A name that fits beside a row: of a long one the beginning and the end."""
    half = NAME_LETTERS // 2
    return name if len(name) <= NAME_LETTERS else f"{name[: half - 1]}…{name[-half:]}"


def _tops(rows: Sequence[Sequence[Panel]], start: int, height: int) -> list[int]:
    """Where each row's panels begin, and where the last end, pixels from the top."""
    tops, y = [], start
    for row in rows:
        y += CAPTION if any(panel.caption for panel in row) else 0
        tops.append(y)
        y += height + GAP
    return [*tops, y]


def _draw(axes, panel: Panel, scale: Scale | None) -> None:
    limits = {} if panel.pixels.ndim == 3 else {"cmap": COLOURS, "vmin": scale.low, "vmax": scale.high}
    axes.imshow(panel.pixels, aspect="auto", **limits)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set(linewidth=0.5, color="0.6")


def _colour_bar(figure: Figure, place: tuple[float, float, float, float], scale: Scale) -> None:
    axes = figure.add_axes(place)
    bar = figure.colorbar(ScalarMappable(Normalize(scale.low, scale.high), COLOURS), cax=axes)
    bar.set_label(scale.label, fontsize=8)
    bar.set_ticks([scale.low, (scale.low + scale.high) / 2, scale.high])
    bar.ax.tick_params(labelsize=8)


def _text(figure: Figure, x: float, y: float, words: str, *, size: float = 8, **style) -> None:
    """Write `words` with their top at (x, y) pixels from the upper left corner."""
    width, height = figure.get_size_inches() * DPI
    figure.text(x / width, 1 - y / height, words, fontsize=size, va="top", **style)
