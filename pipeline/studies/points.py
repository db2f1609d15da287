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

    Two seeds or more: Student's t over them, which counts what training draws, and the bootstrap over test images that
    their evaluations made, which counts those: of two causes that know nothing of each other variances add, and more
    seeds on the same images make the second no smaller. One: the bootstrap alone.
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
        low, high = _added(mean, interval_over_seeds(scores), rows)
        basis = f"Student's t over {len(scores)} seeds, and bootstrap over images"
    else:
        low, high = rows[0]["interval"]
        basis = "bootstrap over images, one seed"
    return Point(*key, rows[0]["images"], rows[0]["petaflop"], len(scores), mean, low, high, basis)


def _added(mean: float, of_seeds: tuple[float, float], rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The interval of a mean of several seeds, with what the choice of test images does to each of them."""
    below = sum(row["accuracy"] - row["interval"][0] for row in rows) / len(rows)
    above = sum(row["interval"][1] - row["accuracy"] for row in rows) / len(rows)
    low, high = mean - math.hypot(mean - of_seeds[0], below), mean + math.hypot(of_seeds[1] - mean, above)
    return max(0.0, low), min(1.0, high)


def interval_over_seeds(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of scores in 0..1: Student's t with as many degrees of freedom less one."""
    from scipy.stats import t

    count = len(scores)
    mean = sum(scores) / count
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (count - 1))
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
    return max(0.0, mean - half), min(1.0, mean + half)
