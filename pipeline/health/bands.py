"""What is to be expected of a run's health as it goes on: bands of each metric over the share of the run. Torch-free.

`RUN/bands.json`: {"format_version": 1, "basis": words that say where they come from, "metrics": {metric:
[[progress, low, high], ...]}}. It is written before a run is submitted; without it there is nothing to compare with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, near_matches
from pipeline.run_directory import read_json

FILE = "bands.json"
FORMAT_VERSION = 1
METRICS = {  # and how a person says them
    "explained_variance": "explained variance",
    "rankme": "RankMe",
    "feature_spread": "feature spread",
    "attention_entropy": "attention entropy",
    "knn_top1": "20-NN",
    "ridge_top1": "ridge",
}


@dataclass(frozen=True)
class Bands:
    """Per metric, points (progress, low, high) in the order of progress; `basis` says in words where they come from."""

    basis: str
    metrics: dict[str, tuple[tuple[float, float, float], ...]]

    def at(self, metric: str, progress: float) -> tuple[float, float] | None:
        """Low and high at a share of the run, on straight lines between points; None before the first and without any.

        Behind the last point its band holds.
        """
        points = self.metrics.get(metric, ())
        if not points or progress < points[0][0] - 1e-9:
            return None
        for (before, *first), (after, *second) in zip(points, points[1:], strict=False):
            if progress <= after:
                share = (progress - before) / (after - before)
                return tuple(one + share * (other - one) for one, other in zip(first, second, strict=True))
        return points[-1][1:]


def read_bands(run: Path) -> Bands | None:
    """The bands of a run directory; None where it has none. InputError for a file that is no such thing."""
    path = run / FILE
    try:
        content = read_json(path)
    except ValueError as error:
        raise InputError(str(error)) from None
    return None if content is None else bands_of(content, str(path))


def bands_of(content: Any, where: str) -> Bands:
    """Of the content of a bands file; InputError names the file, the metric, the point and the rule."""
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise InputError(f"{where}: metrics: not there; expected {{metric: [[progress, low, high], ...]}}")
    if (version := content.get("format_version")) != FORMAT_VERSION:
        raise InputError(f"{where}: format_version: {version!r}, and this program reads {FORMAT_VERSION}; make it anew")
    metrics = {metric: _points(points, f"{where}: {metric}") for metric, points in content["metrics"].items()}
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise InputError(f"{where}: {unknown[0]}: no metric of health; {near_matches(unknown[0], METRICS)}")
    return Bands(str(content.get("basis", "")), metrics)


def _points(points: Any, where: str) -> tuple[tuple[float, float, float], ...]:
    if not isinstance(points, Sequence) or isinstance(points, str):
        raise InputError(f"{where}: {points!r} is no list of [progress, low, high]")
    for point in points:
        if not (isinstance(point, Sequence) and len(point) == 3 and all(map(is_number, point))):
            raise InputError(f"{where}: {point!r} is not [progress, low, high], three finite numbers")
        progress, low, high = point
        if not (0 <= progress <= 1 and low <= high):
            raise InputError(f"{where}: {point!r}: progress must be from 0 to 1, and low not above high")
    if any(one[0] >= other[0] for one, other in zip(points, points[1:], strict=False)):
        raise InputError(f"{where}: the points must be in the order of their progress, each once")
    return tuple((float(a), float(b), float(c)) for a, b, c in points)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
