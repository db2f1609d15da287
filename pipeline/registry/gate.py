"""Which version is the champion: the first, and later ones only when the same protocol on the same data says better.

Where both versions' predictions of the split are there, a paired test decides: the exact McNemar test (two-sided, Q.
McNemar, Psychometrika 12, 1947) on the images that exactly one of both has right. Where they are not, a stated margin.
Torch-free.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SIGNIFICANCE = 0.05
SELECTION = "validation"  # the split that may be looked at as often as one likes


class Predictions(NamedTuple):
    """What a version said of each image, in the order of the split."""

    correct: np.ndarray  # (S,) 0..1
    labels: np.ndarray  # (S,)


class Standing(NamedTuple):
    """What one protocol says of a version on one split of a dataset."""

    metric: str  # eval/PROTOCOL/DATASET/METRIC
    value: float
    data: str  # fingerprint of the dataset
    split: str
    predictions: Predictions | None = None


class Verdict(NamedTuple):
    promoted: bool
    reason: str


def champion_verdict(new: Sequence[Standing], champion: Sequence[Standing] | None, margin: float) -> Verdict:
    """Compare two versions by the first of the new one's standings that the champion has too.

    `champion` is None where there is none yet. Without predictions of both, `new` must be better by `margin`.
    """
    if champion is None:
        return Verdict(True, "first version")
    if not new or not champion:
        which = "this version" if not new else "the champion"
        return Verdict(False, f"not compared: {which} is a version without an evaluation")
    ordered = [*(one for one in new if one.split == SELECTION), *(one for one in new if one.split != SELECTION)]
    for ours in ordered:
        for theirs in champion:
            if (_asked(ours), ours.data, ours.split) == (_asked(theirs), theirs.data, theirs.split):
                verdict = _compared(ours, theirs, margin)
                return Verdict(verdict.promoted, verdict.reason + _of_the_split(ours, champion))
    return Verdict(False, _why_not_compared(ordered[0], champion))


def _asked(one: Standing) -> tuple[str, str]:
    """Protocol and metric; what the folder of the dataset was called says nothing, its fingerprint does."""
    protocol, _, name = one.metric.removeprefix("eval/").partition("/")
    return protocol, name.rpartition("/")[2]


def _compared(ours: Standing, theirs: Standing, margin: float) -> Verdict:
    words = f"{ours.metric} {ours.value:.4f} against the champion's {theirs.value:.4f}"
    if ours.predictions is not None and theirs.predictions is not None:
        return _paired(ours.predictions, theirs.predictions, words)
    gain = ours.value - theirs.value
    lacking = " (no predictions of both to pair)"
    if gain >= margin:
        return Verdict(True, f"better by {gain:.4f}, margin {margin}: {words}{lacking}")
    return Verdict(False, f"gain {gain:.4f} is below the margin {margin}: {words}{lacking}")


def _paired(ours: Predictions, theirs: Predictions, words: str) -> Verdict:
    if not np.array_equal(ours.labels, theirs.labels):
        return Verdict(False, f"not compared: the labels of the two versions' predictions differ; {words}")
    here, there = (int((one > other).sum()) for one, other in ((ours.correct, theirs.correct),
                                                               (theirs.correct, ours.correct)))  # fmt: skip
    p = mcnemar(here, there)
    figures = (f"of {len(ours.labels):,} images {here:,} are right in this version alone, {there:,} in the champion "
               f"alone: exact McNemar test p = {p:.3g}; {words}")  # fmt: skip
    if here > there and p < SIGNIFICANCE:
        return Verdict(True, f"better by a paired test: {figures}")
    how = "worse" if there > here and p < SIGNIFICANCE else f"not better at p < {SIGNIFICANCE:g}"
    return Verdict(False, f"{how} by a paired test: {figures}")


def mcnemar(here: int, there: int) -> float:
    """Two-sided p of the exact McNemar test: how likely so uneven a split of the discordant pairs is by chance."""
    from scipy.stats import binomtest

    return float(binomtest(here, here + there, 0.5).pvalue) if here + there else 1.0


def _of_the_split(ours: Standing, champion: Sequence[Standing]) -> str:
    """What a person must know where the selection split did not decide."""
    if ours.split == SELECTION:
        return ""
    selected = any(one.split == SELECTION for one in champion)
    why = "the two were not both scored on a selection split" if selected else "there is no selection split"
    return f"; on the {ours.split} split, as {why}"


def _why_not_compared(ours: Standing, champion: Sequence[Standing]) -> str:
    same = next((one for one in champion if _asked(one) == _asked(ours)), None)
    if same is not None and same.data != ours.data:
        return f"not compared: evaluated on other data ({ours.data} against {same.data})"
    there = same or champion[0]
    return (f"not compared: evaluated by another protocol ({ours.metric} on {ours.split} against {there.metric} on "
            f"{there.split})")  # fmt: skip
