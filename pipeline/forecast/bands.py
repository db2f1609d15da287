"""Bands for the health of a run, from the curves of a ladder's rungs: where each metric should be, how far along.

At each point of the run (0 to 1 of its length) the rungs' values lie about a line over the logs of images and
parameters (`regression`); the band holds what a further run would show in 95 of 100 cases. Torch-free.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from pipeline.forecast.ladder import Rung
from pipeline.forecast.law import LEAST_POINTS
from pipeline.forecast.regression import DRAWS, Belief, fit_lines
from pipeline.health.log import read_verdicts
from pipeline.run_directory import RunDirectory

COVERS = 0.95  # a run is measured often, and a band should not cry wolf
GRID = np.linspace(0.0, 1.0, 21)
MOST_CURVE_POINTS = 200
BOUNDS = {  # by metric: the least and the most it can be
    "explained_variance": (-np.inf, 1.0), "rankme": (1.0, np.inf), "feature_spread": (0.0, 1.0),
    "attention_entropy": (0.0, 1.0), "knn_top1": (0.0, 1.0), "ridge_top1": (0.0, 1.0),
}  # fmt: skip
IN_LOGS = ("rankme",)  # it grows with the width
OF_SHARES, OF_LOGS = (0.0, 0.1), (0.2, 0.3)  # slopes per e-fold of images or parameters, before anything is seen
SCATTER = 0.03


def health_curves(run: RunDirectory) -> dict[str, list[list[float]]]:
    """By metric, [progress, value] as the run's log of health tells it. {} where nothing was measured."""
    found: dict[str, dict[float, float]] = {}
    for one in chain.from_iterable(read_verdicts(run)):
        if one.value is not None:
            found.setdefault(one.metric, {})[one.progress] = one.value
    return {metric: _thinned(sorted(curve.items())) for metric, curve in found.items()}


def _thinned(curve: Sequence[tuple[float, float]]) -> list[list[float]]:
    every = -(-len(curve) // MOST_CURVE_POINTS)
    kept = list(curve[::every])
    return [list(point) for point in (kept if kept[-1] == curve[-1] else [*kept, curve[-1]])]


def bands(rungs: Sequence[Rung], samples: int, parameters: int) -> dict[str, list[list[float]]]:
    """By metric, [progress, low, high] for a run of so many images and parameters; where enough rungs have it."""
    found = {}
    for metric in dict.fromkeys(metric for rung in rungs for metric in rung.curves if metric in BOUNDS):
        having = [rung for rung in rungs if len(rung.curves.get(metric, ())) > 1]
        if len(having) >= LEAST_POINTS and (band := _band(metric, having, samples, parameters)):
            found[metric] = band
    return found


def _band(metric: str, rungs: Sequence[Rung], samples: int, parameters: int) -> list[list[float]]:
    curves = [np.array(rung.curves[metric], float) for rung in rungs]
    logs = np.log([(rung.samples, rung.parameters) for rung in rungs])
    used = [place for place in (0, 1) if np.ptp(logs[:, place]) > 1e-9]
    centre, target = logs.mean(axis=0), np.log([samples, parameters])
    rows = np.column_stack([np.ones(len(rungs)), *(logs[:, place] - centre[place] for place in used)])
    row = np.array([1.0, *(target[place] - centre[place] for place in used)])
    begins = max(curve[0, 0] for curve in curves)
    least, most = BOUNDS[metric]
    band = []
    for progress in GRID[GRID >= begins - 1e-9]:
        values = np.array([np.interp(progress, curve[:, 0], curve[:, 1]) for curve in curves])
        low, high = _expected(values, rows, row, logarithmic=metric in IN_LOGS)
        band.append([float(progress), *(float(np.clip(bound, least, most)) for bound in (low, high))])
    return band


def _expected(values: np.ndarray, rows: np.ndarray, row: np.ndarray, *, logarithmic: bool) -> tuple[float, float]:
    y = np.log(np.maximum(values, 1e-9)) if logarithmic else values
    slope, width = OF_LOGS if logarithmic else OF_SHARES
    others = rows.shape[1] - 1
    belief = Belief((float(y.mean()), *[slope] * others), (1.0, *[width] * others), SCATTER)
    random = np.random.default_rng(0)
    weights, scatter = fit_lines(rows, y, np.zeros(len(y)), belief).draws(DRAWS, random)
    drawn = weights @ row + scatter * random.standard_normal(DRAWS)
    low, high = np.quantile(np.exp(drawn) if logarithmic else drawn, [(1 - COVERS) / 2, (1 + COVERS) / 2])
    return float(low), float(high)


def as_file(found: Mapping[str, Any], basis: str) -> dict[str, Any]:
    """What `RUN/bands.json` holds."""
    return {"format_version": 1, "basis": basis, "metrics": dict(found)}
