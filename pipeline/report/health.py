"""Health measurements of a run with their verdicts, and the bands that they were held against. Torch-free.

RUN/attempts/NN/health.jsonl   {step, samples, epoch, progress, metric, value, low, high, basis, verdict, words}
RUN/bands.json                 {format_version, basis, metrics: {metric: [[progress, low, high], ...]}}
"""

import json
import math
from typing import Any, NamedTuple

from pipeline.health.verdicts import Verdict
from pipeline.report.ledger import later_begins
from pipeline.run_directory import RunDirectory, read_json

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

    measured: list[dict[str, Any]]
    bands: dict[str, list[tuple[float, float, float]]]
    basis: str | None

    def of(self, metric: str) -> list[dict[str, Any]]:
        return [one for one in self.measured if one["metric"] == metric]

    @property
    def metrics(self) -> list[str]:
        found = dict.fromkeys(one["metric"] for one in self.measured)
        return sorted(found, key=lambda name: (list(TITLES).index(name) if name in TITLES else len(TITLES), name))

    @property
    def outside(self) -> list[dict[str, Any]]:
        """Those that were below or above their band, or alarming."""
        return [one for one in self.measured if one.get("verdict") in ("low", "high")]

    @property
    def bad(self) -> list[dict[str, Any]]:
        """What is bad in the newest measurement, by the rule of the training itself."""
        newest = max((one["step"] for one in self.measured), default=None)
        return [one for one in self.measured if one["step"] == newest and _is_bad(one)]


def read_health(run: RunDirectory) -> Health:
    """Of all attempts; what a later one measured again counts as that one did it."""
    told: list[list[dict[str, Any]]] = []
    for number in range(1, run.last_attempt() + 1):
        path = run.attempt(number).path / "health.jsonl"
        if path.is_file():
            told.append([one for line in path.read_bytes().splitlines() if (one := _measurement(line))])
    told = [lines for lines in told if lines]
    ends = later_begins([int(lines[0]["step"]) for lines in told])
    newest = {  # a roll-back measures a step again
        (one["step"], one["metric"]): one for lines, end in zip(told, ends, strict=True) for one in lines
        if one["step"] < end
    }  # fmt: skip
    measured = list(newest.values())
    every = -(-len(measured) // MOST_TOLD) or 1
    return Health(measured[-1::-every][::-1], *_bands(run))


def _measurement(line: bytes) -> dict[str, Any] | None:
    try:
        one = json.loads(line)
        is_told = isinstance(one["metric"], str) and is_number(one["step"])
        return one if is_told and (one["value"] is None or is_number(one["value"])) else None
    except (ValueError, TypeError, KeyError):  # the half line of a killed process
        return None


def _is_bad(one: dict[str, Any]) -> bool:
    try:
        return Verdict(**one).is_bad
    except TypeError:  # of a version with other keys
        return one.get("verdict") in ("low", "high")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _bands(run: RunDirectory) -> tuple[dict[str, list[tuple[float, float, float]]], str | None]:
    """By metric, and in words what they rest on; of a damaged file that it is damaged."""
    try:
        bands = read_json(run.path / "bands.json")
        if bands is None:
            return {}, None
        told = {
            metric: [(float(progress), float(low), float(high)) for progress, low, high in points]
            for metric, points in bands["metrics"].items()
        }
        return told, bands["basis"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}, "bands.json is damaged, so none are drawn"
