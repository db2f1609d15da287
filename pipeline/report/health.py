"""Health measurements of a run with their verdicts, and the bands that they were held against. Torch-free."""

from itertools import chain
from typing import NamedTuple

from pipeline.errors import InputError
from pipeline.health.bands import FILE as BANDS
from pipeline.health.bands import read_bands
from pipeline.health.log import read_verdicts
from pipeline.health.verdicts import Verdict
from pipeline.run_directory import RunDirectory

MOST_TOLD = 5000  # measurements; of more, one of every few
TITLES = {
    "explained_variance": "Explained variance of hidden patches",
    "rankme": "RankMe, the effective rank of the features",
    "feature_spread": "Spread of the features",
    "attention_entropy": "Entropy of attention",
    "knn_top1": "k-nearest neighbours, top-1",
    "ridge_top1": "Ridge probe, top-1",
}


class Health(NamedTuple):
    """Measurements in the order of steps, and by metric the (progress, low, high) of its band, where there is one."""

    measured: list[Verdict]
    bands: dict[str, tuple[tuple[float, float, float], ...]]
    basis: str | None

    def of(self, metric: str) -> list[Verdict]:
        return [one for one in self.measured if one.metric == metric]

    @property
    def metrics(self) -> list[str]:
        found = dict.fromkeys(one.metric for one in self.measured)
        return sorted(found, key=lambda name: (list(TITLES).index(name) if name in TITLES else len(TITLES), name))

    @property
    def outside(self) -> list[Verdict]:
        """Those that were below or above their band, or alarming."""
        return [one for one in self.measured if one.verdict in ("low", "high")]

    @property
    def bad(self) -> list[Verdict]:
        """What is bad in the newest measurement, by the rule of the training itself."""
        newest = self.measured[-1].step if self.measured else None
        return [one for one in self.measured if one.step == newest and one.is_bad]


def read_health(run: RunDirectory) -> Health:
    """Of all attempts; what a later one measured again counts as that one did it."""
    measured = list(chain.from_iterable(read_verdicts(run)))
    every = -(-len(measured) // MOST_TOLD) or 1
    return Health(measured[-1::-every][::-1], *_bands(run))


def _bands(run: RunDirectory) -> tuple[dict[str, tuple[tuple[float, float, float], ...]], str | None]:
    """By metric, and in words what they rest on; of a damaged file that it is damaged."""
    try:
        bands = read_bands(run.path)
    except InputError:
        return {}, f"{BANDS} is damaged, so none are drawn"
    return (bands.metrics, bands.basis) if bands is not None else ({}, None)
