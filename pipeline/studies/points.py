"""From a study's runs to the points of its plot: the mean over seeds, and how far it can be trusted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LEVEL = 0.95
KEYS = ("network", "objective", "fraction", "length")  # what a point is one of


class Point(NamedTuple):
    """One network that learned from one share of the data by one objective for so long."""

    network: str
    objective: str
    fraction: float
    length: float  # by the study's own
    images: int  # that it was pretrained on
    petaflop: float  # of its pretraining, forward and backward
    seeds: int
    accuracy: float
    low: float  # of the 95 % interval
    high: float
    basis: str  # what the interval is over


def at_longest(points: Sequence[Point]) -> list[Point]:
    """Those by which amounts of data are compared."""
    return [point for point in points if point.length == max(one.length for one in points)]


def points_of(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Of every cell that has a score: the mean of its seeds and the interval, in the order of the rows.

    Two seeds or more: Student's t over them, which counts what training draws and not which images were tested. One:
    the bootstrap over test images that its evaluation made, which counts those and not what training draws.
    """
    cells: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["accuracy"] is not None:
            cells.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    return [_point(key, of_cell) for key, of_cell in cells.items()]


def _point(key: tuple, rows: Sequence[Mapping[str, Any]]) -> Point:
    scores = [row["accuracy"] for row in rows]
    mean = sum(scores) / len(scores)
    if len(scores) > 1:
        low, high = interval_over_seeds(scores)
        basis = f"Student's t over {len(scores)} seeds"
    else:
        low, high = rows[0]["interval"]
        basis = "bootstrap over images, one seed"
    return Point(*key, rows[0]["images"], rows[0]["petaflop"], len(scores), mean, low, high, basis)


def interval_over_seeds(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of scores in 0..1: Student's t with as many degrees of freedom less one."""
    from scipy.stats import t

    count = len(scores)
    mean = sum(scores) / count
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (count - 1))
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
    return max(0.0, mean - half), min(1.0, mean + half)
