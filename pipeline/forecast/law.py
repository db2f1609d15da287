"""How an error falls with images seen and with parameters: a saturating power law, fitted to a few small runs.

    E = a + b * images^-c * parameters^-e,   a >= 0, c >= 0

Errors fall as power laws of data (Hestness et al. 2017, arXiv:1712.00409), of parameters and of compute (Kaplan et
al. 2020, arXiv:2001.08361), towards an error a that more of them does not take away. Zhai et al. 2022
(arXiv:2106.04560, section 2.1) fit E = a + b (x + d)^-c, where d lets errors level off at that of guessing. With a
handful of small runs d cannot be told from c; a second family of laws, of the odds (E - a) / (bound - E) in the place
of E - a, levels off at the worst error there is. Few points leave much open, so no single curve is fitted: of both
families every floor a on a grid, and every line of the logarithm under it, counts by how well it agrees with the runs
(`regression`). What is said is an 80 % interval of what a new run would score, and it widens with the distance from
the runs. Torch-free.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pipeline.forecast.regression import DRAWS, Belief, Lines, fit_lines

COVERS = 0.8  # of an interval: how often it is to hold the outcome
FLOORS = np.linspace(0.0, 0.9, 13)  # values of a, as shares of the least error; at 1 log(E - a) has no value
OF_FLOORS = 2 * np.log(1 - FLOORS)  # log of the belief in them: small runs are mostly far from their floor
CONCAVE = 2.0  # standard errors of the curvature of log errors
LEAST_SHARE = 1e-4  # of the worst error: nearer to none or to all of it nothing is told apart
LEAST_POINTS = 4  # for one predictor; one more for each further one
# Before any run: exponents of images are about 0.3 (Hestness et al. found 0.07 to 0.35, in image classification 0.3),
# of short runs larger, on digits above 1; of parameters less, and where data are few a larger network may be worse.
# Runs alike but for their seed differ by some 4 % of their error.
OF_IMAGES, OF_PARAMETERS, SCATTER = (-0.4, 0.5), (-0.15, 0.25), 0.04


class Interval(NamedTuple):
    """The middle of what is expected, and the bounds that hold it in 80 of 100 cases."""

    value: float
    low: float
    high: float


class NoForecast(ValueError):
    """Runs do not tell what another will score; says why."""


class TooFew(NoForecast):
    """Too few different points for a fit; says how many there must be."""


class TooEarly(NoForecast):
    """The runs have learned too little for a power law to have begun."""


@dataclass(frozen=True)
class Branch:
    """The lines under one floor, of log(E - a), or of log((E - a) / (bound - E)) where errors `level_off` at the worst
    one, as near chance they must."""

    floor: float
    levels_off: bool
    lines: Lines

    def errors(self, heights: np.ndarray, bound: float) -> np.ndarray:
        """From where lines are to errors."""
        if not self.levels_off:
            return self.floor + np.exp(heights)
        share = 1 / (1 + np.exp(-heights))
        return self.floor + (bound - self.floor) * share


@dataclass(frozen=True)
class Law:
    """The laws that agree with some runs, weighed; `centre` (P,) of the predictors' logs, `bound` the worst error."""

    branches: tuple[Branch, ...]
    centre: np.ndarray
    used: tuple[int, ...]  # the predictors that differ between the runs
    bound: float

    def predict(
        self, predictors: Sequence[float], error_of_measuring: float = 0.0, *, covers: float = COVERS
    ) -> Interval:
        """What one further run would score; `predictors` are as at `fit`, positive.

        TooFew where a predictor that was the same in every run is another here.
        """
        errors = self.draws(predictors, error_of_measuring)
        low, middle, high = np.quantile(errors, [(1 - covers) / 2, 0.5, (1 + covers) / 2])
        return Interval(float(middle), float(low), float(high))

    def draws(self, predictors: Sequence[float], error_of_measuring: float = 0.0) -> np.ndarray:
        """(DRAWS,) errors of one further run, each as likely as the next."""
        logs = np.log(np.asarray(predictors, float))
        for place in range(len(logs)):
            if place not in self.used and abs(logs[place] - self.centre[place]) > 1e-9:
                raise TooFew(f"predictor {place} is the same in all runs, and another here")
        row = np.array([1.0, *(logs[place] - self.centre[place] for place in self.used)])
        random = np.random.default_rng(0)
        evidence = np.array([np.logaddexp.reduce(branch.lines.log_evidence) for branch in self.branches])
        shares = np.exp(evidence - evidence.max())
        counts = random.multinomial(DRAWS, shares / shares.sum())
        found = []
        for branch, count in zip(self.branches, counts, strict=True):
            weights, scatter = branch.lines.draws(count, random)
            if self.used[0] == 0:
                weights[:, 1] = np.minimum(weights[:, 1], 0.0)  # more images make no error larger
            errors = branch.errors(weights @ row, self.bound)
            found.append(errors * np.exp(scatter * random.standard_normal(count)))
        true = np.clip(np.concatenate(found), 0.0, self.bound)  # what is measured may be beyond it by chance
        return np.clip(true + error_of_measuring * random.standard_normal(DRAWS), 0.0, max(1.0, self.bound))


def fit(
    errors: Sequence[float], predictors: Sequence[Sequence[float]], measured: Sequence[float], *, bound: float = 1.0
) -> Law:
    """The laws that agree with runs: their `errors` in (0, bound], the `measured` standard errors of those, and of each
    run its predictors, images seen and parameters. TooFew where they cannot say anything."""
    if len(errors) == 0:
        raise TooFew("no run is done")
    y, logs, measured_errors = np.asarray(errors, float), np.log(np.asarray(predictors, float)), np.asarray(measured)
    used = tuple(place for place in range(logs.shape[1]) if np.ptp(logs[:, place]) > 1e-9)
    needed = LEAST_POINTS + max(0, len(used) - 1)
    if len(y) < needed or not used:
        raise TooFew(f"{len(y)} runs, and a fit needs {needed} that differ")
    centre = logs.mean(axis=0)
    rows = np.column_stack([np.ones(len(y)), *(logs[:, place] - centre[place] for place in used)])
    y = np.clip(y, LEAST_SHARE * bound, (1 - LEAST_SHARE) * bound)  # no error at all has no logarithm
    slopes = [(OF_IMAGES, OF_PARAMETERS)[min(place, 1)] for place in used]
    branches = [
        _branch(y, rows, measured_errors, slopes, float(share * y.min()), believed, levels_off, bound)
        for levels_off in (False, True) for share, believed in zip(FLOORS, OF_FLOORS, strict=True)
    ]  # fmt: skip
    return Law(tuple(branches), centre, used, bound)


def _branch(
    y: np.ndarray, rows: np.ndarray, measured: np.ndarray, slopes: Sequence[tuple[float, float]], floor: float,
    believed: float, levels_off: bool, bound: float,
) -> Branch:  # fmt: skip
    heights, steepness = np.log(y - floor), 1 / (y - floor)  # of the lines, and of them by errors
    if levels_off:
        heights, steepness = heights - np.log(bound - y), steepness + 1 / (bound - y)
    means, deviations = zip((float(heights.mean()), 2.0), *slopes, strict=True)
    lines = fit_lines(rows, heights, measured * steepness, Belief(means, deviations, SCATTER), felt=y * steepness)
    density = np.log(steepness).sum()  # from heights back to E
    return Branch(floor, levels_off, replace(lines, log_evidence=lines.log_evidence + density + believed))


def falls_faster(
    errors: Sequence[float], predictors: Sequence[Sequence[float]], measured: Sequence[float]
) -> bool:  # fmt: skip
    """Whether log errors against log images are concave beyond what chance does: then no power law has begun."""
    errors, logs = np.maximum(errors, 1e-12), np.log(np.asarray(predictors, float))
    y = np.log(errors)
    centred = logs - logs.mean(axis=0)
    used = [place for place in range(logs.shape[1]) if np.ptp(logs[:, place]) > 1e-9]
    if len(y) < len(used) + 2 or len(np.unique(logs[:, 0])) < 3:
        return False
    rows = np.column_stack([centred[:, 0] ** 2, np.ones(len(y)), centred[:, used]])
    variance = (np.asarray(measured) / errors) ** 2 + SCATTER**2
    covariance = np.linalg.pinv((rows / variance[:, None]).T @ rows)
    curvature = (covariance @ (rows / variance[:, None]).T @ y)[0]
    return bool(curvature < -CONCAVE * np.sqrt(covariance[0, 0]))
