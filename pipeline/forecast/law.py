"""How an error falls with images seen and with parameters: a saturating power law, fitted to a few small runs.

    E = a + b * images^-c * parameters^-e,   a >= 0, c >= 0, e >= 0

Errors fall as power laws of data (Hestness et al. 2017, arXiv:1712.00409), of parameters and of compute (Kaplan et
al. 2020, arXiv:2001.08361), towards an error a that more of them does not take away: for Vision Transformers Zhai et
al. 2022 (arXiv:2106.04560, section 2.1) fit E = a + b (x + d)^-c. With a handful of small runs d cannot be told from
c and is left out. Few points leave much open, so no single curve is fitted: every floor a on a grid, and every line
of log(E - a) under it, counts by how well it agrees with the runs (`regression`). What is said is an 80 % interval of
what a new run would score, and it widens with the distance from the runs. Torch-free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.forecast.regression import DRAWS, Belief, Lines, fit_lines

COVERS = 0.8  # of an interval: how often it is to hold the outcome
FLOORS = np.linspace(0.0, 0.9, 13)  # values of a, as shares of the least error; at 1 log(E - a) has no value
OF_FLOORS = 2 * np.log(1 - FLOORS)  # log of the belief in them: small runs are mostly far from their floor
LEAST_POINTS = 4  # for one predictor; one more for each further one
# Before any run: exponents of images are about 0.3 (Hestness et al. found 0.07 to 0.35, in image classification 0.3),
# of parameters less; runs alike but for their seed differ by some 4 % of their error.
OF_IMAGES, OF_PARAMETERS, SCATTER = (-0.3, 0.25), (-0.1, 0.15), 0.04


class Interval(NamedTuple):
    """The middle of what is expected, and the bounds that hold it in 80 of 100 cases."""

    value: float
    low: float
    high: float


class TooFew(ValueError):
    """Too few different points for a fit; says how many there must be."""


@dataclass(frozen=True)
class Law:
    """The laws that agree with some runs, weighed; `centre` (P,) of the predictors' logs, `bound` the worst error."""

    lines: tuple[Lines, ...]  # one for each of `floors`
    floors: np.ndarray
    centre: np.ndarray
    used: tuple[int, ...]  # the predictors that differ between the runs
    bound: float

    def predict(self, predictors: Sequence[float], error_of_measuring: float = 0.0) -> Interval:
        """What one further run would score; `predictors` are as at `fit`, positive.

        TooFew where a predictor that was the same in every run is another here.
        """
        errors = self.draws(predictors, error_of_measuring)
        low, middle, high = np.quantile(errors, [(1 - COVERS) / 2, 0.5, (1 + COVERS) / 2])
        return Interval(float(middle), float(low), float(high))

    def draws(self, predictors: Sequence[float], error_of_measuring: float = 0.0) -> np.ndarray:
        """(DRAWS,) errors of one further run, each as likely as the next."""
        logs = np.log(np.asarray(predictors, float))
        for place in range(len(logs)):
            if place not in self.used and abs(logs[place] - self.centre[place]) > 1e-9:
                raise TooFew(f"predictor {place} is the same in all runs, and another here")
        row = np.array([1.0, *(logs[place] - self.centre[place] for place in self.used)])
        random = np.random.default_rng(0)
        evidence = np.array([np.logaddexp.reduce(lines.log_evidence) for lines in self.lines])
        shares = np.exp(evidence - evidence.max())
        counts = random.multinomial(DRAWS, shares / shares.sum())
        found = []
        for floor, lines, count in zip(self.floors, self.lines, counts, strict=True):
            weights, scatter = lines.draws(count, random)
            weights[:, 1:] = np.minimum(weights[:, 1:], 0.0)  # more images or parameters make no error larger
            found.append((floor + np.exp(weights @ row)) * np.exp(scatter * random.standard_normal(count)))
        errors = np.concatenate(found) + error_of_measuring * random.standard_normal(DRAWS)
        return np.clip(errors, 0.0, self.bound)


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
    y = np.maximum(y, 1e-4 * bound)  # no error at all has no logarithm
    slopes = [(OF_IMAGES, OF_PARAMETERS)[min(place, 1)] for place in used]
    floors, lines = FLOORS * y.min(), []
    for floor, believed in zip(floors, OF_FLOORS, strict=True):
        above = y - floor
        belief = Belief(
            (float(np.log(y).mean()), *(mean for mean, _ in slopes)), (2.0, *(width for _, width in slopes)), SCATTER
        )
        one = fit_lines(rows, np.log(above), measured_errors / above, belief, felt=y / above)  # scatter is of E
        density = -np.log(above).sum()  # from log(E - a) back to E
        lines.append(Lines(one.log_evidence + density + believed, one.means, one.roots))
    return Law(tuple(lines), floors, centre, used, bound)
