"""Whether two models differ on the same images: paired, image by image."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.evaluation.intervals import interval_of_counts
from pipeline.registry.gate import mcnemar


def paired_difference(ours: Tensor, theirs: Tensor, *, bootstrap_samples: int) -> dict[str, Any]:
    """`difference` of the shares that are right, its 95 % interval over images (`low`, `high`), how many are right by
    one alone (`here`, `there`), and `p` of the exact McNemar test.

    Shape:
        ours, theirs: (S,) 0 or 1, in the same order
    """
    here = int(((ours > 0) & (theirs == 0)).sum())
    there = int(((theirs > 0) & (ours == 0)).sum())
    count = len(ours)
    low, high = interval_of_counts(
        np.array([here, there, count - here - there]), lambda drawn: (drawn[:, 0] - drawn[:, 1]) / count,
        samples=bootstrap_samples,
    )  # fmt: skip
    return {
        "difference": (here - there) / count, "low": low, "high": high, "here": here, "there": there,
        "p": mcnemar(here, there),
    }  # fmt: skip


def differences_from_first(correct: Mapping[str, Mapping[str, Tensor]], *, bootstrap_samples: int) -> dict[str, Any]:
    """Of every model but the first, what `paired_difference` says against the first, by `eval/PROTOCOL/DATASET`."""
    (first, theirs), *others = correct.items() or [("", {})]
    return {
        model: {
            name: paired_difference(ours[name], theirs[name], bootstrap_samples=bootstrap_samples) | {"against": first}
            for name in ours
            if name in theirs
        }
        for model, ours in others
    }
