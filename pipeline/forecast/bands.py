"""Bands for the health of a run, from the curves of a ladder's rungs: where each metric should be, how far along.

At each point of the run (0 to 1 of its length) what accuracies and explained variance lack to 1 falls as errors do
(`law`), and other metrics lie about a slightly bent line over the logs of images and parameters (`regression`), of
log(value / (1 - value)) for shares: nothing goes beyond its bounds, and the band holds what a further run would show
in 95 of 100 cases. Torch-free.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np

from pipeline.forecast.ladder import Rung, standard_error
from pipeline.forecast.law import LEAST_POINTS, TooFew, fit
from pipeline.forecast.regression import DRAWS, Belief, fit_lines
from pipeline.health.log import read_verdicts
from pipeline.run_directory import RunDirectory

COVERS = 0.95  # a run is measured often, and a band should not cry wolf
QUANTILES = [(1 - COVERS) / 2, (1 + COVERS) / 2]
GRID = np.linspace(0.0, 1.0, 11)  # rungs are measured some ten times
MOST_CURVE_POINTS = 200
LOOKED_AT = 256  # images of a split that a measurement looks at, at the least
SHORT_OF_ONE = ("explained_variance", "knn_top1", "ridge_top1")  # 1 less the value falls as errors do
OF_IMAGES = ("knn_top1", "ridge_top1")  # shares of images, measured no better than their number allows
SHARES = ("feature_spread", "attention_entropy")  # straight lines of log(value / (1 - value))
AT_LEAST_ONE = ("rankme",)  # straight lines of log(value)
LEAST = 1e-6  # that a share is away from 0 and 1
# Slopes per e-fold of images or parameters, the bend of the line over images, and scatter, before anything is seen.
SLOPE, BEND, SCATTER = (0.2, 0.3), (0.0, 0.1), {"rankme": 0.05, "feature_spread": 0.1, "attention_entropy": 0.1}
NARROWEST = {"rankme": 0.05}  # of its value, else a share: a band reaches so far around the nearest rung at the least
NARROWEST_SHARE = 0.02


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
    for metric in (*SHORT_OF_ONE, *SHARES, *AT_LEAST_ONE):
        having = [rung for rung in rungs if len(rung.curves.get(metric, ())) > 1]
        with suppress(TooFew):
            found[metric] = _band(metric, having, (samples, parameters))
    return found


def _band(metric: str, rungs: Sequence[Rung], target: tuple[int, int]) -> list[list[float]]:
    if not rungs:
        raise TooFew("no rung has measured it")
    curves = [np.array(rung.curves[metric], float) for rung in rungs]
    begins = max(curve[0, 0] for curve in curves)
    away = np.log([(rung.samples, rung.parameters) for rung in rungs]) - np.log(target)
    nearest = int((away**2).sum(axis=1).argmin())
    band = []
    for progress in GRID[GRID >= begins - 1e-9]:
        values = np.array([np.interp(progress, curve[:, 0], curve[:, 1]) for curve in curves])
        expected = _short_of_one if metric in SHORT_OF_ONE else _on_a_line
        low, high = expected(metric, values, rungs, target)
        band.append([float(progress), *_wide_enough(metric, low, high, float(values[nearest]))])
    return band


def _short_of_one(
    metric: str, values: np.ndarray, rungs: Sequence[Rung], target: tuple[int, int]
) -> tuple[float, float]:
    """Low and high by a law of 1 - value, as errors have (`law`)."""
    short = np.maximum(1 - values, 0.0)
    measured, own = np.zeros(len(rungs)), 0.0
    if metric in OF_IMAGES:
        measured = np.array([standard_error(one, LOOKED_AT) for one in short])
        own = float(np.median(measured))
    bound = 1.0 if metric in OF_IMAGES else 10 * max(1.0, float(short.max()))
    law = fit(short, [(rung.samples, rung.parameters) for rung in rungs], measured, bound=bound)
    _, low, high = law.predict(target, own, covers=COVERS)
    return 1 - high, 1 - low


def _on_a_line(metric: str, values: np.ndarray, rungs: Sequence[Rung], target: tuple[int, int]) -> tuple[float, float]:
    """Low and high by lines that bend a little over images: of the odds of a share, else of the logarithm."""
    is_share = metric in SHARES
    values = np.clip(values, LEAST, 1 - LEAST) if is_share else np.maximum(values, 1.0)
    y = np.log(values / (1 - values)) if is_share else np.log(values)
    rows, row = _predictors(np.log([(rung.samples, rung.parameters) for rung in rungs]), np.log(target))
    slopes, bends = [SLOPE] * (rows.shape[1] - 2), [BEND]
    means, deviations = zip((float(y.mean()), 1.0), *slopes, *bends, strict=True)
    random = np.random.default_rng(0)
    lines = fit_lines(rows, y, np.zeros(len(y)), Belief(means, deviations, SCATTER[metric]))
    weights, scatter = lines.draws(DRAWS, random)
    drawn = np.quantile(weights @ row + scatter * random.standard_normal(DRAWS), QUANTILES)
    low, high = 1 / (1 + np.exp(-drawn)) if is_share else np.exp(drawn)
    return float(low), float(high)


def _predictors(logs: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the rungs, and the row of the run: 1, the logs that differ, and the square of the first of those.

    TooFew where they are too few, and where the run differs from all rungs in what they have in common.
    """
    used = [place for place in (0, 1) if np.ptp(logs[:, place]) > 1e-9]
    apart = [place for place in (0, 1) if place not in used and abs(target[place] - logs[0, place]) > 1e-9]
    if not used or apart or len(logs) < LEAST_POINTS + len(used) - 1:
        raise TooFew(f"{len(logs)} rungs")
    every = np.vstack([logs, target])[:, used] - logs[:, used].mean(axis=0)
    square = every[:, :1] ** 2 - (every[:-1, :1] ** 2).mean()
    table = np.hstack([np.ones((len(every), 1)), every, square])
    return table[:-1], table[-1]


def _wide_enough(metric: str, low: float, high: float, nearest: float) -> tuple[float, float]:
    """The band, which holds the value of the rung that is nearest to the run with what runs scatter around it: a
    metric may end to grow, and a run that is as its largest rungs were is in no bad health."""
    scatter = NARROWEST[metric] * nearest if metric in NARROWEST else NARROWEST_SHARE
    low, high = min(low, nearest - scatter), max(high, nearest + scatter)
    lowest = 1.0 if metric in AT_LEAST_ONE else -np.inf if metric == "explained_variance" else 0.0
    return max(low, lowest), high if metric in AT_LEAST_ONE else min(high, 1.0)


def as_file(found: Mapping[str, Any], basis: str) -> dict[str, Any]:
    """What `RUN/bands.json` holds."""
    return {"format_version": 1, "basis": basis, "metrics": dict(found)}
